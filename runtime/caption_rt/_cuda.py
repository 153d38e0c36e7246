"""Whether CUDA can be used at all, found out before ONNX Runtime is asked.

ONNX Runtime that is asked for CUDA in vain makes a session on the CPU all the same, and writes ``[E]`` lines straight
to the process's standard error, past Python, where no caller can catch them. So it is asked only where the driver, a
GPU and the libraries are there.
"""

import contextlib
import ctypes
import io
import logging
import sys
import threading
from collections.abc import Callable
from typing import Any, TextIO, cast

__all__ = ["missing_driver", "missing_library", "silenced"]

_log = logging.getLogger(__name__)


def missing_driver() -> str | None:
    """What is missing of the NVIDIA driver and a GPU that it can use, as half a sentence; None where both are there."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
        # CUDA driver API: cuInit(0) gives 0 where there is a usable device, 100 (CUDA_ERROR_NO_DEVICE) where not.
        status = int(driver.cuInit(0))
    except (OSError, AttributeError):
        return f"the NVIDIA driver is not installed ({name} cannot be loaded)"
    return None if status == 0 else f"the NVIDIA driver finds no GPU that it can use (CUDA error {status})"


def missing_library(cuda_version: str) -> str | None:
    """What is missing of CUDA's libraries and cuDNN 9, as half a sentence; None where all can be loaded.

    Args:
        cuda_version: the version of CUDA that ONNX Runtime was built for, "13.0".
    """
    major = cuda_version.split(".")[0]
    if sys.platform == "win32":
        names = [f"cudart64_{major}.dll", f"cublasLt64_{major}.dll", f"cublas64_{major}.dll", "cudnn64_9.dll"]
    else:
        names = [f"libcudart.so.{major}", f"libcublasLt.so.{major}", f"libcublas.so.{major}", "libcudnn.so.9"]
    for name in names:
        try:
            ctypes.CDLL(name)
        except OSError:
            return f"{name} cannot be loaded (CUDA {major} and cuDNN 9 are needed)"
    return None


def silenced(function: Callable[[], object]) -> None:
    """Call a function that prints, with its output sent to the log instead of standard output.

    Only what this thread prints is diverted: other threads of the application may be writing results.
    """
    stream = sys.stdout
    # A windowed application has no standard output.
    if stream is None:
        function()
        return
    diverted = _Diverted(stream)
    with contextlib.redirect_stdout(cast(TextIO, diverted)):
        function()
    for line in diverted.text.getvalue().splitlines():
        _log.info("%s", line)


class _Diverted:
    """A stand-in for standard output that keeps what one thread writes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._thread = threading.get_ident()
        self.text = io.StringIO()

    def write(self, text: str) -> int:
        mine = threading.get_ident() == self._thread
        return (self.text if mine else self._stream).write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

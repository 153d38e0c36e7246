"""The NVIDIA driver and the libraries of CUDA, found out by ctypes before ONNX Runtime is asked.

ONNX Runtime that is asked for CUDA in vain makes a session on the CPU all the same, and writes ``[E]`` lines straight
to the process's standard error, past Python, where no caller can catch them. So it is asked only where the driver, a
GPU and the libraries are there.

The driver is asked by its own interface, https://docs.nvidia.com/cuda/cuda-driver-api/, which comes with the driver and
needs no CUDA toolkit.
"""

import contextlib
import ctypes
import io
import logging
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TextIO, cast

__all__ = [
    "NO_DEVICE",
    "Driver",
    "DriverFailed",
    "Gpu",
    "NoDriver",
    "find_driver",
    "find_gpus",
    "missing_library",
    "silenced",
]

NO_DEVICE = 100
"""CUDA_ERROR_NO_DEVICE: the driver is there, and no GPU that it can use."""

_WINDOWS = sys.platform == "win32"
_CUDNN = "cudnn64_9.dll" if _WINDOWS else "libcudnn.so.9"

_log = logging.getLogger(__name__)


class Driver(NamedTuple):
    """The NVIDIA driver."""

    version: tuple[int, int]
    """The newest CUDA that it runs, such as (13, 0)."""
    gpus: int
    """How many GPUs it lets this process use."""


class Gpu(NamedTuple):
    """One GPU."""

    name: str
    """Such as "NVIDIA L4"."""
    memory: int
    """Bytes of its memory."""
    compute: tuple[int, int]
    """Its compute capability, such as (8, 9)."""


class NoDriver(Exception):
    """The NVIDIA driver is not installed; the text is half a sentence."""


class DriverFailed(Exception):
    """The NVIDIA driver is there and does not work, or finds no GPU; the text is half a sentence."""

    def __init__(self, message: str, status: int) -> None:
        """Keep the driver's own error number."""
        super().__init__(message)
        self.status = status


def find_driver() -> Driver:
    """Ask the NVIDIA driver for its version and its GPUs.

    Raises:
        NoDriver: it is not installed.
        DriverFailed: it does not work, or has no GPU.
    """
    library = _driver()
    version = _number(library, "cuDriverGetVersion")
    return Driver((version // 1000, version % 1000 // 10), _number(library, "cuDeviceGetCount"))


def find_gpus() -> tuple[Gpu, ...]:
    """The GPUs that the driver lets this process use, in its order.

    Raises:
        NoDriver: the driver is not installed.
        DriverFailed: it does not work, or has no GPU.
    """
    library = _driver()
    gpus = []
    for number in range(_number(library, "cuDeviceGetCount")):
        device = ctypes.c_int()
        _check(library, "cuDeviceGet", ctypes.byref(device), number)
        name = ctypes.create_string_buffer(256)
        _check(library, "cuDeviceGetName", name, len(name), device)
        memory = ctypes.c_size_t()
        # The second version takes a size of 64 bits; the first is there for programs of before 2010.
        _check(library, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
        major, minor = (_number(library, "cuDeviceGetAttribute", attribute, device) for attribute in (75, 76))
        gpus.append(Gpu(name.value.decode(errors="replace"), memory.value, (major, minor)))
    return tuple(gpus)


def missing_library(cuda_version: str) -> str | None:
    """What is missing of CUDA's libraries and cuDNN 9, as half a sentence; None where all can be loaded.

    Args:
        cuda_version: the version of CUDA that ONNX Runtime was built with, as "13.0".
    """
    major = cuda_version.split(".")[0]
    if _WINDOWS:
        names = [f"cudart64_{major}.dll", f"cublasLt64_{major}.dll", f"cublas64_{major}.dll"]
    else:
        # What the CUDA part of ONNX Runtime is linked with.
        names = [f"libcudart.so.{major}", f"libcublasLt.so.{major}", f"libcublas.so.{major}", "libcurand.so.10"]
    for name in names:
        if _load(name) is None:
            return f"{name} cannot be loaded (ONNX Runtime was built with CUDA {major}{_other_cuda(major)})"
    return _missing_cudnn(major)


def _missing_cudnn(major: str) -> str | None:
    """The same for cuDNN, which the convolutions need."""
    cudnn = _load(_CUDNN)
    if cudnn is None:
        found = _load("cudnn64_8.dll" if _WINDOWS else "libcudnn.so.8")
        return f"{_CUDNN} cannot be loaded (cuDNN 9 is needed{', and cuDNN 8 is there' if found else ''})"
    try:
        # The CUDA runtime that it was built with, as 12080 for 12.8.
        built_with = str(int(cudnn.cudnnGetCudartVersion()) // 1000)
    except AttributeError:
        return None
    if built_with != major:
        return f"{_CUDNN} was built for CUDA {built_with}, and ONNX Runtime with CUDA {major}"
    return None


def _other_cuda(major: str) -> str:
    """Which other CUDA is there in place of the one that is needed."""
    pattern = "cudart64_{}.dll" if _WINDOWS else "libcudart.so.{}"
    found = [other for other in ("12", "13", "14") if other != major and _load(pattern.format(other)) is not None]
    return f", and CUDA {found[-1]} is there" if found else ""


def _driver() -> Any:
    """The driver's library, initialised."""
    name = "nvcuda.dll" if _WINDOWS else "libcuda.so.1"
    library = _load(name)
    if library is None:
        raise NoDriver(f"the NVIDIA driver is not installed ({name} cannot be loaded)")
    _check(library, "cuInit", 0)
    return library


def _number(library: Any, function: str, *arguments: Any) -> int:
    """What a function of the driver writes to the integer that is its first argument."""
    value = ctypes.c_int()
    _check(library, function, ctypes.byref(value), *arguments)
    return value.value


def _check(library: Any, function: str, *arguments: Any) -> None:
    """Call a function of the driver; each gives 0 or an error number."""
    try:
        status = int(getattr(library, function)(*arguments))
    except AttributeError as exc:
        raise DriverFailed(f"the NVIDIA driver has no {function}", -1) from exc
    if status == NO_DEVICE:
        raise DriverFailed(f"the NVIDIA driver finds no GPU that it can use (CUDA error {status})", status)
    if status != 0:
        raise DriverFailed(f"the NVIDIA driver does not work ({function}: CUDA error {status})", status)


def _load(name: str) -> Any:
    """A shared library, or None where it or something that it needs cannot be loaded."""
    try:
        return ctypes.CDLL(name)
    except OSError:
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

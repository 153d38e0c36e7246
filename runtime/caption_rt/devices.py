"""Where a network runs: what a device's name means, and what a machine lacks for CUDA.

Neither NumPy nor ONNX Runtime is needed here: a command line can refuse a name before it loads either, and a machine is
examined even where ONNX Runtime is broken.
"""

import os
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

from caption_rt import _cuda
from caption_rt.errors import EngineError, OptionsError, printable

__all__ = ["DEVICES", "Device", "Missing", "installed_onnxruntimes", "missing_cuda", "missing_driver", "parse_device"]

DEVICES = ("auto", "cpu", "cuda", "cuda:N")
"""What can be asked for: "auto" takes CUDA where it works and else the CPU; "cuda" is CUDA or an error, on the first
GPU or, as "cuda:1", on another."""

# What can be installed as the import package `onnxruntime`; the one that is installed last overwrites the others.
_DISTRIBUTIONS = (
    *("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-qnn"),
    *("onnxruntime-rocm", "onnxruntime-migraphx", "onnxruntime-training"),
)
_WITH_CUDA = "onnxruntime-gpu"
_REINSTALL = f"reinstall {_WITH_CUDA}"
_CUDA_NAME = re.compile(r"cuda(?::(0|[1-9][0-9]{0,2}))?")
# The first driver that runs a CUDA of this major version: https://docs.nvidia.com/deploy/cuda-compatibility/
_DRIVERS = {11: "450", 12: "525", 13: "580"}


class Device(NamedTuple):
    """One device, as ONNX Runtime's bindings name it."""

    type: str
    """"cpu" or "cuda"."""
    number: int
    """Which GPU, counted from 0 in the order of the driver; 0 for the CPU."""

    @property
    def name(self) -> str:
        """The name that a user would write: "cpu", "cuda:0"."""
        return self.type if self.type == "cpu" else f"{self.type}:{self.number}"


class Missing(NamedTuple):
    """Why CUDA cannot be used."""

    what: str
    """What is missing; part of a sentence."""
    mend: str
    """What to do about it; part of a sentence."""
    expected: bool
    """Nothing is wrong: the machine has no NVIDIA driver, or its GPUs are hidden on purpose."""

    @property
    def reason(self) -> str:
        """Both: part of a sentence."""
        return f"{self.what}: {self.mend}"


def parse_device(name: str) -> Device | None:
    """The device that a name stands for; None for "auto".

    Raises:
        OptionsError: it is none of `DEVICES`.
    """
    if name == "auto":
        return None
    if name == "cpu":
        return Device("cpu", 0)
    # A caller may pass anything: a device object of another library, None.
    found = _CUDA_NAME.fullmatch(name) if isinstance(name, str) else None
    if found is None:
        raise OptionsError(f"the device is one of {', '.join(DEVICES)}, not {printable(repr(name))}")
    return Device("cuda", int(found[1] or 0))


def installed_onnxruntimes() -> dict[str, str]:
    """The installed distributions that bring the import package `onnxruntime`, each with its version."""
    from importlib import metadata  # asked where something is wrong

    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def missing_driver(number: int = 0, cuda_version: str = "") -> Missing | None:
    """What is missing of a GPU and of a driver that runs it; None where both are there.

    Args:
        number: which GPU.
        cuda_version: the CUDA that the driver must be able to run, as "13.0"; empty for any.
    """
    needed = int(cuda_version.split(".")[0]) if cuda_version else 0
    first = _DRIVERS.get(needed)
    try:
        driver = _cuda.find_driver()
    except _cuda.NoDriver as exc:
        wanted = f" {first} or newer" if first else ""
        return Missing(
            str(exc), f"install NVIDIA's driver{wanted}; in a container, hand the GPU through", expected=True
        )
    except _cuda.DriverFailed as exc:
        hidden = _hidden()
        if exc.status == _cuda.NO_DEVICE and hidden is not None:
            what = f"the environment variable CUDA_VISIBLE_DEVICES hides all GPUs (it is {hidden!r})"
            return Missing(what, "unset it", expected=True)
        return Missing(str(exc), "see what nvidia-smi says, and install a driver that fits this system", expected=False)
    if driver.version[0] < needed:
        version = ".".join(map(str, driver.version))
        what = f"the NVIDIA driver is too old, it runs CUDA up to {version} and ONNX Runtime needs {cuda_version}"
        return Missing(what, f"update it to {first} or newer" if first else "update it", expected=False)
    if number >= driver.gpus:
        there = "the only GPU is cuda:0" if driver.gpus == 1 else f"the GPUs are cuda:0 to cuda:{driver.gpus - 1}"
        return Missing(f"there is no cuda:{number}", there, expected=False)
    return None


def missing_cuda(
    number: int, *, built_in: bool, cuda_version: str | None, preload: Callable[[], object]
) -> Missing | None:
    """What is missing for CUDA on a GPU; None where ONNX Runtime can be asked for it.

    Args:
        number: which GPU.
        built_in: the installed ONNX Runtime has CUDA at all.
        cuda_version: the version of CUDA that it was built with, as "13.0".
        preload: loads the libraries of CUDA and cuDNN that were installed as packages; called where there is a GPU.
    """
    if not built_in:
        without = missing_driver(number)
        return Missing(*_wrong_package(), expected=without is not None and without.expected)
    missing = missing_driver(number, cuda_version or "")
    if missing is not None:
        return missing
    try:
        preload()
    except EngineError as exc:
        return Missing(str(exc), _REINSTALL, expected=False)
    library = _cuda.missing_library(cuda_version or "")
    if library is not None:
        return Missing(library, "pip install 'caption-rt[cuda]' brings what is needed", expected=False)
    return None


def _wrong_package() -> tuple[str, str]:
    """Why an ONNX Runtime has no CUDA, and what to do about it."""
    if sys.platform == "darwin":
        return "there is no CUDA on macOS", "use the device cpu, or auto"
    installed = sorted(installed_onnxruntimes())
    others = [name for name in installed if name != _WITH_CUDA]
    remove = f"pip uninstall -y {' '.join(installed)}, then " if installed else ""
    if others and len(others) < len(installed):
        what = f"{' and '.join(others)} and {_WITH_CUDA} are both installed, and what was installed last is without it"
        return what, f"{remove}pip install {_WITH_CUDA}"
    what = f"the installed {others[0] if others else 'ONNX Runtime'} is built without it"
    return what, f"{remove}pip install 'caption-rt[cuda]', which brings {_WITH_CUDA}"


def _hidden() -> str | None:
    """The value of CUDA_VISIBLE_DEVICES where it leaves no GPU to see, which is what "" and "-1" are used for."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return value if value is not None and value.strip() in ("", "-1") else None

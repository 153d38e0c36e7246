"""Devices: what CUDA lacks is said in a sentence, with and without a GPU in the machine that runs the tests.

The driver and the libraries are stand-ins: what is tested is what is asked of them, and
what is made of their answers.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import onnxruntime
import pytest

from caption_rt import _cuda, devices
from caption_rt.devices import Device, missing_driver, parse_device
from caption_rt.engine import Engine
from caption_rt.errors import EngineError, OptionsError
from cuda_machines import CPU, DRIVER, Driver, libraries

pytestmark = pytest.mark.usefixtures("fresh_probe")


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("auto", None),
        ("cpu", Device("cpu", 0)),
        ("cuda", Device("cuda", 0)),
        ("cuda:0", Device("cuda", 0)),
        ("cuda:12", Device("cuda", 12)),
    ],
)
def test_names_of_devices(name, device):
    assert parse_device(name) == device
    if device is not None:
        assert parse_device(device.name) == device


@pytest.mark.parametrize("name", ["gpu", "CUDA", "", "cuda:", "cuda:-1", "cuda:01", "cuda:0\n", "cpu:0", None, 0])
def test_an_unknown_device_is_an_option_error(bundle, name):
    with pytest.raises(OptionsError, match=r"the device is one of auto, cpu, cuda, cuda:N, not ") as caught:
        Engine(bundle, name)
    assert "\n" not in str(caught.value)


def test_the_driver_names_its_gpus(monkeypatch):
    libraries(monkeypatch, {DRIVER: Driver(gpus=("NVIDIA L4", "NVIDIA T4"))})
    assert _cuda.find_driver() == ((13, 2), 2)
    assert _cuda.find_gpus() == (("NVIDIA L4", 24 * 2**30, (8, 9)), ("NVIDIA T4", 48 * 2**30, (8, 9)))
    assert missing_driver(1, "13.0") is None


SOURCE = r"""
#include <stddef.h>
#include <string.h>
int cuInit(unsigned flags) { return flags; }
int cuDriverGetVersion(int *version) { *version = 12080; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int number) { *device = number + 7; return 0; }
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, "NVIDIA of paper", length); return device - 7; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)80 << 30; return device - 7; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute - 70; return device - 7; }
"""


@pytest.mark.skipif(
    shutil.which("cc") is None or sys.platform != "linux", reason="no C compiler that makes libcuda.so.1"
)
def test_a_real_library_is_called_as_its_functions_are_declared(tmp_path):
    (tmp_path / "cuda.c").write_text(SOURCE)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "libcuda.so.1", "cuda.c"], cwd=tmp_path, check=True)
    script = "from caption_rt import _cuda; print(_cuda.find_driver(), _cuda.find_gpus())"
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == (
        "Driver(version=(12, 8), gpus=1) (Gpu(name='NVIDIA of paper', memory=85899345920, compute=(5, 6)),)\n"
    )


@pytest.mark.parametrize(
    ("found", "number", "what", "mend", "expected"),
    [
        ({}, 0, "the NVIDIA driver is not installed", "install NVIDIA's driver 580 or newer; in a container", True),
        (Driver(status=100), 0, "finds no GPU that it can use (CUDA error 100)", "nvidia-smi", False),
        (Driver(status=803), 0, "does not work (cuInit: CUDA error 803)", "nvidia-smi", False),
        (Driver(12040), 0, "too old, it runs CUDA up to 12.4 and ONNX Runtime needs 13.0", "to 580 or newer", False),
        (Driver(), 1, "there is no cuda:1", "the only GPU is cuda:0", False),
        (Driver(gpus=("A", "B")), 7, "there is no cuda:7", "the GPUs are cuda:0 to cuda:1", False),
        (SimpleNamespace(), 0, "the NVIDIA driver has no cuInit", "nvidia-smi", False),
    ],
)
def test_what_the_driver_lacks(monkeypatch, found, number, what, mend, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    libraries(monkeypatch, {} if found == {} else {DRIVER: found})
    missing = missing_driver(number, "13.0")
    assert what in missing.what
    assert mend in missing.mend
    assert missing.reason == f"{missing.what}: {missing.mend}"
    assert missing.expected is expected


@pytest.mark.parametrize(("value", "expected"), [("", True), ("-1", True), ("9", False)])
def test_gpus_that_are_hidden_on_purpose_are_no_fault(monkeypatch, value, expected):
    libraries(monkeypatch, {DRIVER: Driver(status=100)})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    missing = missing_driver()
    assert missing.expected is expected
    assert ("CUDA_VISIBLE_DEVICES" in missing.what) is expected


LIBRARIES = ("libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10")


def with_libraries(cudnn, *others):
    return dict.fromkeys((*LIBRARIES, *others), SimpleNamespace()) | ({"libcudnn.so.9": cudnn} if cudnn else {})


@pytest.mark.skipif(sys.platform == "win32", reason="the names are those of Linux")
@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, "libcudart.so.13 cannot be loaded (ONNX Runtime was built with CUDA 13)"),
        (
            {"libcudart.so.12": SimpleNamespace()},
            "libcudart.so.13 cannot be loaded (ONNX Runtime was built with CUDA 13, and CUDA 12 is there)",
        ),
        (with_libraries(None), "libcudnn.so.9 cannot be loaded (cuDNN 9 is needed)"),
        (
            with_libraries(None, "libcudnn.so.8"),
            "libcudnn.so.9 cannot be loaded (cuDNN 9 is needed, and cuDNN 8 is there)",
        ),
        (
            with_libraries(SimpleNamespace(cudnnGetCudartVersion=lambda: 12080)),
            "libcudnn.so.9 was built for CUDA 12, and ONNX Runtime with CUDA 13",
        ),
        (with_libraries(SimpleNamespace(cudnnGetCudartVersion=lambda: 13000)), None),
        (with_libraries(SimpleNamespace()), None),
    ],
)
def test_what_cuda_and_cudnn_lack(monkeypatch, found, message):
    libraries(monkeypatch, found)
    assert _cuda.missing_library("13.0") == message


def installed(monkeypatch, *names):
    def version(name):
        if name not in names:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.31.1"

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no CUDA, whatever is installed")
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["onnxruntime"],
            "the installed onnxruntime is built without it: pip uninstall -y onnxruntime, then pip install "
            "'caption-rt[cuda]', which brings onnxruntime-gpu",
        ),
        (
            ["onnxruntime", "onnxruntime-gpu"],
            "onnxruntime and onnxruntime-gpu are both installed, and what was installed last is without it: "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install onnxruntime-gpu",
        ),
        (
            [],
            "the installed ONNX Runtime is built without it: pip install 'caption-rt[cuda]', which brings "
            "onnxruntime-gpu",
        ),
    ],
)
def test_the_wrong_package_is_named_with_what_to_do(bundle, monkeypatch, names, message):
    installed(monkeypatch, *names)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    libraries(monkeypatch, {DRIVER: Driver()})
    with pytest.raises(EngineError) as caught:
        Engine(bundle, "cuda")
    assert str(caught.value) == f"cuda:0 cannot be used: {message}"
    fallen = Engine(bundle, "auto")
    assert (fallen.provider, fallen.device, fallen.fallback) == (CPU, "cpu", message)


def test_macos_has_no_cuda(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert devices._wrong_package() == ("there is no CUDA on macOS", "use the device cpu, or auto")

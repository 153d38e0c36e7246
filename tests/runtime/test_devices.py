"""Devices: what CUDA lacks is said in a sentence, with and without a GPU in the machine that runs the tests.

The driver, the libraries and ONNX Runtime's CUDA sessions are stand-ins: what is tested is what is asked of them, and
what is made of their answers.
"""

import contextlib
import ctypes
import importlib.metadata
import os
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

from caption_rt import _cuda, devices, engine
from caption_rt.bundle import Bundle
from caption_rt.devices import Device, Missing, missing_driver, parse_device
from caption_rt.engine import Engine
from caption_rt.errors import EngineError, OptionsError

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return Bundle.open(tiny_bundle)


@pytest.fixture(autouse=True)
def fresh_probe():
    """Forget what was found out about CUDA, before and after."""
    engine.cuda_missing.cache_clear()
    yield
    engine.cuda_missing.cache_clear()


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


# The driver.


class Driver:
    """NVIDIA's driver, as ctypes sees it."""

    def __init__(self, version=13020, gpus=("NVIDIA L4",), status=0):
        self.version, self.gpus, self.status = version, gpus, status

    def cuInit(self, flags):
        assert flags == 0
        return self.status

    def cuDriverGetVersion(self, version):
        return put(version, self.version)

    def cuDeviceGetCount(self, count):
        return put(count, len(self.gpus))

    def cuDeviceGet(self, device, number):
        return put(device, number + 40)

    def cuDeviceGetName(self, name, length, device):
        name.value = self.gpus[device.value - 40].encode()[: length - 1]
        return 0

    def cuDeviceTotalMem_v2(self, memory, device):
        return put(memory, (device.value - 39) * 24 * 2**30)

    def cuDeviceGetAttribute(self, value, attribute, device):
        return put(value, {75: 8, 76: 9}[attribute])


def put(reference, value):
    reference._obj.value = value
    return 0


def libraries(monkeypatch, found):
    """The shared libraries of a machine: by name, what loading each gives."""

    def load(name):
        if name not in found:
            raise OSError(f"{name}: cannot open shared object file")
        return found[name]

    monkeypatch.setattr(ctypes, "CDLL", load)


DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


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


# The libraries of CUDA and cuDNN.

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


# The packages of ONNX Runtime.


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


# Engines.


def cuda_built(monkeypatch, driver=None):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "cuda_version", "13.0", raising=False)
    libraries(monkeypatch, {DRIVER: driver} if driver else {})


def test_without_a_driver_nothing_is_loaded_and_auto_has_nothing_to_say(bundle, monkeypatch):
    cuda_built(monkeypatch)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: pytest.fail("nothing is loaded without a driver"))
    with pytest.raises(EngineError, match=r"cuda:0 cannot be used: the NVIDIA driver is not installed .*: install"):
        Engine(bundle, "cuda")
    assert (Engine(bundle, "auto").device, Engine(bundle, "auto").fallback) == ("cpu", None)


def test_a_driver_that_is_too_old_is_named_by_auto(bundle, monkeypatch, caplog, capfd):
    cuda_built(monkeypatch, Driver(12040))
    with pytest.raises(EngineError, match=r"cuda:0 cannot be used: the NVIDIA driver is too old"):
        Engine(bundle, "cuda")
    with caplog.at_level("INFO", "caption_rt"):
        fallen = Engine(bundle, "auto")
    assert fallen.device == "cpu"
    assert "the NVIDIA driver is too old" in fallen.fallback
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert fallen.fallback in caplog.text
    assert capfd.readouterr() == ("", "")


def test_without_its_libraries_the_extra_is_named(bundle, monkeypatch, capfd):
    cuda_built(monkeypatch, Driver())
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load libcublas.so.13"))
    with pytest.raises(EngineError, match=r"13.*cannot be loaded .*: pip install 'caption-rt\[cuda\]' brings what"):
        Engine(bundle, "cuda")
    assert "cannot be loaded" in Engine(bundle, "auto").fallback
    assert capfd.readouterr() == ("", "")


def test_a_preload_that_fails_is_an_engine_error(bundle, monkeypatch):
    def fail():
        raise RuntimeError("Invalid parameter of directory")

    cuda_built(monkeypatch, Driver())
    monkeypatch.setattr(onnxruntime, "preload_dlls", fail)
    with pytest.raises(EngineError, match="cannot load its libraries: Invalid parameter of directory: reinstall onnx"):
        Engine(bundle, "cuda")
    assert "Invalid parameter of directory" in Engine(bundle, "auto").fallback


def cuda_promised(monkeypatch, session):
    """A machine where all libraries are there, and `session` is made of ONNX Runtime's when CUDA is asked for."""
    real = onnxruntime.InferenceSession

    def make(model, options, providers, **keywords):
        assert keywords == {"enable_fallback": 0}
        on_cpu = real(model, options, providers=[CPU], **keywords)
        return on_cpu if providers == [CPU] else session(on_cpu, providers)

    cuda_built(monkeypatch, Driver(gpus=("A", "B")))
    monkeypatch.setattr(_cuda, "missing_library", lambda version: None)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", make)


class OnCuda:
    """A session of the CPU that says it runs on CUDA; its bindings may name CUDA, and what they name is kept."""

    def __init__(self, session, places=None):
        self._session, self.places = session, {} if places is None else places
        self.get_inputs, self.get_outputs = session.get_inputs, session.get_outputs

    def get_providers(self):
        return [CUDA, CPU]

    def run(self, names, feeds):
        pytest.fail("tensors stay on the GPU: nothing is run without a binding")

    def io_binding(self):
        binding = self._session.io_binding()
        bind = binding.bind_output

        def bind_output(name, device_type, device_id):
            self.places.setdefault(name, set()).add((device_type, device_id))
            bind(name, "cpu", 0)

        binding.bind_output = bind_output
        return binding

    def run_with_iobinding(self, binding):
        self._session.run_with_iobinding(binding)


def test_cuda_is_taken_where_it_works(bundle, monkeypatch):
    asked, places = [], {}

    def session(on_cpu, providers):
        asked.append(providers)
        return OnCuda(on_cpu, places)

    cuda_promised(monkeypatch, session)
    for name, device in ("cuda", "cuda:0"), ("auto", "cuda:0"), ("cuda:1", "cuda:1"):
        asked.clear()
        places.clear()
        taken = Engine(bundle, name)
        assert (taken.provider, taken.device, taken.fallback) == (CUDA, device, None)
        number = int(device[-1])
        options = {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0", "device_id": str(number)}
        assert asked == [[(CUDA, options), CPU]] * 4
        up, down = {("cuda", number)}, {("cpu", 0)}
        assert places == {
            "grid": up,
            "features": up,
            "keys": up,
            "initial_state": up,
            "picked": up,
            "next_state": up,
            "log_probs": down,
            "attention": down,
        }
    on_cpu = Engine(bundle, "cpu")
    images = np.full((3, 32, 32, 3), 200, np.uint8)
    np.testing.assert_allclose(taken.extract(images).numpy(), on_cpu.extract(images), atol=1e-6)
    assert (on_cpu.provider, on_cpu.device) == (CPU, "cpu")
    with pytest.raises(EngineError, match="cuda:2 cannot be used: there is no cuda:2: the GPUs are cuda:0 to cuda:1"):
        Engine(bundle, "cuda:2")


def test_a_session_that_fell_back_is_an_error_for_cuda_and_fine_for_auto(bundle, monkeypatch):
    """ONNX Runtime was asked for CUDA, gave a session and runs it on the CPU."""
    cuda_promised(monkeypatch, lambda on_cpu, providers: on_cpu)
    with pytest.raises(EngineError, match=r"CUDA was asked for and ONNX Runtime runs .* on CPUExecution.* --doctor"):
        Engine(bundle, "cuda")
    fallen = Engine(bundle, "auto")
    assert (fallen.provider, fallen.device) == (CPU, "cpu")
    assert "CUDA was asked for" in fallen.fallback


def test_a_session_that_cannot_be_made_is_an_error_for_cuda_and_fine_for_auto(bundle, monkeypatch):
    def session(on_cpu, providers):
        raise RuntimeError("CUDA failure 2: out of memory")

    cuda_promised(monkeypatch, session)
    with pytest.raises(EngineError, match=r"cannot load .*: CUDA failure 2: out of memory"):
        Engine(bundle, "cuda")
    fallen = Engine(bundle, "auto")
    assert fallen.provider == CPU
    assert "out of memory" in fallen.fallback


def test_a_gpu_that_fails_at_the_first_photo_is_not_taken(bundle, monkeypatch):
    class Failing(OnCuda):
        def run_with_iobinding(self, binding):
            raise RuntimeError("no kernel image is available for execution on the device")

    cuda_promised(monkeypatch, lambda on_cpu, providers: Failing(on_cpu))
    with pytest.raises(EngineError, match="no kernel image"):
        Engine(bundle, "cuda")
    fallen = Engine(bundle, "auto")
    assert fallen.provider == CPU
    assert "no kernel image" in fallen.fallback


def test_a_device_is_tried_with_a_graph_of_one_node(monkeypatch):
    assert engine.try_provider("cpu") == CPU
    cuda_promised(monkeypatch, lambda on_cpu, providers: OnCuda(on_cpu))
    assert engine.try_provider("cuda:1") == CUDA
    assert engine.built_in_providers() == (CUDA, CPU)
    assert engine.cuda_missing(5) == Missing("there is no cuda:5", "the GPUs are cuda:0 to cuda:1", False)


# What libraries print is not ours to print.


def test_only_the_calling_threads_prints_are_diverted(capsys, caplog):
    def noisy():
        print("Failed to load libcudart.so.13")
        other = threading.Thread(target=lambda: print("a result of another thread"))
        other.start()
        other.join()

    with caplog.at_level("INFO", "caption_rt"):
        _cuda.silenced(noisy)
    print("after")
    assert capsys.readouterr().out == "a result of another thread\nafter\n"
    assert "Failed to load libcudart.so.13" in caplog.text


def test_a_process_without_standard_output(monkeypatch):
    called = []
    monkeypatch.setattr(sys, "stdout", None)
    _cuda.silenced(lambda: called.append(print("nowhere")))
    assert called == [None]


def test_standard_output_is_restored_after_a_failure(capsys):
    with contextlib.suppress(ZeroDivisionError):
        _cuda.silenced(lambda: 1 / 0)
    print("still here")
    assert capsys.readouterr().out == "still here\n"

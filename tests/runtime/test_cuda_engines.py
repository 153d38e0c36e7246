"""Engines with and without CUDA: taken where it works, an error where it was asked for, a reason for auto.

The driver and ONNX Runtime's CUDA sessions are stand-ins: what is tested is what is asked of them, and what is made of
their answers.
"""

import numpy as np
import onnxruntime
import pytest

from caption_rt import _cuda, engine
from caption_rt.devices import Missing
from caption_rt.engine import Engine
from caption_rt.errors import EngineError
from cuda_machines import CPU, CUDA, Driver, cuda_built

pytestmark = pytest.mark.usefixtures("fresh_probe")


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

"""The engine: right numbers, right errors, and nothing said behind the caller's back."""

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state

from caption_rt import _cuda, engine
from caption_rt.bundle import Bundle, TensorSpec
from caption_rt.engine import Engine, Graph
from caption_rt.errors import BundleError, EngineError, OptionsError
from caption_rt.image import read_photo


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def loaded(bundle):
    return Engine(bundle, "cpu")


@pytest.fixture
def fresh_probe():
    """Forget what was found out about CUDA, before and after."""
    engine._missing_cuda.cache_clear()
    yield
    engine._missing_cuda.cache_clear()


def graph_bytes(bundle, name):
    return (bundle.path / bundle.manifest.graphs[name].file).read_bytes()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_graphs_are_the_network_in_numpy(loaded, tiny, photos, count):
    network = tiny.Network()
    images = np.stack([read_photo(path, tiny.SIZE) for path in photos[:count]])
    grid = loaded.extract(images)
    assert (grid.dtype, grid.shape) == (np.float32, (count, tiny.PLACES, tiny.CHANNELS))
    encoded = loaded.encode(grid)
    tokens = np.arange(count)
    decoded = loaded.decode(tokens, encoded.initial_state, encoded.features, encoded.keys)
    for i, image in enumerate(images):
        reference = network.grid(image)
        np.testing.assert_allclose(grid[i], reference, atol=1e-5)
        features, keys, state = network.encode(reference)
        np.testing.assert_allclose(encoded.features[i], features, atol=1e-5)
        np.testing.assert_allclose(encoded.keys[i], keys, atol=1e-5)
        np.testing.assert_allclose(encoded.initial_state[i], state, atol=1e-5)
        log_probs, next_state, attention = network.step(int(tokens[i]), state, features, keys)
        np.testing.assert_allclose(decoded.log_probs[i], log_probs, atol=1e-4)
        np.testing.assert_allclose(decoded.next_state[i], next_state, atol=1e-5)
        np.testing.assert_allclose(decoded.attention[i], attention, atol=1e-5)


def test_provider_and_threads(bundle, loaded, monkeypatch):
    assert loaded.provider == "CPUExecutionProvider"
    images = np.zeros((2, 32, 32, 3), np.uint8)
    np.testing.assert_array_equal(Engine(bundle, "cpu", intra_op_threads=2).extract(images), loaded.extract(images))
    with pytest.raises(OptionsError, match="intra_op_threads must be at least 1, not 0"):
        Engine(bundle, "cpu", intra_op_threads=0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert engine._session_options(None).intra_op_num_threads == 3
    assert engine._session_options(7).intra_op_num_threads == 7
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert engine._session_options(None).intra_op_num_threads == 0


def test_sessions_optimise_fully_say_nothing_and_stop_spinning():
    options = engine._session_options(None)
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    assert options.log_severity_level == 4
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


@pytest.mark.parametrize("device", ["gpu", "CUDA", "", "cuda:0\n"])
def test_an_unknown_device_is_an_option_error(bundle, device):
    with pytest.raises(OptionsError) as caught:
        Engine(bundle, device)
    assert "the device is one of auto, cpu, cuda, not" in str(caught.value)
    assert "\n" not in str(caught.value)


ONNXRUNTIME_ERRORS = [
    error
    for error in vars(onnxruntime_pybind11_state).values()
    if isinstance(error, type) and issubclass(error, Exception)
]


@pytest.mark.parametrize("error", [*ONNXRUNTIME_ERRORS, ValueError, RuntimeError, TypeError, MemoryError])
def test_every_error_of_onnxruntime_becomes_ours(error):
    with pytest.raises(EngineError) as caught, engine._engine_errors("ONNX Runtime failed"):
        raise error("first line\nsecond line")
    assert str(caught.value) == "ONNX Runtime failed: first line second line"
    assert type(caught.value.__cause__) is error


def test_there_are_errors_of_onnxruntime_to_map():
    assert {"Fail", "InvalidArgument", "InvalidProtobuf", "RuntimeException"} <= {
        e.__name__ for e in ONNXRUNTIME_ERRORS
    }


def test_a_failing_run_is_an_engine_error_and_prints_nothing(loaded, capfd):
    encoded = loaded.encode(loaded.extract(np.zeros((1, 32, 32, 3), np.uint8)))
    with pytest.raises(EngineError, match=r"ONNX Runtime failed in decoder\.onnx: .*out of data bounds, idx=99"):
        loaded.decode(np.array([99]), encoded.initial_state, encoded.features, encoded.keys)
    with pytest.raises(EngineError, match=r"ONNX Runtime failed in extractor\.onnx: .*images"):
        loaded.extract(np.zeros((1, 16, 16, 3), np.uint8))
    assert capfd.readouterr() == ("", "")


def test_a_graph_that_cannot_be_loaded(bundle, capfd):
    spec = bundle.manifest.graphs["encoder"]
    with pytest.raises(EngineError, match=r"cannot load encoder\.onnx: .*protobuf parsing failed") as caught:
        Graph(b"no graph at all", spec)
    assert type(caught.value.__cause__).__name__ == "InvalidProtobuf"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (TensorSpec("seen", "float32", ("n", 6, 5)), "encoder.onnx has the inputs grid, not those of its manifest"),
        (TensorSpec("grid", "uint8", ("n", 6, 5)), "the input grid is tensor(float)"),
        (TensorSpec("grid", "float32", ("n", 6, 7)), "and its manifest states float32 ['n', 6, 7]"),
        (TensorSpec("grid", "float32", ("n", 6)), "and its manifest states float32 ['n', 6]"),
    ],
)
def test_a_graph_that_is_not_what_its_manifest_says(bundle, changed, message):
    spec = replace(bundle.manifest.graphs["encoder"], inputs=(changed,))
    with pytest.raises(BundleError) as caught:
        Graph(graph_bytes(bundle, "encoder"), spec)
    assert message in str(caught.value)


def test_a_graph_runs_without_a_bundle(bundle, loaded):
    graph = Graph(graph_bytes(bundle, "encoder"), bundle.manifest.graphs["encoder"])
    grid = np.linspace(-1, 1, 60, dtype=np.float32).reshape(2, 6, 5)
    features, keys, state = graph.run(grid)
    np.testing.assert_array_equal(features, loaded.encode(grid).features)
    np.testing.assert_array_equal(keys, loaded.encode(grid).keys)
    assert state.shape == (2, 7)


def test_several_threads_may_share_an_engine(loaded):
    images = np.arange(4 * 32 * 32 * 3, dtype=np.uint8).reshape(4, 32, 32, 3)
    expected, results = loaded.extract(images), [None] * 8

    def work(i):
        for _ in range(20):
            results[i] = loaded.extract(images)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        np.testing.assert_allclose(result, expected, atol=1e-6)


# CUDA: this must hold with and without a GPU, so the probes of the machine are replaced.


def test_cuda_without_the_provider(bundle, monkeypatch, fresh_probe):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EngineError, match="built without it; onnxruntime-gpu has it"):
        Engine(bundle, "cuda")
    assert Engine(bundle, "auto").provider == "CPUExecutionProvider"


def cuda_built(monkeypatch):
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )


def test_cuda_without_a_driver_does_not_trouble_onnxruntime(bundle, monkeypatch, fresh_probe):
    cuda_built(monkeypatch)
    monkeypatch.setattr(_cuda, "missing_driver", lambda: "the NVIDIA driver is not installed")
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: pytest.fail("nothing is loaded without a driver"))
    with pytest.raises(EngineError, match="CUDA cannot be used: the NVIDIA driver is not installed"):
        Engine(bundle, "cuda")
    assert Engine(bundle, "auto").provider == "CPUExecutionProvider"


def test_cuda_without_its_libraries_names_the_extra(bundle, monkeypatch, fresh_probe, capfd):
    cuda_built(monkeypatch)
    monkeypatch.setattr(_cuda, "missing_driver", lambda: None)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load libcublas.so.13"))
    monkeypatch.setattr(onnxruntime, "cuda_version", "93.0", raising=False)
    with pytest.raises(EngineError, match=r"(93|_93).*cannot be loaded .*pip install 'caption-rt\[cuda\]' brings them"):
        Engine(bundle, "cuda")
    assert Engine(bundle, "auto").provider == "CPUExecutionProvider"
    assert capfd.readouterr() == ("", "")


def test_a_preload_that_fails_is_an_engine_error(bundle, monkeypatch, fresh_probe):
    def fail():
        raise RuntimeError("Invalid parameter of directory")

    cuda_built(monkeypatch)
    monkeypatch.setattr(_cuda, "missing_driver", lambda: None)
    monkeypatch.setattr(onnxruntime, "preload_dlls", fail)
    with pytest.raises(EngineError, match="cannot be used: ONNX Runtime cannot load its libraries: Invalid parameter"):
        Engine(bundle, "cuda")
    assert Engine(bundle, "auto").provider == "CPUExecutionProvider"


def cuda_promised(monkeypatch, session):
    """A machine where all libraries are there, and `session` is made of ONNX Runtime's when CUDA is asked for."""
    real = onnxruntime.InferenceSession

    def make(model, options, providers, **keywords):
        assert keywords == {"enable_fallback": 0}
        on_cpu = real(model, options, providers=["CPUExecutionProvider"], **keywords)
        return on_cpu if providers == ["CPUExecutionProvider"] else session(on_cpu, providers)

    cuda_built(monkeypatch)
    monkeypatch.setattr(_cuda, "missing_driver", lambda: None)
    monkeypatch.setattr(_cuda, "missing_library", lambda version: None)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnxruntime, "cuda_version", "13.0", raising=False)
    monkeypatch.setattr(onnxruntime, "InferenceSession", make)


class OnCuda:
    """A session that says it runs on CUDA; each run is `run`."""

    def __init__(self, session, run):
        self.get_inputs, self.get_outputs, self.run = session.get_inputs, session.get_outputs, run

    def get_providers(self):
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]


def test_cuda_is_taken_where_it_works(bundle, monkeypatch, fresh_probe):
    asked = []

    def session(on_cpu, providers):
        asked.append(providers)
        return OnCuda(on_cpu, on_cpu.run)

    cuda_promised(monkeypatch, session)
    for device in ("cuda", "auto"):
        assert Engine(bundle, device).provider == "CUDAExecutionProvider"
    assert Engine(bundle, "cpu").provider == "CPUExecutionProvider"
    assert len(asked) == 6
    (name, options), fallback = asked[0]
    assert (name, fallback) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert options == {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"}


def test_a_session_that_fell_back_is_an_error_for_cuda_and_fine_for_auto(bundle, monkeypatch, fresh_probe):
    """ONNX Runtime was asked for CUDA, gave a session and runs it on the CPU."""
    cuda_promised(monkeypatch, lambda on_cpu, providers: on_cpu)
    with pytest.raises(EngineError, match=r"CUDA was asked for and ONNX Runtime runs extractor\.onnx on CPUExecution"):
        Engine(bundle, "cuda")
    assert Engine(bundle, "auto").provider == "CPUExecutionProvider"


def test_a_session_that_cannot_be_made_is_an_error_for_cuda_and_fine_for_auto(bundle, monkeypatch, fresh_probe):
    def session(on_cpu, providers):
        raise RuntimeError("CUDA failure 2: out of memory")

    cuda_promised(monkeypatch, session)
    with pytest.raises(EngineError, match=r"cannot load extractor\.onnx: CUDA failure 2: out of memory"):
        Engine(bundle, "cuda")
    assert Engine(bundle, "auto").provider == "CPUExecutionProvider"


def test_a_gpu_that_fails_at_the_first_photo_is_not_taken_by_auto(bundle, monkeypatch, fresh_probe):
    def run(names, feeds):
        raise RuntimeError("no kernel image is available for execution on the device")

    cuda_promised(monkeypatch, lambda on_cpu, providers: OnCuda(on_cpu, run))
    with pytest.raises(EngineError, match="no kernel image"):
        Engine(bundle, "cuda").extract(np.zeros((1, 32, 32, 3), np.uint8))
    assert Engine(bundle, "auto").provider == "CPUExecutionProvider"


def test_the_driver_is_asked_for_a_device(monkeypatch):
    def load(name):
        assert name in ("libcuda.so.1", "nvcuda.dll")
        return SimpleNamespace(cuInit=lambda flags: 100 + flags)

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert _cuda.missing_driver() == "the NVIDIA driver finds no GPU that it can use (CUDA error 100)"
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(cuInit=lambda flags: 0))
    assert _cuda.missing_driver() is None
    assert _cuda.missing_library("13.0") is None

    def absent(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert "the NVIDIA driver is not installed" in _cuda.missing_driver()
    assert _cuda.missing_library("13.0").endswith("cannot be loaded (CUDA 13 and cuDNN 9 are needed)")


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


@pytest.mark.parametrize("contents", ["", "raise ImportError('libonnxruntime.so: bad ELF')"], ids=["hollow", "broken"])
def test_a_broken_onnxruntime_is_one_sentence(tmp_path, tiny_bundle, photos, contents):
    (tmp_path / "onnxruntime.py").write_text(contents)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    done = subprocess.run(
        [sys.executable, "-m", "caption_rt", "--model", tiny_bundle, photos[0]],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.startswith("caption-rt: error: ONNX Runtime cannot be imported (")
    assert done.stderr.endswith("reinstall exactly one of onnxruntime and onnxruntime-gpu\n")


def test_auto_is_silent_in_a_real_process(tiny_bundle):
    """Whatever ONNX Runtime and its libraries write past Python would show here."""
    script = (
        "import json, sys\n"
        "from caption_rt.bundle import Bundle\n"
        "from caption_rt.engine import Engine\n"
        "engine = Engine(Bundle.open(sys.argv[1]), 'auto')\n"
        "json.dump(engine.provider, sys.stdout)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, tiny_bundle],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) in ("CPUExecutionProvider", "CUDAExecutionProvider")
    assert done.stderr == ""


def test_standard_output_is_restored_after_a_failure(capsys):
    with contextlib.suppress(ZeroDivisionError):
        _cuda.silenced(lambda: 1 / 0)
    print("still here")
    assert capsys.readouterr().out == "still here\n"

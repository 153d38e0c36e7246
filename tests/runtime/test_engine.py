"""The engine: right numbers, right errors, and nothing said behind the caller's back."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state

from caption_rt import engine
from caption_rt._handmade import gather_model, product_model
from caption_rt._rows import engine_errors, padded
from caption_rt.bundle import TensorSpec
from caption_rt.captioner import Captioner
from caption_rt.engine import DeviceRows, Engine, Graph
from caption_rt.errors import BundleError, EngineError, OptionsError
from caption_rt.image import read_photo
from caption_rt.options import DecodeOptions


@pytest.fixture(scope="module")
def loaded(bundle):
    return Engine(bundle, "cpu")


@pytest.fixture
def bound(bundle, monkeypatch):
    """An engine that treats the CPU as it does a GPU: all tensors are bound, and stay where they are."""
    monkeypatch.setattr(engine, "_BOUND_TYPES", {"cpu", "cuda"})
    return Engine(bundle, "cpu")


def graph_bytes(bundle, name):
    return (bundle.path / bundle.manifest.precisions["fp32"][name].file).read_bytes()


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


def test_provider_device_and_threads(bundle, loaded, monkeypatch):
    assert (loaded.provider, loaded.device, loaded.fallback) == ("CPUExecutionProvider", "cpu", None)
    images = np.zeros((2, 32, 32, 3), np.uint8)
    narrow = Engine(bundle, "cpu", intra_op_threads=2)
    np.testing.assert_array_equal(narrow.extract(images), loaded.extract(images))
    assert narrow.intra_op_threads == 2
    with pytest.raises(OptionsError, match="intra_op_threads must be a whole number from 1 to 1024, not 0"):
        Engine(bundle, "cpu", intra_op_threads=0)
    monkeypatch.setattr(engine, "thread_count", lambda asked: asked or 3)
    monkeypatch.setattr(engine, "worker_processors", lambda asked: [] if asked else [(1,), (0, 2)])
    options = engine._session_options(None)
    assert options.get_session_config_entry("session.intra_op_thread_affinities") == "2;1,3"
    monkeypatch.setattr(engine, "worker_processors", lambda asked: [])
    assert engine._session_options(None).intra_op_num_threads == 3
    assert engine._session_options(7).intra_op_num_threads == 7
    assert Engine(bundle, "cpu").intra_op_threads == 3


def test_where_onnxruntime_counts_the_threads_itself_the_processors_are_the_bound(bundle, monkeypatch):
    monkeypatch.setattr(engine, "thread_count", lambda asked: asked or 0)
    monkeypatch.setattr(engine, "usable_cpus", lambda: 12)
    assert Engine(bundle, "cpu").intra_op_threads == 12


def test_sessions_optimise_fully_say_nothing_and_stop_spinning():
    options = engine._session_options(None)
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    assert options.log_severity_level == 4
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    assert options.get_session_config_entry("session.intra_op.spin_duration_us") == "10"


ONNXRUNTIME_ERRORS = [
    error
    for error in vars(onnxruntime_pybind11_state).values()
    if isinstance(error, type) and issubclass(error, Exception)
]


@pytest.mark.parametrize("error", [*ONNXRUNTIME_ERRORS, ValueError, RuntimeError, TypeError, MemoryError])
def test_every_error_of_onnxruntime_becomes_ours(error):
    with pytest.raises(EngineError) as caught, engine_errors("ONNX Runtime failed"):
        raise error("first line\nsecond line")
    assert str(caught.value) == "ONNX Runtime failed: first line second line; caption-rt --doctor says what works"
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
    spec = bundle.manifest.precisions["fp32"]["encoder"]
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
    spec = replace(bundle.manifest.precisions["fp32"]["encoder"], inputs=(changed,))
    with pytest.raises(BundleError) as caught:
        Graph(graph_bytes(bundle, "encoder"), spec)
    assert message in str(caught.value)


def test_a_graph_runs_without_a_bundle(bundle, loaded):
    graph = Graph(graph_bytes(bundle, "encoder"), bundle.manifest.precisions["fp32"]["encoder"])
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


def test_a_closed_engine_says_so_and_lets_a_run_under_way_end(bundle):
    closing = Engine(bundle, "cpu")
    images, results = np.zeros((64, 32, 32, 3), np.uint8), []
    worker = threading.Thread(target=lambda: results.append(closing.extract(images)))
    worker.start()
    worker.join()
    closing.close()
    closing.close()
    assert len(results[0]) == 64
    with pytest.raises(EngineError, match="the engine is closed: make another"):
        closing.extract(images)
    assert closing.device == "cpu"


# On a GPU, tensors stay on the device. The same code runs here with the CPU as that device.


def steps(on, images):
    """Three photos as a beam search takes them: the batch widens, repeats rows, is reordered and shrinks."""
    encoded = on.encode(on.extract(images))
    state, seen = encoded.initial_state, []
    for parents, photos in (
        ([0, 1, 2], [0, 1, 2]),
        ([0, 0, 1, 2, 2], [0, 0, 1, 2, 2]),
        ([4, 1, 0], [2, 0, 0]),
        ([2], [0]),
    ):
        state, photos = state[np.array(parents)], np.array(photos)
        tokens = np.arange(len(photos)) + 2
        decoded = on.decode(tokens, state, encoded.features[photos], encoded.keys[photos])
        state = decoded.next_state
        seen += [decoded.log_probs, decoded.attention, state if isinstance(state, np.ndarray) else state.numpy()]
    return seen


def test_rows_that_stay_on_the_device_give_the_same_numbers(loaded, bound, tiny, photos):
    images = np.stack([read_photo(path, tiny.SIZE) for path in photos])
    for expected, actual in zip(steps(loaded, images), steps(bound, images), strict=True):
        assert (actual.dtype, actual.shape) == (np.float32, expected.shape)
        np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize("options", [DecodeOptions(), DecodeOptions(beam_size=3), DecodeOptions(sample=True, seed=5)])
def test_captions_do_not_depend_on_where_the_rows_are(bound, bundle, tiny_bundle, photos, monkeypatch, options):
    expected = list(Captioner.load(tiny_bundle, "cpu").caption_many(photos, options))
    monkeypatch.setattr("caption_rt.captioner.shared_engine", lambda *arguments: bound)
    for caption, wanted in zip(Captioner.load(bundle, "cpu").caption_many(photos, options), expected, strict=True):
        assert caption.tokens == wanted.tokens
        assert caption.word_log_probs == pytest.approx(wanted.word_log_probs, abs=1e-5)
        np.testing.assert_allclose(caption.attention, wanted.attention, atol=1e-6)


def test_only_words_come_down_from_the_device(bound):
    encoded = bound.encode(bound.extract(np.zeros((3, 32, 32, 3), np.uint8)))
    assert [type(rows) for rows in encoded] == [DeviceRows] * 3
    decoded = bound.decode(np.zeros(3, np.int64), encoded.initial_state, encoded.features, encoded.keys)
    assert [type(rows) for rows in decoded] == [np.ndarray, DeviceRows, np.ndarray]


def test_arrays_go_up_and_rows_of_another_engine_come_down(bound, loaded):
    images = np.full((2, 32, 32, 3), 77, np.uint8)
    grid = loaded.extract(images)
    np.testing.assert_array_equal(bound.encode(grid).keys.numpy(), loaded.encode(grid).keys)
    np.testing.assert_array_equal(loaded.encode(bound.extract(images)).keys, loaded.encode(grid).keys)


def test_device_rows_are_picked_as_those_of_an_array(bound):
    rows = bound.extract(np.random.default_rng(1).integers(0, 256, (5, 32, 32, 3), np.uint8))
    array = rows.numpy()
    assert (len(rows), array.shape) == (5, (5, 6, 5))
    for numbers in [4, 0, 0, 3], [2], [], [1, 2, 3, 4, 0] * 7:
        picked = rows[np.array(numbers, np.int64)]
        assert len(picked) == len(numbers)
        np.testing.assert_array_equal(picked.numpy(), array[np.array(numbers, np.int64)])
    np.testing.assert_array_equal(rows.numpy(), array)


@pytest.mark.parametrize("numbers", [[0, 5], [-1]])
def test_a_row_that_is_not_there_is_never_zeros(bound, numbers):
    rows = bound.extract(np.zeros((5, 32, 32, 3), np.uint8))
    with pytest.raises(IndexError, match="a row from 0 to 4 was expected"):
        rows[np.array(numbers)]


def test_batches_of_photos_come_in_few_sizes():
    for count, size in (1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 16), (16, 16), (17, 24), (48, 48):
        images = np.full((count, 4, 4, 3), 9, np.uint8)
        filled = padded(images)
        assert (len(filled), filled.dtype) == (size, np.uint8)
        np.testing.assert_array_equal(filled[:count], images)
        assert not filled[count:].any()


def test_several_threads_share_a_bound_engine(bound, tiny, photos):
    images = np.stack([read_photo(path, tiny.SIZE) for path in photos])
    expected, failed = steps(bound, images), []

    def work(first):
        order = np.roll(np.arange(3), first)
        for _ in range(15):
            for wanted, actual in zip(expected, steps(bound, images), strict=True):
                if not np.allclose(actual, wanted, atol=1e-6):
                    failed.append(order)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_picked_rows_do_not_hold_what_they_were_picked_from(bound):
    gather, everything, large = bound._graphs.gather, np.arange(1000), np.ones((1000, 4096), np.float32)

    def first_row():
        rows = DeviceRows(gather.pick(large, everything), gather)
        return rows[np.array([0])]

    kept = [first_row()]
    before = resident()
    kept += [first_row() for _ in range(8)]
    # 16 MB would be held for each row.
    assert resident() - before < 2 * large.nbytes


def test_the_memory_of_bound_rows_is_used_again(bound):
    images = np.zeros((64, 32, 32, 3), np.uint8)

    def caption(words):
        encoded = bound.encode(bound.extract(images))
        state, tokens = encoded.initial_state, np.zeros(64, np.int64)
        for _ in range(words):
            state = bound.decode(tokens, state[np.arange(64)], encoded.features, encoded.keys).next_state
        return state

    caption(200)
    before = resident()
    caption(4000)
    # 64 rows of 7 numbers a step, each twice, would be 14 MB beside what surrounds them.
    assert resident() - before < 4 * 2**20


def resident():
    """Bytes of memory that this process really has; 0 where the system does not tell it so."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return 0


def test_a_failing_bound_run_is_an_engine_error_and_prints_nothing(bound, capfd):
    encoded = bound.encode(bound.extract(np.zeros((1, 32, 32, 3), np.uint8)))
    with pytest.raises(EngineError, match=r"ONNX Runtime failed in decoder\.onnx: .*out of data bounds, idx=99"):
        bound.decode(np.array([99]), encoded.initial_state, encoded.features, encoded.keys)
    with pytest.raises(EngineError, match=r"ONNX Runtime failed in extractor\.onnx: .*images"):
        bound.extract(np.zeros((1, 16, 16, 3), np.uint8))
    with pytest.raises(EngineError, match=r"ONNX Runtime failed in encoder\.onnx: .*Unexpected input data type"):
        bound.encode(np.zeros((1, 6, 5), np.uint8))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("data", "operator", "inputs", "outputs"),
    [
        (gather_model(), "Gather", {"data": "FLOAT", "rows": "INT64"}, {"picked": "FLOAT"}),
        (product_model(), "MatMulInteger", {"unsigned": "UINT8", "signed": "INT8"}, {"product": "INT32"}),
    ],
)
def test_handmade_graphs_are_what_onnx_would_make(data, operator, inputs, outputs):
    onnx = pytest.importorskip("onnx")

    def tensors(kinds):
        return [
            onnx.ValueInfoProto(
                name=name, type=onnx.helper.make_tensor_type_proto(onnx.TensorProto.DataType.Value(kind), None)
            )
            for name, kind in kinds.items()
        ]

    node = onnx.helper.make_node(operator, list(inputs), list(outputs))
    graph = onnx.helper.make_graph([node], operator, tensors(inputs), tensors(outputs))
    wanted = onnx.ModelProto(ir_version=7, graph=graph, opset_import=[onnx.helper.make_opsetid("", 13)])
    model = onnx.load_from_string(data)
    model.opset_import[0].domain = ""
    assert model == wanted


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

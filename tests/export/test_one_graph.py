"""The one graph: the same words as caption-rt, greedy and with a beam, from a file that is enough by itself."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from bundles import ONE_GRAPH_TOLERANCES, exactest_precision
from caption_export import one_graph
from caption_export.cli import main
from caption_export.errors import ExportError
from caption_export.one_graph import build_one_graph, self_test_photos, verify_one_graph
from caption_rt import Bundle, BundleError, Captioner, DecodeOptions
from caption_rt.bundle import default_bundle_path
from caption_rt.image import open_photo, read_photo

SEARCHES = [(1, 0.0), (1, 0.7), (2, 0.0), (3, 0.7), (5, 1.3)]


def options_of(bundle, beam=1, penalty=0.0):
    words = bundle.manifest.decoding.max_words
    return DecodeOptions(beam_size=beam, length_penalty=penalty, max_words=words, guard=False)


def session_of(data):
    quiet = onnxruntime.SessionOptions()
    quiet.intra_op_num_threads = 2
    return onnxruntime.InferenceSession(data, quiet, providers=["CPUExecutionProvider"])


def run(session, photos):
    """The outputs by name for photos that are of one size."""
    outputs = [output.name for output in session.get_outputs()]
    return dict(zip(outputs, session.run(outputs, {"photos": np.stack(photos)}), strict=True))


def assert_same(found, captions, pad_id, tolerance=1e-5):
    assert found["tokens"].shape[1] == found["lengths"].max()
    for row, caption in enumerate(captions):
        length = len(caption.tokens)
        assert found["lengths"][row] == length
        assert tuple(found["tokens"][row, :length]) == caption.tokens
        assert tuple(found["words"][row, :length]) == caption.words
        assert bool(found["ended"][row]) == (caption.ended == "end")
        assert found["log_prob"][row] == pytest.approx(caption.log_prob, abs=10 * tolerance)
        np.testing.assert_allclose(found["word_log_probs"][row, :length], caption.word_log_probs, atol=tolerance)
        np.testing.assert_allclose(found["attention"][row, :length], caption.attention, atol=tolerance)
        # What comes after a caption's end.
        assert (found["tokens"][row, length:] == pad_id).all()
        assert (found["words"][row, length:] == "").all()
        assert not found["word_log_probs"][row, length:].any()
        assert not found["attention"][row, length:].any()


@pytest.fixture(scope="module")
def tiny_opened(tiny_bundle):
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def default():
    """The default bundle, and its one graph with greedy search."""
    bundle = Bundle.open(default_bundle_path())
    precision = exactest_precision(bundle)
    graph = build_one_graph(bundle, options_of(bundle), precision)
    return Captioner(bundle, "cpu", precision=precision), session_of(graph)


@pytest.mark.parametrize(("beam", "penalty"), SEARCHES)
def test_words_are_those_of_caption_rt_in_batches(tiny_opened, beam, penalty):
    options = options_of(tiny_opened, beam, penalty)
    session = session_of(build_one_graph(tiny_opened, options, "fp32"))
    random = np.random.default_rng(3)
    photos = [*random.integers(0, 256, (120, 32, 32, 3), np.uint8)]
    photos += [np.full((32, 32, 3), colour, np.uint8) for colour in random.integers(0, 256, (40, 3))]
    with Captioner(tiny_opened, "cpu") as captioner:
        captions = captioner.caption_pixels(photos, options)
    # Captions of several lengths side by side, some of them cut.
    assert len({len(caption.tokens) for caption in captions}) > 2
    assert {caption.ended for caption in captions} == {"end", "max_words"}
    for first in range(0, len(photos), 7):
        batch = slice(first, first + 7)
        assert_same(run(session, photos[batch]), captions[batch], tiny_opened.vocabulary.pad_id)


def test_the_longest_length_is_the_one_asked_for(tiny_opened, tiny_photos):
    for beam in (1, 3):
        options = DecodeOptions(beam_size=beam, max_words=2, guard=False)
        with Captioner(tiny_opened, "cpu") as captioner:
            captions = captioner.caption_pixels(tiny_photos, options)
        found = run(session_of(build_one_graph(tiny_opened, options, "fp32")), tiny_photos)
        assert found["tokens"].shape[1] == 2
        assert_same(found, captions, tiny_opened.vocabulary.pad_id)


@pytest.fixture
def tiny_photos(tiny_opened):
    return list(self_test_photos(tiny_opened).values())


def test_what_must_not_be_said_is_not_said(tiny_opened):
    session = session_of(build_one_graph(tiny_opened, options_of(tiny_opened, 2), "fp32"))
    tokens = run(session, np.random.default_rng(5).integers(0, 256, (200, 32, 32, 3), np.uint8))["tokens"]
    vocabulary = tiny_opened.vocabulary
    assert not np.isin(tokens, [vocabulary.unk_id, vocabulary.start_id, vocabulary.end_id]).any()


def test_a_photo_that_ends_at_once_has_no_words(tiny_opened):
    """The end token is made the likeliest: every caption is empty, and so are its tensors."""
    data = {name: tiny_opened.read(name) for name in ("extractor.onnx", "encoder.onnx", "decoder.onnx")}
    decoder = onnx.load_model_from_string(data["decoder.onnx"])
    (bias,) = [constant for constant in decoder.graph.initializer if constant.name == "out_bias"]
    likely = onnx.numpy_helper.to_array(bias).copy()
    likely[tiny_opened.vocabulary.end_id] = 99
    bias.CopyFrom(onnx.numpy_helper.from_array(likely, "out_bias"))
    data["decoder.onnx"] = decoder.SerializeToString()

    class Ended:
        """The bundle with that decoder."""

        manifest, vocabulary, sha256 = tiny_opened.manifest, tiny_opened.vocabulary, tiny_opened.sha256
        read = staticmethod(data.__getitem__)

    for beam in (1, 3):
        found = run(session_of(build_one_graph(Ended(), options_of(tiny_opened, beam), "fp32")), [PHOTO, PHOTO])
        assert found["tokens"].shape == (2, 0)
        assert found["attention"].shape == (2, 0, 2, 3)
        assert found["lengths"].tolist() == [0, 0]
        assert found["ended"].all()


PHOTO = np.zeros((32, 32, 3), np.uint8)


def test_real_photos_get_the_words_of_caption_rt(default, photos):
    captioner, session = default
    size, options = captioner.bundle.manifest.image.size, options_of(captioner.bundle)
    pixels = [read_photo(path, size) for path in photos]
    captions = captioner.caption_pixels(pixels, options)
    assert all(len(caption.tokens) > 4 for caption in captions)
    tolerance = ONE_GRAPH_TOLERANCES[captioner.precision]
    assert_same(run(session, pixels), captions, captioner.bundle.vocabulary.pad_id, tolerance)


@pytest.mark.parametrize("size", [(451, 300), (640, 480), (1000, 77), (224, 640), (40, 30), (2400, 1800)])
def test_resizing_is_that_of_pillow_within_1_of_255(size, photos):
    """The graph's first node by itself, on photos that get smaller, larger, and both."""
    bundle = Bundle.open(default_bundle_path())
    side = bundle.manifest.image.size
    model = onnx.load_model_from_string(build_one_graph(bundle, options_of(bundle), exactest_precision(bundle)))
    resize = next(node for node in model.graph.node if node.op_type == "Resize")
    shape = next(constant for constant in model.graph.initializer if constant.name == resize.input[3])
    outputs = [onnx.helper.make_tensor_value_info(resize.output[0], onnx.TensorProto.UINT8, [None, None, None, 3])]
    graph = onnx.helper.make_graph([resize], "resize", list(model.graph.input), outputs, [shape])
    small = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    session = session_of(small.SerializeToString())
    photo = open_photo(photos[0]).resize(size, Image.Resampling.LANCZOS)
    (found,) = session.run(None, {"photos": np.asarray(photo)[None]})
    difference = np.abs(found[0].astype(int) - np.asarray(photo.resize((side, side), Image.Resampling.BILINEAR)))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.02
    same = np.asarray(photo.resize((side, side)))
    assert np.array_equal(session.run(None, {"photos": same[None]})[0][0], same)


def test_photos_of_any_size_get_the_same_words(default, photos):
    captioner, session = default
    for path in photos:
        caption = captioner.caption(path, options_of(captioner.bundle))
        found = run(session, [np.asarray(open_photo(path))])
        assert tuple(found["tokens"][0]) == caption.tokens


@pytest.mark.data
@pytest.mark.parametrize("beam", [1, 3])
def test_photos_of_coco_get_the_same_words(default, shared, beam):
    captioner, session = default
    bundle, options = captioner.bundle, options_of(captioner.bundle, beam)
    if beam > 1:
        session = session_of(build_one_graph(bundle, options, captioner.precision))
    paths = sorted((shared / "photos" / "images").glob("*.jpg"))
    assert len(paths) == 30
    pixels = [read_photo(path, bundle.manifest.image.size) for path in paths]
    captions = captioner.caption_pixels(pixels, options)
    assert_same(run(session, pixels), captions, bundle.vocabulary.pad_id, ONE_GRAPH_TOLERANCES[captioner.precision])
    # At their own sizes, resized in the graph: here and there a value is 1 of 255 off, and of two words that are as
    # likely the other one may come.
    whole = [tuple(run(session, [np.asarray(open_photo(path))])["tokens"][0]) for path in paths]
    equal = sum(tokens == caption.tokens for tokens, caption in zip(whole, captions, strict=True))
    assert equal >= 28


def test_the_file_says_all_about_itself(tiny_opened):
    model = onnx.load_model_from_string(build_one_graph(tiny_opened, options_of(tiny_opened, 3, 0.7), "fp32"))
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert not [constant for constant in model.graph.initializer if constant.external_data]
    facts = session_of(model.SerializeToString()).get_modelmeta().custom_metadata_map
    assert tuple(json.loads(facts["vocabulary"])) == tiny_opened.vocabulary.words
    assert json.loads(facts["special_ids"]) == tiny_opened.vocabulary.special_ids
    assert json.loads(facts["preprocessing"])["size"] == 32
    assert json.loads(facts["grid"]) == {"rows": 2, "columns": 3}
    assert json.loads(facts["decoding"]) == {"beam_size": 3, "length_penalty": 0.7, "max_words": 8, "guard": False}
    assert json.loads(facts["versions"])["make_tiny_bundle"] == "1"
    assert (facts["name"], facts["license"], facts["precision"]) == ("tiny", "Apache-2.0", "fp32")
    assert (facts["format"], facts["bundle_sha256"]) == ("caption-graph 1", tiny_opened.sha256)


def test_the_same_bundle_gives_the_same_bytes_in_any_process(tiny_bundle, tmp_path):
    files = [tmp_path / name for name in ("a.onnx", "b.onnx")]
    for seed, path in zip("12", files, strict=True):
        command = [sys.executable, "-c", CONVERT, "graph", str(tiny_bundle), str(path), "--beam", "2"]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True)
    assert files[0].read_bytes() == files[1].read_bytes()


CONVERT = """
import sys
from caption_export.cli import main
code = main(sys.argv[1:])
assert not {"tensorflow", "keras", "tf2onnx"} & set(sys.modules), "TensorFlow was loaded"
sys.exit(code)
"""


def test_the_command_writes_the_file_and_says_what_it_holds(tiny_bundle, tmp_path, photos, capsys):
    out = tmp_path / "new" / "caption.onnx"
    assert main(["graph", str(tiny_bundle), str(out), "--max-words", "5", "--photos", str(photos[0].parent)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    size = out.stat().st_size
    assert first == f"{out}: fp32, greedy search, at most 5 words; {size} bytes"
    assert second == "the same words as caption-rt on 5 images"
    assert [path.name for path in out.parent.iterdir()] == ["caption.onnx"]
    assert main(["graph", str(tiny_bundle), str(out)]) == BundleError.exit_code
    assert "exists already: name another file, or replace it with --overwrite" in capsys.readouterr().err
    assert out.stat().st_size == size
    assert main(["graph", str(tiny_bundle), str(out), "--beam", "4", "--overwrite"]) == 0
    assert "a beam of 4, at most 8 words" in capsys.readouterr().out


def test_what_cannot_be_had_is_one_sentence(tiny_bundle, tmp_path, capsys):
    out = str(tmp_path / "caption.onnx")
    for arguments, code, sentence in (
        ([str(tiny_bundle), out, "--precision", "int8"], 2, "has no int8: it has fp32"),
        ([str(tmp_path / "none"), out], 3, "does not exist"),
        ([str(tiny_bundle), str(tmp_path)], 2, "is a directory"),
        ([str(tiny_bundle), out, "--limit-photos", "3"], 2, "--limit-photos is about --photos: name a folder of them"),
        ([str(tiny_bundle), out, "--beam", "1", "--length-penalty", "0.7"], 2, "--length-penalty is about a beam: add"),
        ([str(tiny_bundle), "/dev/null/caption.onnx"], 1, "cannot be written"),
    ):
        assert main(["graph", *arguments]) == code
        error = capsys.readouterr().err
        assert sentence in error
        assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_photos_are_compared_some_at_a_time_and_a_bad_one_is_passed_over(
    tiny_bundle, tmp_path, photos, capsys, caplog, monkeypatch
):
    monkeypatch.setattr(one_graph, "_TOGETHER", 3)
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(8):
        shutil.copy(photos[number % 3], folder / f"{number}.jpg")
    (folder / "0.jpg").write_bytes(b"no photo")
    out = str(tmp_path / "caption.onnx")
    arguments = ["graph", str(tiny_bundle), out, "--photos", str(folder)]
    assert main([*arguments, "--limit-photos", "6"]) == 0
    # Five of six, and the bundle's own two.
    assert capsys.readouterr().out.endswith("the same words as caption-rt on 7 images\n")
    assert [record.getMessage().startswith("passed over: ") for record in caplog.records] == [True]
    assert main([*arguments, "--limit-photos", "1", "--overwrite"]) == ExportError.exit_code
    assert "no photo can be read: name a folder of real photos" in capsys.readouterr().err


def test_other_words_than_caption_rt_are_refused(tiny_opened, tiny_photos):
    """A graph of other options stands for one that does not do what it should."""
    photos = dict(zip(("slope", "board"), tiny_photos, strict=True))
    data = build_one_graph(tiny_opened, DecodeOptions(max_words=1, guard=False), "fp32")
    with pytest.raises(
        ExportError, match=r"the one graph gives (slope|board) the token ids \[\d+\], and caption-rt \["
    ):
        verify_one_graph(data, tiny_opened, options_of(tiny_opened), "fp32", photos)


@pytest.fixture(scope="module")
def reduced(default, photos, tmp_path_factory):
    """The default bundle in fp16 and int8: its own graphs, or such as are made of those in fp32."""
    from caption_export.calibration import observe
    from caption_export.fp16 import halve
    from caption_export.graphs import ExportedGraph
    from caption_export.int8 import quantise
    from caption_rt.bundle import write_bundle
    from caption_rt.engine import Graph

    bundle = default[0].bundle
    if {"fp16", "int8"} <= bundle.manifest.precisions.keys():
        return bundle
    manifest, specs = bundle.manifest, bundle.manifest.precisions["fp32"]
    exported = {name: ExportedGraph(name, bundle.read(spec.file), spec) for name, spec in specs.items()}
    run = {name: Graph(graph.data, graph.spec).run for name, graph in exported.items()}
    pixels = np.stack([read_photo(path, manifest.image.size) for path in photos])
    (grid,) = run["extractor"](pixels)
    features, keys, state = run["encoder"](grid)
    tokens = np.full(len(pixels), bundle.vocabulary.start_id)
    batches = {"extractor": [(pixels,)], "encoder": [(grid,)], "decoder": []}
    for _ in range(6):
        batches["decoder"].append((tokens, state, features, keys))
        log_probs, state, _ = run["decoder"](*batches["decoder"][-1])
        tokens = log_probs.argmax(axis=1)
    seen = {name: observe(graph, batches[name]) for name, graph in exported.items()}
    made = {
        "fp32": exported,
        "fp16": {name: halve(graph, seen[name])[0] for name, graph in exported.items()},
        "int8": {name: quantise(graph, seen[name], "min-max") for name, graph in exported.items()},
    }
    contents = {name: bundle.read(name) for name in manifest.files}
    contents |= {graph.spec.file: graph.data for graphs in made.values() for graph in graphs.values()}
    kept = "name description license image grid recurrence special_ids decoding training scores versions"
    facts = {name: getattr(manifest, name) for name in kept.split()}
    precisions = {name: {graph: each.spec for graph, each in graphs.items()} for name, graphs in made.items()}
    folder = tmp_path_factory.mktemp("reduced") / "bundle"
    return write_bundle(folder, precisions=precisions, contents=contents, **facts)


@pytest.mark.tf
@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("beam", [1, 3])
def test_every_precision_of_a_bundle_can_be_had(reduced, photos, precision, beam):
    options = options_of(reduced, beam)
    data = build_one_graph(reduced, options, precision)
    of_its_graphs = [reduced.manifest.files[spec.file].size for spec in reduced.manifest.precisions[precision].values()]
    assert sum(of_its_graphs) < len(data) < 1.05 * sum(of_its_graphs)
    session = session_of(data)
    with Captioner(reduced, "cpu", precision=precision) as captioner:
        for path in photos:
            pixels = read_photo(path, reduced.manifest.image.size)
            (caption,) = captioner.caption_pixels([pixels], options)
            assert caption.precision == precision
            assert_same(run(session, [pixels]), [caption], reduced.vocabulary.pad_id, ONE_GRAPH_TOLERANCES[precision])

"""fp16 and int8: what is made, what is measured, and what is refused."""

import contextlib
import io
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from bundles import change_file
from caption_export import calibration, reduced
from caption_export.calibration import BINS, Seen, choose_range, observe
from caption_export.cli import main
from caption_export.errors import ExportError
from caption_export.exporting import export_bundle
from caption_export.fp16 import LARGEST, halve
from caption_export.int8 import last_nodes, quantisable, quantise
from caption_export.parity import Photo
from caption_export.pipelines import OnnxPipeline, best_captions
from caption_export.reduced import Limits, Reducer, Reduction, Scored, sqnr
from caption_export.structure import check_structure
from caption_rt import Bundle, Captioner, DecodeOptions
from caption_rt.image import read_photo
from caption_rt.manifest import PRECISIONS
from shapes import shape_photo, write_flickr8k

pytestmark = pytest.mark.tf

LOOSE = {name: Limits(5.0, 0.0, 10.0) for name in ("fp16", "int8")}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Two ways of choosing ranges; the slow one has a test of its own."""
    monkeypatch.setattr(reduced, "METHODS", ("min-max", "percentile 99.9"))


@pytest.fixture(scope="module")
def drawn():
    """Twelve drawn photos, and their captions by name."""
    photos, captions = [], {}
    for index in range(12):
        image, caption = shape_photo(index)
        photos.append(Photo(f"{index}", read_photo(image, 75)))
        captions[f"{index}"] = [caption, f"there is {caption}"]
    return photos, captions


@pytest.fixture(scope="module")
def seen(graphs, drawn):
    return observe(graphs["extractor"], ([photo.pixels[None]] for photo in drawn[0]))


@pytest.fixture(scope="module")
def reducer(graphs, run, drawn):
    photos, captions = drawn
    asked = Reduction(("int8",), photos[6:], Scored(photos[:6], {str(i): captions[str(i)] for i in range(6)}), LOOSE)
    options = DecodeOptions(max_words=6)
    expected = [{"token_ids": [4, 5], "word_log_probs": [-1.0, -1.0]}]
    return Reducer(graphs, photos[:6], photos[:1], expected, [options], run.vocabulary, asked)


def operators(graph):
    return {node.op_type for node in onnx.load_model_from_string(graph.data).graph.node}


def test_every_float_tensor_is_observed(graphs, seen, drawn):
    model = onnx.load_model_from_string(graphs["extractor"].data)
    relus = {node.input[0] for node in model.graph.node if node.op_type == "Relu"}
    made = {name for node in model.graph.node for name in node.output}
    assert set(seen) == made - relus
    grid = OnnxPipeline(graphs).run("extractor", {"images": np.stack([photo.pixels for photo in drawn[0]])})["grid"]
    assert seen["grid"].highest == pytest.approx(grid.max(), rel=1e-4)
    assert seen["grid"].counts.sum() == grid.size
    # Whatever the histogram was put into again, ranges come from where the values are.
    assert choose_range(seen["grid"], "percentile 99.9")[1] == pytest.approx(np.quantile(grid, 0.999), rel=0.05)


def histogram(values):
    reach = np.abs(values).max()
    counts, _ = np.histogram(values, BINS, (-reach, reach))
    return Seen(float(values.min()), float(values.max()), counts, float(reach))


def test_ranges():
    values = np.concatenate([np.linspace(0, 1, 99_990), np.full(10, 8.0)])
    seen = histogram(values)
    assert choose_range(seen, "min-max") == (0.0, 8.0)
    assert choose_range(seen, "percentile 99.999") == (0.0, 8.0)
    assert choose_range(seen, "percentile 99.9") == (0.0, pytest.approx(1, abs=0.01))
    bell = np.abs(np.random.RandomState(1).normal(0, 1, 100_000))
    low, high = choose_range(histogram(np.append(bell, 40.0)), "entropy")
    assert low == pytest.approx(bell.min())
    assert 2 < high < 20


def test_a_photo_far_beyond_the_others_has_no_part_in_ranges(graphs, drawn, monkeypatch):
    usual = [histogram(np.linspace(0, top, 50)) for top in (1.0, 1.5, 2.0)]
    together = calibration._typical([*usual, histogram(np.linspace(0, 500, 50))])
    assert (together.highest, together.counts.sum(), together.extreme) == (2.0, 150, 500.0)


def test_the_extractor_in_8_bits(graphs, seen, reducer):
    graph = graphs["extractor"]
    small = quantise(graph, seen, "min-max", last_nodes(graph))
    check_structure(small)
    assert small.spec.file == "extractor-int8.onnx"
    assert (small.spec.inputs, small.spec.outputs) == (graph.spec.inputs, graph.spec.outputs)
    model = onnx.load_model_from_string(small.data)
    kinds = {x.name: numpy_helper.to_array(x).dtype for x in model.graph.initializer}
    zeros = [kinds[n.input[2]] for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert set(zeros) == {np.dtype("uint8")}
    assert "Relu" not in operators(small)  # an unsigned range cuts off where it would
    assert {str(kind) for kind in kinds.values()} >= {"int8", "int32", "uint8", "float32"}
    # 8 bits are 48 dB of one tensor; a dozen layers in a row keep half of it.
    assert reducer._compared["extractor"].sqnr(small)["grid"] > 15
    assert quantise(graph, seen, "min-max", last_nodes(graph)).data == small.data


def test_nodes_stay_in_float_with_the_relu_behind_them(graphs, seen, reducer):
    graph = graphs["extractor"]
    first = quantisable(graph)[0]
    mixed = quantise(graph, seen, "min-max", [first])
    assert "Relu" in operators(mixed)
    every = quantise(graph, seen, "min-max", [*quantisable(graph), *last_nodes(graph)])
    assert reducer._compared["extractor"].sqnr(every)["grid"] > reducer._compared["extractor"].sqnr(mixed)["grid"]


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_products_in_8_bits_have_ranges_that_no_photo_changes(graphs, reducer, name):
    small = quantise(graphs[name], reducer._seen[name], "min-max")
    check_structure(small)
    assert "MatMulInteger" in operators(small)
    assert "DynamicQuantizeLinear" not in operators(small)
    assert min(reducer._compared[name].sqnr(small).values()) > 20


def test_captions_in_8_bits_do_not_depend_on_the_batch(graphs, reducer, drawn, run):
    made, _ = reducer.make("int8")
    pipeline, options = OnnxPipeline(made), DecodeOptions(max_words=6, guard=False)
    images = np.stack([photo.pixels for photo in drawn[0]])
    together = best_captions(pipeline, images, options, run.vocabulary)
    alone = [best_captions(pipeline, image[None], options, run.vocabulary)[0] for image in images]
    assert [x.tokens for x in together] == [x.tokens for x in alone]
    np.testing.assert_allclose([x.log_prob for x in together], [x.log_prob for x in alone], atol=1e-4)


@pytest.mark.parametrize("name", ["extractor", "decoder"])
def test_weights_of_7_bits_cannot_saturate(graphs, reducer, name):
    """Where VNNI is missing, sums of two products are kept in 16 bits."""
    for bits, most in ((8, 127), (7, 64)):
        small = quantise(graphs[name], reducer._seen[name], "min-max", weight_bits=bits)
        check_structure(small)
        model = onnx.load_model_from_string(small.data)
        weights = [numpy_helper.to_array(x) for x in model.graph.initializer]
        weights = [x.astype(int) for x in weights if x.dtype == np.int8 and x.ndim > 1]
        assert max(np.abs(x).max() for x in weights) == most
        sqnr_of = reducer._compared[name].sqnr(small)
        assert min(sqnr_of.values()) > 10
    assert 2 * 255 * 64 < 2**15 < 2 * 255 * 127


def test_half_precision_keeps_float32_where_the_range_needs_it(graphs, seen):
    graph = graphs["extractor"]
    small, kept = halve(graph, seen)
    check_structure(small)
    assert len(small.data) < 0.6 * len(graph.data)
    assert kept == [node.name for node in onnx.load_model_from_string(graph.data).graph.node[:4]]  # pixels
    conv = next(node for node in onnx.load_model_from_string(graph.data).graph.node if node.op_type == "Relu")
    beyond = {**seen, conv.output[0]: replace(seen[conv.output[0]], extreme=LARGEST * 2)}
    _, more = halve(graph, beyond)
    assert conv.name in set(more) - set(kept)


def test_signal_to_noise():
    wanted = np.ones((3, 4), np.float32)
    assert sqnr(wanted, wanted) == 200
    assert sqnr(wanted, wanted * np.float32(1.1)) == pytest.approx(20, abs=0.01)
    assert sqnr(wanted, np.full_like(wanted, np.nan)) == -200
    assert sqnr(wanted * 0, wanted * 0) == 200
    # One photo with other values than all others is not what it is about.
    noisy = wanted * np.float32(1.1)
    noisy[0] = 500
    assert sqnr(wanted, noisy) == pytest.approx(20, abs=0.01)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            Limits(90.0, 0.0, 10.0),
            r"^int8: output \w+ of the \w+ graph keeps [\d.]+ dB above .*, and 90 dB are asked for$",
        ),
        (Limits(0.0, 1.01, 10.0), r"^int8: [\d.]+% of 6 captions \(greedy search\) are those of fp32, and 101.0% are"),
        (
            Limits(0.0, 0.0, -9.0),
            r"^int8: CIDEr falls by -?[\d.]+, from [\d.]+ to [\d.]+ on 6 photos \(greedy search\)",
        ),
    ],
)
def test_what_loses_more_than_it_may_is_refused(reducer, monkeypatch, limits, message):
    monkeypatch.setattr(reducer, "_asked", replace(reducer._asked, limits={"int8": limits}))
    monkeypatch.setattr(reduced, "_KEPT", (0,))
    with pytest.raises(ExportError, match=message):
        reducer.make("int8")


def test_each_search_is_held_against_the_limits(reducer):
    _, report = reducer.make("int8")
    (greedy,) = report.searches
    assert greedy.options.beam_size == 1
    beam = replace(greedy, options=DecodeOptions(beam_size=3), fp32={"CIDEr": 0.5}, scores={"CIDEr": 0.48})
    strict = replace(report, limits=Limits(0.0, 0.0, 0.01))
    reduced._check(replace(strict, searches=(replace(beam, scores={"CIDEr": 0.491}),)))
    with pytest.raises(ExportError, match=r"CIDEr falls by 0\.0200, from 0\.5000 to 0\.4800 .*\(a beam of 3\)"):
        reduced._check(replace(strict, searches=(replace(beam, scores=beam.fp32), beam)))


def test_nodes_that_lose_most_are_kept_in_float_until_the_limits_hold(reducer, monkeypatch):
    _, first = reducer.make("int8")
    limit = first.sqnr["extractor.grid"] + 0.05

    def check(report):
        if report.sqnr["extractor.grid"] < limit:
            raise ExportError("not enough")

    monkeypatch.setattr(reduced, "_check", check)
    _, report = reducer.make("int8")
    assert report.sqnr["extractor.grid"] >= limit
    values = list(report.losses.values())
    assert values == sorted(values)
    last = len(first.in_float["extractor"])
    assert list(report.in_float["extractor"])[last:] == list(report.losses)[: len(report.in_float["extractor"]) - last]
    assert len(report.in_float["extractor"]) > last


def exported(out, run_folder, photos, data):
    """Have the command write a bundle in three precisions, with ranges from real photos; gives what it prints."""
    arguments = [run_folder, out, "--photos", photos[0].parent, "--calibration", photos[0].parent, "--dataset", data]
    arguments += [x for precision in ("int8", "fp32", "fp16") for x in ("--precision", precision)]
    arguments += [
        "--limit-photos",
        2,
        "--min-sqnr",
        5,
        "--min-equal-captions",
        0,
        "--max-cider-loss",
        10,
        "--beam",
        2,
        "--name",
        "drawn",
    ]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(reduced, "METHODS", ("min-max", "percentile 99.9"))
        assert main([str(argument) for argument in arguments]) == 0
    return printed.getvalue().splitlines()


@pytest.fixture(scope="module")
def three(run_folder, photos, tmp_path_factory):
    """That bundle, opened; what the command printed; and how to write it again."""
    folder = tmp_path_factory.mktemp("three")
    data = write_flickr8k(folder / "data", range(8), range(8, 14))
    lines = exported(folder / "out", run_folder, photos, data)
    return Bundle.open(folder / "out"), lines, lambda out: exported(out, run_folder, photos, data)


def test_a_bundle_in_three_precisions_says_what_was_found(three):
    bundle, lines, _ = three
    heads = ["fp16", "fp16, greedy search", "fp16, a beam of 2", "int8", "int8, greedy search", "int8, a beam of 2"]
    assert [line.split(":")[0] for line in lines[-8:-2]] == heads
    assert list(bundle.manifest.precisions) == ["fp32", "fp16", "int8"]
    found = json.loads(bundle.read("verification.json"))
    assert found["photos"] == 2
    assert set(found["int8"]["outputs_sqnr_db"]) == {
        *("extractor.grid", "encoder.features", "encoder.keys", "encoder.initial_state"),
        *("decoder.log_probs", "decoder.next_state", "decoder.attention"),
    }
    for precision, bits in (("fp16", 16), ("int8", 8)):
        searches = found[precision]["captions"]
        assert [search["search"] for search in searches] == ["greedy search", "a beam of 2"]
        for search in searches:
            assert search["captions"] == 6
            scores = search["scores"]
            loss = scores["fp32"]["CIDEr"] - scores[precision]["CIDEr"]
            assert search["cider_loss"] == pytest.approx(loss, abs=2e-4)
        assert found[precision]["weight_bits"] == bits
    assert found["int8"]["limits"] == {"min_sqnr": 5.0, "min_equal": 0.0, "max_cider_loss": 10.0}
    for precision in bundle.manifest.precisions:
        assert Captioner.load(bundle, "cpu", precision=precision).self_test().precision == precision
        for name, graph in found[precision]["graphs"].items():
            file = bundle.manifest.precisions[precision][name].file
            assert graph["bytes"] == bundle.manifest.files[file].size
    card = bundle.read("README.md").decode()
    assert "### int8" in card
    assert re.search(r"found on a processor that .* x86 without VNNI.*: use fp32 there", card)
    for search in ("greedy search", "a beam of 2"):
        assert card.count(f"| captions with the same words, {search} | ") == 2


def test_two_exports_in_three_precisions_give_the_same_bytes(three, tmp_path):
    bundle, _, again = three
    again(tmp_path / "again")
    for path in bundle.path.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_bundle_in_three_precisions_is_verified_and_inspected(three, call, photos, tmp_path):
    """As a folder and as a zip file, on real photos."""
    bundle, _, _ = three
    assert call("pack", bundle.path, tmp_path / "drawn.zip").exit_code == 0
    for path in (bundle.path, tmp_path / "drawn.zip"):
        result = call("verify", path, "--photos", photos[0].parent)
        assert (result.exit_code, result.stderr) == (0, "")
        lines = result.stdout.splitlines()
        parts = [f"{precision} {graph}" for precision in PRECISIONS for graph in ("extractor", "encoder", "decoder")]
        tests = [f"{precision} {what}" for precision in PRECISIONS for what in ("self-test", "photos")]
        assert [line[4:23].strip() for line in lines[:-2]] == ["files", *parts, "verification.json", *tests]
        assert {line[:3] for line in lines[:-2]} == {"ok "}
        assert "ok  fp32 photos        3 captioned, the same words 1, 2, 7 at a time" in lines
        assert lines[-1] == f"{path} is what it says"
        result = call("inspect", path)
        graphs, _, measured = result.stdout.partition("scores by precision, in ONNX Runtime\n")
        rows = [line.split()[:3] for line in graphs.splitlines() if line.startswith(tuple(PRECISIONS))]
        assert rows == [
            [precision, graph, f"{graph}{'' if precision == 'fp32' else f'-{precision}'}.onnx"]
            for precision in PRECISIONS
            for graph in ("extractor", "encoder", "decoder")
        ]
        # Of fp32 two scores by each of two searches, of the others the share of equal captions as well.
        assert [sum(x.startswith(name) for x in measured.splitlines()) for name in PRECISIONS] == [4, 6, 6]
        facts = json.loads(call("inspect", path, "--json").stdout)
        kinds = facts["precisions"]["int8"]["extractor"]["operators"]
        assert kinds["DequantizeLinear"] > kinds["QuantizeLinear"] > 50
        assert facts["precisions"]["int8"]["encoder"]["operators"]["MatMulInteger"] == 2


def test_a_graph_of_another_precision_in_its_place_is_found(three, tmp_path, call):
    """The decoder of fp32 stands for that of int8: the hashes are right, but not what the export found."""
    copy = shutil.copytree(three[0].path, tmp_path / "copy")
    change_file(
        copy,
        "manifest.json",
        lambda record: record["precisions"]["int8"]["decoder"].update(file="decoder.onnx"),
    )
    result = call("verify", copy)
    assert result.exit_code == 8
    assert "verification.json is about another decoder graph in int8 than the one in the bundle" in result.stderr


def test_a_bundle_of_int8_alone_and_one_that_is_refused(
    call, run, graphs, photos, drawn, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(reduced, "multiplies_exactly", lambda: False)  # as where there is no VNNI
    pictures, captions = drawn
    scored = Scored(pictures[:4], {str(i): captions[str(i)] for i in range(4)})
    asked = Reduction(("int8",), pictures[4:8], scored, LOOSE)
    facts = {"name": "drawn", "license": "CC0-1.0"}
    monkeypatch.setattr("caption_export.exporting.build_graphs", lambda run: graphs)
    export_bundle(run, photos[:1], tmp_path / "out", **facts, fp32=False, reduction=lambda size: asked)
    bundle = Bundle.open(tmp_path / "out")
    assert list(bundle.manifest.precisions) == ["int8"]
    assert sorted(name for name in bundle.manifest.files if name.endswith(".onnx")) == [
        *("decoder-int8.onnx", "encoder-int8.onnx", "extractor-int8.onnx")
    ]
    assert Captioner.load(bundle, "cpu").caption(photos[0]).precision == "int8"
    card = bundle.read("README.md").decode()
    assert "Precisions: int8." in card.splitlines()
    assert "the graphs in float32, which are not in this bundle, were run in ONNX Runtime" in card
    assert "does not multiply them exactly, like any x86 without VNNI: for those, export with `--reduce-range`" in card
    assert "this processor does not sum products of 8 bits exactly" in caplog.text
    said = "about these graphs, made of those in float32, not in this bundle, which its export compared with TensorFlow"
    assert said in call("verify", bundle.path).stdout
    strict = replace(asked, limits={"int8": Limits(150.0, 0.0, 10.0)})
    monkeypatch.setattr(reduced, "_KEPT", (0,))
    with pytest.raises(ExportError, match="and 150 dB are asked for"):
        export_bundle(run, photos[:1], tmp_path / "none", **facts, reduction=lambda size: strict)
    assert not (tmp_path / "none").exists()

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from caption_export import exporting
from caption_export.card import where_from
from caption_export.errors import ExportError
from caption_export.exporting import export_bundle, made_with, read_photos, scores_of_checkpoint, searches_with
from caption_export.pipelines import best_captions
from caption_rt import Bundle, BundleError, Captioner, DecodeOptions, EngineError, OptionsError
from caption_rt.image import FORMATS
from caption_train.importing import import_tutorial
from caption_train.runs import open_run

pytestmark = pytest.mark.tf

FACTS = {"name": "drawn", "license": "CC0-1.0"}


@pytest.fixture
def quick(graphs, reference, monkeypatch):
    """Exports of the run take what is converted and traced already."""
    monkeypatch.setattr(exporting, "build_graphs", lambda run: graphs)
    monkeypatch.setattr(exporting, "TensorFlowPipeline", lambda run: reference)


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def exported(run_folder, photos, tmp_path_factory):
    """The bundle that the installed command writes in a process of its own, and what it printed."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "photos").mkdir()
    for photo in photos:
        (folder / "photos" / photo.name).symlink_to(photo)
    (folder / "photos" / "broken.jpg").write_bytes(b"\xff\xd8 no photo")
    (folder / "photos" / "notes.txt").write_text("no photo either")
    command = [sys.executable, "-c", "import sys; from caption_export.cli import main; sys.exit(main())"]
    command += [str(run_folder), str(folder / "out" / "drawn"), "--photos", str(folder / "photos")]
    # Another seed of Python's hashes than this process has: sets are walked in another order.
    environment = os.environ | {"PYTHONHASHSEED": "4711"}
    environment.pop("TF_CPP_MIN_LOG_LEVEL")
    done = subprocess.run([*command, "--license", "CC0-1.0"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "out" / "drawn", done


def test_the_command_says_only_its_own_lines(exported):
    folder, done = exported
    assert done.stderr.splitlines() == [
        f"passed over: {folder.parents[1] / 'photos' / 'broken.jpg'} is not an image, or its beginning is damaged: "
        + ", ".join([*FORMATS, *(["HEIC"] if importlib.util.find_spec("pillow_heif") else [])])
        + " are read",
        "compared on 3 real photos: more of them find more",
        "converting the extractor",
        "converting the encoder",
        "converting the decoder",
        "comparing with TensorFlow on 5 images, the self-test's 2 among them",
    ]
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines[:8]] == [
        ["graph", "output"],
        ["extractor", "grid"],
        ["encoder", "features"],
        ["encoder", "keys"],
        ["encoder", "initial_state"],
        ["decoder", "log_probs"],
        ["decoder", "next_state"],
        ["decoder", "attention"],
    ]
    assert lines[8].startswith("greedy search  log_prob ")
    assert lines[9].startswith("a beam of 3    log_prob ")
    assert lines[9].endswith("words of 5 images are the same")
    assert lines[-1] == str(folder)


def test_the_bundle_captions_as_tensorflow_does(exported, reference, run, photos):
    captioner = Captioner.load(exported[0], device="cpu")
    images = np.stack([photo.pixels for photo in read_photos(photos, 75)])
    for options in (DecodeOptions(max_words=6, guard=False), DecodeOptions(beam_size=2, max_words=6, guard=False)):
        wanted = best_captions(reference, images, options, run.vocabulary)
        found = list(captioner.caption_many(photos, options))
        assert [caption.tokens for caption in found] == [hypothesis.tokens for hypothesis in wanted]
        np.testing.assert_allclose([x.log_prob for x in found], [x.log_prob for x in wanted], atol=1e-4)
        for caption, hypothesis in zip(found, wanted, strict=True):
            np.testing.assert_allclose(caption.attention, hypothesis.attention.reshape(-1, 3, 3), atol=1e-4)


def test_the_self_test_passes_and_can_fail(exported, monkeypatch):
    result = Captioner.load(exported[0], device="cpu").self_test()
    assert (result.photos, result.tolerance) == (2, 1e-3)
    assert result.max_difference < 1e-4
    record = Bundle.open(exported[0]).selftest()
    assert [entry["name"] for entry in record["inputs"]] == ["field", "tiles"]
    assert record["options"] == {"beam_size": 1, "length_penalty": 0.0, "max_words": 6}
    assert record["expected"][0]["token_ids"] != record["expected"][1]["token_ids"]
    record["expected"][0]["log_prob"] += 0.01
    monkeypatch.setattr(Bundle, "selftest", lambda bundle: record)
    with pytest.raises(EngineError, match=r"^the self-test failed: a log-probability of field is 0\.01 off"):
        Captioner.load(exported[0], device="cpu").self_test()


def test_the_manifest_has_the_facts(exported):
    manifest = Bundle.open(exported[0]).manifest
    assert (manifest.name, manifest.license, manifest.recurrence) == ("drawn", "CC0-1.0", "carry")
    assert manifest.description == "Describes a photo in one English sentence; trained on drawn."
    assert (manifest.image.size, manifest.grid.rows, manifest.grid.columns, manifest.grid.channels) == (75, 3, 3, 64)
    assert (manifest.decoding.beam_size, manifest.decoding.length_penalty, manifest.decoding.max_words) == (1, 0.0, 6)
    assert manifest.special_ids == {"pad": 0, "unk": 1, "start": 2, "end": 3}
    assert manifest.training["dataset"]["training_photos"] == 40
    assert manifest.training["checkpoint"] == {"which": "best", "step": 30}
    assert manifest.scores["validation"]["BLEU-4"] == 12.3456
    assert manifest.versions == made_with()
    for package in ("caption-rt", "python", "tensorflow", "keras", "tf2onnx", "onnx", "numpy", "Pillow"):
        assert manifest.versions[package][0].isdigit()
    assert sorted(manifest.files) == [
        *("README.md", "decoder.onnx", "encoder.onnx", "extractor.onnx", "selftest.json", "verification.json"),
        "vocabulary.json",
    ]


def test_the_card_has_data_scores_and_verification(exported):
    card = files_of(exported[0])["README.md"].decode()
    for line in (
        "# drawn",
        "  - training photos: 40",
        "| split | photos | checkpoint | beam size | BLEU-4 | CIDEr |",
        "| validation | 10 | best | 1 | 12.3456 | 0.4321 |",
        "By default greedy search and at most 6 words. `caption-rt --self-test --model FOLDER` checks the bundle.",
        "Licence of the weights: CC0-1.0",
    ):
        assert line in card.splitlines()
    assert "| decoder | log_probs | " in card
    assert "| a beam of 3 | 5 | " in card
    assert "Precisions: fp32." in card.splitlines()
    assert ", on 3 photos and 2 drawn images, 1, 2, 7 at a time" in card
    found = json.loads(Bundle.open(exported[0]).read("verification.json"))
    assert (found["photos"], found["selftest_images"]) == (3, 2)


def test_no_place_of_this_machine_is_in_the_bundle(exported, run_folder):
    for name, data in files_of(exported[0]).items():
        for place in (run_folder, exported[0], Path(__file__).parents[2]):
            assert str(place).encode() not in data, name


def test_two_exports_of_one_checkpoint_give_the_same_bytes(exported, run, photos, tmp_path):
    """Once by the command, once here, where other graphs were converted before."""
    export_bundle(run, photos, tmp_path / "again", **FACTS)
    assert files_of(tmp_path / "again") == files_of(exported[0])


@pytest.mark.usefixtures("quick")
def test_the_bundles_default_search_is_compared_too(run, photos, tmp_path):
    report = export_bundle(run, photos[:1], tmp_path / "out", **FACTS, beam_size=4, length_penalty=0.7).report
    searches = [(search.options.beam_size, search.options.length_penalty) for search in report.searches]
    assert searches == [(1, 0.0), (3, 0.0), (4, 0.7)]
    decoding = Bundle.open(tmp_path / "out").manifest.decoding
    assert (decoding.beam_size, decoding.length_penalty) == (4, 0.7)


def test_a_length_penalty_makes_no_second_greedy_search():
    greedy = DecodeOptions(length_penalty=0.7, max_words=6)
    assert [(x.beam_size, x.length_penalty) for x in searches_with(greedy)] == [(1, 0.0), (3, 0.0)]


@pytest.mark.usefixtures("quick")
def test_a_graph_that_differs_leaves_no_bundle(run, graphs, photos, tmp_path, monkeypatch):
    model = onnx.load_model_from_string(graphs["decoder"].data)
    # The largest is a weight of every word; a small one may do too little to a random model to matter.
    constant = max(model.graph.initializer, key=lambda tensor: numpy_helper.to_array(tensor).size)
    constant.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(constant) * np.float32(1.01), constant.name))
    spoilt = {**graphs, "decoder": replace(graphs["decoder"], data=model.SerializeToString())}
    monkeypatch.setattr(exporting, "build_graphs", lambda run: spoilt)
    with pytest.raises(ExportError, match=r"^the decoder graph: output \w+ differs from TensorFlow"):
        export_bundle(run, photos[:1], tmp_path / "out", **FACTS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_an_existing_bundle_is_kept_unless_told_otherwise(run, photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "build_graphs", lambda run: pytest.fail("converted before looking"))
        with pytest.raises(BundleError, match=r"out exists already: name another folder, or replace it with overwrite"):
            export_bundle(run, photos[:1], out, **FACTS)
        (out / "thesis.txt").write_text("no bundle")
        with pytest.raises(BundleError, match="out is not a bundle, and only a bundle is overwritten"):
            export_bundle(run, photos[:1], out, **FACTS, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    (out / "thesis.txt").unlink()
    export_bundle(run, photos[:1], out, **FACTS, overwrite=True)
    assert Bundle.open(out).manifest.name == "drawn"


def test_a_default_that_the_runtime_would_refuse_is_refused(run, photos, tmp_path):
    with pytest.raises(OptionsError, match=r"^beam_size must be a whole number from 1 to 1000, not 0$"):
        export_bundle(run, photos, tmp_path / "out", **FACTS, beam_size=0)


def test_a_teacher_without_a_pupil_is_refused(run, photos, tmp_path):
    said = r"^teacher_scores belongs to a distilled extractor, and this run's is none: leave it out$"
    with pytest.raises(OptionsError, match=said) as caught:
        export_bundle(run, photos, tmp_path / "out", **FACTS, teacher_scores={"validation": {"CIDEr": 0.5}})
    assert str(caught.value.renamed({"teacher_scores": "--teacher"})).startswith("--teacher belongs")


def test_without_a_readable_photo_there_is_no_export(run, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"")
    with pytest.raises(ExportError, match=r"^no real photo can be read: "):
        export_bundle(run, [broken], tmp_path / "out", **FACTS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("extractor", "said"),
    [
        ({"weights": "none"}, "random weights and was not trained"),
        ({"weights": "imagenet"}, "pretrained weights (imagenet)"),
        (
            {"weights": "student", "distillation": {"teacher": {"weights": "big.npz", "layer": "mixed8"}}},
            "No pretrained weight is in it",
        ),
        ({}, "does not state"),
        (
            {"weights": "student", "learnt_from_captions": "from stage2 on"},
            "learned from captions. The extractor, from stage2 on, then learned from captions as well.",
        ),
    ],
)
def test_the_card_says_where_the_extractor_comes_from(extractor, said):
    assert said in where_from(extractor)


@pytest.mark.usefixtures("quick")
def test_the_card_has_the_teachers_scores_and_its_makers_notes(run, photos, tmp_path):
    distilled = {"layer": "stage3", "weights": "student", "distillation": {"teacher": {"weights": "b", "layer": "m"}}}
    # How captions were decoded is said where it is not how the model usually does.
    scores = {"validation": {**run.scores["validation"], "sample": True, "max_words": run.max_words}}
    described = replace(run, facts={**run.facts, "extractor": distilled}, scores=scores)
    told = {"teacher_scores": {"validation": {"CIDEr": 0.7654}}, "notes": "\n## What it is bad at\n\nCats.\n\n"}
    export_bundle(described, photos[:1], tmp_path / "out", **FACTS, **told)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "(the output of stage3 of a small residual network)" in card
    assert "InceptionV3's topology" not in card
    rows = [line for line in card.splitlines() if line.startswith("| validation")]
    assert [row.split(" | ")[0] for row in rows] == ["| validation", "| validation, the teacher's captioner"]
    assert ["0.4321" in rows[0], "0.7654" in rows[1]] == [True, True]
    assert "| split | photos | checkpoint | beam size | BLEU-4 | CIDEr | sample |" in card.splitlines()
    assert rows[0].endswith(" | 0.4321 | True |")
    assert "Licence of the weights: CC0-1.0\n\n## What it is bad at\n\nCats.\n\n## Made with\n" in card
    # A run without scores of its own has those of the teacher all the same.
    export_bundle(replace(described, scores={}), photos[:1], tmp_path / "out", **FACTS, **told, overwrite=True)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "This checkpoint has not been evaluated.\n\n| split | CIDEr |\n" in card
    assert "| validation, the teacher's captioner | 0.7654 |" in card


def test_scores_of_another_checkpoint_are_left_out(run):
    scores = {"validation": {"checkpoint": "best", "CIDEr": 0.4}, "test": {"checkpoint": "last", "CIDEr": 0.3}}
    assert scores_of_checkpoint(replace(run, scores=scores)) == {"validation": scores["validation"]}
    last = replace(run, scores=scores, facts={**run.facts, "checkpoint": {"which": "last", "step": 1}})
    assert scores_of_checkpoint(last) == {"test": scores["test"]}
    # Evaluated, then trained further: the best checkpoint is another one now.
    steps = {"validation": {"checkpoint": "best", "step": 20}, "test": {"checkpoint": "best", "step": 30}}
    assert scores_of_checkpoint(replace(run, scores=steps)) == {"test": steps["test"]}


def test_what_is_imported_from_the_tutorial_says_nothing_of_a_training(
    run, run_folder, reset_graphs, photos, tmp_path, monkeypatch
):
    """The run's own checkpoint is one of the tutorial's: the names are the same, and it resets the state."""
    ids = {word: row for row, word in enumerate(run.vocabulary.words) if row}
    tokenizer = {"config": {"word_index": json.dumps(ids), "oov_token": "<unk>", "num_words": None}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    import_tutorial(tmp_path / "run", run_folder / "best", tmp_path / "tokenizer.json", str(run_folder), run.max_words)
    monkeypatch.setattr(exporting, "build_graphs", lambda run: reset_graphs)
    export_bundle(open_run(tmp_path / "run"), photos[:1], tmp_path / "out", **FACTS)
    manifest = Bundle.open(tmp_path / "out").manifest
    assert manifest.recurrence == "reset"
    assert manifest.training["imported_from"] == {"checkpoint": "ckpt-30", "tokenizer": "tokenizer.json"}
    assert not manifest.training.keys() & {"training", "evaluation"}
    assert "epochs" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_a_run_that_says_nothing_of_itself_is_exported(reset_run, reset_graphs, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "build_graphs", lambda run: reset_graphs)
    export_bundle(replace(reset_run, facts={}, scores={}), photos[:1], tmp_path / "out", **FACTS)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "The run states nothing about its training." in card
    assert "This checkpoint has not been evaluated." in card
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["training"], manifest["recurrence"]) == ({}, "reset")
    assert Captioner.load(tmp_path / "out", device="cpu").self_test().photos == 2

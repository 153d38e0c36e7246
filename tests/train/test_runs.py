import json
import os
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from caption_rt.errors import BundleError, OptionsError
from caption_rt.image import read_photo
from caption_rt.options import DecodeOptions
from caption_train.datasets import CaptionedImage, Dataset, load_dataset
from caption_train.errors import DatasetError, TrainingError
from caption_train.files import read_json_lines
from caption_train.inception import ExtractorConfig, build_extractor, load_extractor, save_extractor, weights_key
from caption_train.runs import data_choices, evaluate, open_cache, open_run, record_scores, run_settings
from caption_train.settings import load_settings
from caption_train.stages import prepare, start_run, trainer_of
from shapes import shape_photo, write_flickr8k

pytestmark = pytest.mark.tf

CHANGES = (
    *("extractor.weights=none", "extractor.width=0.1", "extractor.size=75", "extractor.layer=mixed0"),
    *("model.embedding_dim=24", "model.units=32", "model.dropout=0", "captions.max_words=12", "captions.min_count=1"),
    *("captions.vocabulary_size=30", "training.batch_size=8", "training.epochs=24", "training.learning_rate=0.02"),
    *("training.label_smoothing=0", "training.attention_penalty=0", "training.patience=0", "training.grouping=random"),
)
MAX_WORDS = 12
CHOICES = {"limit": None, "seed": 0, "validation_share": 0.2}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("data") / "set"
    return load_dataset(write_flickr8k(folder, range(0, 24, 3), (27, 30, 33), captions=["{}"] * 5))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("grids")


@pytest.fixture(scope="module")
def run(dataset: Dataset, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was trained until it knew its eight captions by heart."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    begin(folder, dataset)
    trainer_of(folder, dataset, cache).run()
    return folder


def begin(folder: Path, dataset: Dataset, *changes: str, **options: Any) -> None:
    start_run(folder, dataset, **{"choices": CHOICES, "changes": (*CHANGES, *changes), **options})


def test_a_run_learns_its_captions_and_gives_them_back(run: Path, dataset: Dataset, cache: Path) -> None:
    rows = read_json_lines(run / "history.jsonl")
    assert rows[0]["loss"] > 1.5
    assert rows[-1]["loss"] < 0.1
    counts: list[int] = []
    options = DecodeOptions(max_words=MAX_WORDS)
    found = evaluate(open_run(run, "last"), dataset.train, cache, options, batch_size=3, on_photos=counts.append)
    assert counts == [3, 3, 2]
    assert found.images == dataset.train
    assert found.captions == tuple(shape_photo(int(image.path.stem))[1] for image in dataset.train)
    for hypothesis in found.hypotheses:
        assert hypothesis.ended == "end"
        assert -0.5 < hypothesis.log_prob < sum(hypothesis.log_probs) < 0
        assert hypothesis.attention.shape == (7, 49)
        np.testing.assert_allclose(hypothesis.attention.sum(axis=1), 1, rtol=1e-5)
    assert found.scores["BLEU-4"] == pytest.approx(100)
    assert found.scores["ROUGE-L"] == pytest.approx(100)


def test_what_a_run_folder_holds(run: Path, dataset: Dataset) -> None:
    names = {path.name for path in run.iterdir()}
    assert names == {
        *("run.json", "settings.toml", "extractor.json", "extractor.weights.h5", "vocabulary.json"),
        *("last", "best", "history.jsonl", "steps.jsonl", "tensorboard", "loss.png", "sheets"),
    } | (names & {"scores.json"})
    record = json.loads((run / "run.json").read_text())
    assert record["dataset"] == {
        "name": "flickr8k",
        "training_photos": 8,
        "training_captions": 40,
        "validation_photos": 3,
        **CHOICES,
    }
    assert set(record) == {"dataset", "extractor"}
    assert run_settings(run) == load_settings(changes=CHANGES)
    extractor, config = load_extractor(run)
    assert record["extractor"] == {**asdict(config), "weights": "none", "sha256": weights_key(extractor)}
    assert data_choices(run) == CHOICES


def test_open_run(run: Path) -> None:
    last, best = open_run(run, "last"), open_run(run)
    rows = read_json_lines(run / "history.jsonl")
    assert last.facts["checkpoint"] == {"which": "last", "step": 5 * 24}
    assert best.facts["checkpoint"] == {"which": "best", "step": best_of(rows)["step"]}
    assert best.facts["model"]["units"] == 32
    assert best.facts["training"]["epochs"] == 24
    assert best.facts["extractor"]["weights"] == "none"
    assert best.max_words == 12
    assert best.extractor_config == ExtractorConfig(0.1, 75, "mixed0")
    assert best.vocabulary.words[:6] == ("<pad>", "<unk>", "<start>", "<end>", "a", "circle")


def best_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return max(rows, key=lambda row: (row["CIDEr"], -row["val_loss"]))


def test_a_beam_finds_what_is_at_least_as_likely(run: Path, dataset: Dataset, cache: Path) -> None:
    trained = open_run(run)
    greedy, beam = (
        evaluate(trained, dataset.validation, cache, DecodeOptions(beam_size=size, max_words=12)) for size in (1, 4)
    )
    for one, other in zip(greedy.hypotheses, beam.hypotheses, strict=True):
        assert other.log_prob >= one.log_prob - 1e-5


def test_scores_are_written_for_the_runs_own_data(run: Path, dataset: Dataset, cache: Path) -> None:
    options = DecodeOptions(max_words=12)
    trained = open_run(run, "last")
    for split in ("train", "validation"):
        found = evaluate(trained, getattr(dataset, split), cache, options)
        assert record_scores(trained, dataset, split, found, options)
    scores = open_run(run).scores
    assert scores["train"] == {
        "photos": 8,
        "checkpoint": "last",
        "step": 120,
        "beam_size": 1,
        "length_penalty": 0.0,
        "sample": False,
        "max_words": 12,
        **{name: pytest.approx(value, abs=1e-4) for name, value in evaluate_scores(trained, dataset, cache).items()},
    }
    assert scores["validation"]["photos"] == 3
    other = replace(dataset, train=dataset.train[:7])
    assert not record_scores(trained, other, "train", found, options)
    assert open_run(run).scores == scores


def evaluate_scores(trained: Any, dataset: Dataset, cache: Path) -> dict[str, float]:
    return dict(evaluate(trained, dataset.train, cache, DecodeOptions(max_words=12)).scores)


def test_photos_that_cannot_be_read_are_left_out(run: Path, dataset: Dataset, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no photo")
    bad = [CaptionedImage(tmp_path / name, ("a red square",)) for name in ("text.jpg", "gone.jpg")]
    trained, options = open_run(run), DecodeOptions()
    found = evaluate(trained, [bad[0], *dataset.train[:2], bad[1]], cache, options)
    assert found.images == dataset.train[:2]
    assert len(found.captions) == len(found.hypotheses) == 2
    with pytest.raises(DatasetError, match="none of the 2 photos can be read"):
        evaluate(trained, bad, cache, options)


def test_going_on_changes_nothing_in_the_folder(run: Path, dataset: Dataset) -> None:
    names = ("run.json", "settings.toml", "extractor.json", "extractor.weights.h5")
    before = {name: (run / name).read_bytes() for name in names}
    begin(run, dataset)
    start_run(run, dataset, choices=CHOICES)  # not asked for again: as it was
    assert {name: (run / name).read_bytes() for name in before} == before


@pytest.mark.parametrize(
    ("change", "options", "sentence"),
    [
        ("training.epochs=25", {}, "other settings: training.epochs was 24 and is now 25; give the same ones to go on"),
        ("extractor.width=0.5", {}, r"extractor.width was 0\.1 and is now 0\.5"),
        ("extractor.weights=imagenet", {}, "extractor.weights was 'none' and is now 'imagenet'"),
        ("training.epochs=24", {"config": "tutorial", "changes": ()}, "embedding_dim was 24 and is now 256"),
        (
            "training.epochs=24",
            {"choices": CHOICES | {"seed": 1}},
            "another dataset: seed was 0 and is now 1; give the",
        ),
        ("training.epochs=24", {"start_from": Path("other")}, "another start_from: run was None and is now 'other'"),
    ],
)
def test_going_on_with_other_settings(
    run: Path, dataset: Dataset, change: str, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(TrainingError, match=sentence):
        begin(run, dataset, change, **options)


def test_going_on_with_other_data(run: Path, dataset: Dataset) -> None:
    with pytest.raises(TrainingError, match="another dataset: training_photos was 8 and is now 7"):
        begin(run, replace(dataset, train=dataset.train[1:]))


def test_a_kill_before_run_json_and_a_folder_that_lost_it(run: Path, dataset: Dataset, tmp_path: Path) -> None:
    begin(tmp_path / "new", dataset)
    weights = weights_key(load_extractor(tmp_path / "new")[0])
    (tmp_path / "new" / "run.json").unlink()
    begin(tmp_path / "new", dataset)
    assert weights_key(load_extractor(tmp_path / "new")[0]) == weights
    shutil.copytree(run, tmp_path / "lost")
    (tmp_path / "lost" / "run.json").unlink()
    with pytest.raises(TrainingError, match=r"lost has history\.jsonl but no run\.json: .*take another"):
        begin(tmp_path / "lost", dataset)
    # Of a bundle, say.
    (tmp_path / "other").mkdir()
    shutil.copy(run / "vocabulary.json", tmp_path / "other")
    for options in ({}, {"changes": (), "start_from": run}):
        with pytest.raises(TrainingError, match=r"other has vocabulary\.json but no run\.json: .*take another"):
            begin(tmp_path / "other", dataset, **options)


def test_a_folder_of_weights_brings_its_own_extractor(dataset: Dataset, tmp_path: Path) -> None:
    config = ExtractorConfig(0.2, 80, "mixed0")
    extractor = build_extractor(config)
    save_extractor(extractor, config, tmp_path / "student")
    (tmp_path / "student" / "distillation.json").write_text('{"distillation": {"photos": 7}}')
    (tmp_path / "link").symlink_to("student")
    student = str(tmp_path / "link") + "/"
    changes = (f"extractor.weights={student}", "extractor.size=80")  # the others are as they are there
    start_run(tmp_path / "run", dataset, choices=CHOICES, changes=changes)
    assert weights_key(load_extractor(tmp_path / "run")[0]) == weights_key(extractor)
    record = json.loads((tmp_path / "run" / "run.json").read_text())["extractor"]
    assert record == {
        "width": 0.2,
        "size": 80,
        "layer": "mixed0",
        "weights": "link",
        "sha256": weights_key(extractor),
        "distillation": {"photos": 7},
    }
    with pytest.raises(OptionsError, match=r"the extractor in .*link has size 80, not 75"):
        start_run(tmp_path / "other", dataset, choices=CHOICES, changes=(changes[0], "extractor.size=75"))
    assert not (tmp_path / "other").exists()
    shutil.rmtree(tmp_path / "student")  # the run has its own copy
    start_run(tmp_path / "run", dataset, choices=CHOICES, changes=changes, config="default")
    assert run_settings(tmp_path / "run").extractor.layer == "mixed0"


def test_a_folder_called_none_is_not_meant(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "none").mkdir()
    monkeypatch.chdir(tmp_path)
    begin(tmp_path / "run", dataset)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["extractor"]["weights"] == "none"


def test_prepare(run: Path, dataset: Dataset, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grids are the extractor's, in float16; nothing is computed twice, and the vocabulary is read back."""
    train, validation, vocabulary, source = prepare(run, dataset, cache)
    assert (len(train), len(validation)) == (40, 15)
    extractor, _ = load_extractor(run)
    photo = read_photo(dataset.train[5].path, 75)
    grid = extractor(photo[np.newaxis].astype(np.float32), training=False).numpy().reshape(49, -1)
    loaded = source.load(train.rows[5:6])
    assert loaded.dtype == np.float16
    assert loaded[0].shape == source.grid_shape == source.loaded_shape == grid.shape
    np.testing.assert_allclose(loaded[0], grid, rtol=2e-3, atol=1e-4)
    assert grid.std() > 0.01
    assert vocabulary.decode(validation.captions[0]) == shape_photo(27)[1]

    def fail(*arguments: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("caption_train.runs.extract_with", lambda model: fail)
    monkeypatch.setattr("caption_train.stages.Vocabulary.build", fail)
    assert prepare(run, dataset, cache).vocabulary == vocabulary


def test_caches_of_other_extractors_are_apart(run: Path, cache: Path) -> None:
    extractor, config = load_extractor(run)
    here = open_cache(cache, extractor, config).folder
    assert open_cache(cache, load_extractor(run)[0], config).folder == here
    assert open_cache(cache, extractor, replace(config, size=76)).folder != here
    kernel, *_ = extractor.get_layer("conv_3").get_weights()
    extractor.get_layer("conv_3").set_weights([kernel * 1.001])
    assert open_cache(cache, extractor, config).folder != here


def test_a_validation_part_that_cannot_be_read(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no photo")
    bad = replace(dataset, validation=(CaptionedImage(tmp_path / "text.jpg", ("a red square",)),))
    begin(tmp_path / "run", bad)
    with pytest.raises(DatasetError, match="none of the 1 photos has a grid: nothing to train or validate on"):
        prepare(tmp_path / "run", bad, tmp_path / "cache")


def test_folders_that_are_no_run(run: Path, dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"is no run folder: it has no run\.json"):
        open_run(tmp_path)
    with pytest.raises(TrainingError, match=r"is no run folder: it has no run\.json"):
        data_choices(tmp_path)
    begin(tmp_path / "new", dataset)
    with pytest.raises(TrainingError, match="has no checkpoint in best/ yet: train it first"):
        open_run(tmp_path / "new")
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    (folder / "vocabulary.json").write_text('{"words": []}')
    with pytest.raises(BundleError, match="vocabulary"):
        open_run(folder)
    settings = (folder / "settings.toml").read_text()
    for content, sentence in (
        ("epochs", r"not written by this version: .*settings\.toml is not TOML: "),
        (settings.replace("epochs = ", "epoch = "), r"'training\.epoch'; did you mean training\.epochs\?"),
        (settings.replace("epochs = ", "# "), r"settings\.toml has no training\.epochs"),
        (settings.replace("epochs = 24", "epochs = 0"), r"training\.epochs must be at least 1, not 0"),
    ):
        (folder / "settings.toml").write_text(content)
        with pytest.raises(TrainingError, match=sentence):
            open_run(folder)
    (folder / "settings.toml").write_text(settings)
    for content, sentence in (("[]", r"run\.json cannot be read: it is not a JSON object"), ("{", "cannot be read: ")):
        (folder / "run.json").write_text(content)
        with pytest.raises(TrainingError, match=sentence):
            open_run(folder)
    (folder / "run.json").write_text("{}")
    with pytest.raises(TrainingError, match=r"run\.json was not written by this version: it has no 'dataset'"):
        data_choices(folder)


def test_a_checkpoint_of_other_sizes(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    settings = (folder / "settings.toml").read_text()
    (folder / "settings.toml").write_text(settings.replace("units = 32", "units = 33"))
    with pytest.raises(TrainingError, match=r"the checkpoint .* is of another model: ") as caught:
        open_run(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C comes otherwise on Windows")
def test_a_start_from_another_run_that_was_stopped_goes_on(
    run: Path, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "second"
    with monkeypatch.context() as patch:
        patch.setattr("caption_train.stages.write_text", lambda path, text: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            start_run(folder, dataset, choices=CHOICES, start_from=run)
    assert (folder / "vocabulary.json").exists()
    assert not (folder / "settings.toml").exists()
    # Begun otherwise, it would have the other run's weights and words.
    with pytest.raises(TrainingError, match=r"second has start but no run\.json: .*take another"):
        begin(folder, dataset)
    (folder / "vocabulary.json").write_text("{}")
    start_run(folder, dataset, choices=CHOICES, start_from=run)
    assert json.loads((folder / "vocabulary.json").read_text()) == json.loads((run / "vocabulary.json").read_text())
    assert json.loads((folder / "run.json").read_text())["start_from"]["run"] == "run"


def test_a_run_starts_from_another_one(run: Path, dataset: Dataset, cache: Path, tmp_path: Path) -> None:
    first = tmp_path / "first[1]"  # patterns that do not match themselves
    shutil.copytree(run, first)
    folder = tmp_path / "second[2]"
    changes = ("training.epochs=2", "training.learning_rate=0.001", "model.dropout=0.1")
    start_run(folder, dataset, choices=CHOICES, changes=changes, start_from=first)
    expected, before = load_settings(changes=[*CHANGES, *changes]), open_run(first)
    assert run_settings(folder) == expected
    record = json.loads((folder / "run.json").read_text())
    step = before.facts["checkpoint"]["step"]
    differed = {"model.dropout": 0.0, "training.epochs": 24, "training.learning_rate": 0.02}
    assert record["start_from"] == {"run": "first[1]", "step": step, "settings": differed}
    assert record["extractor"] == before.facts["extractor"]
    shutil.rmtree(first)  # the run has its own copy
    trainer = trainer_of(folder, dataset, cache)
    assert int(trainer.step) == 0
    for mine, theirs in zip(trainer.model.get_weights(), before.model.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    (row, _) = trainer.run()
    assert row["loss"] < 0.6  # it knows already what it has learnt
    assert open_run(folder).vocabulary == before.vocabulary
    again = tmp_path / "third"
    start_run(again, dataset, choices=CHOICES, config="paper", start_from=folder)
    # What a shipped file says of the model and of the words is not asked for, the second time either.
    assert start_run(again, dataset, choices=CHOICES, config="paper", start_from=folder) == run_settings(again)
    with pytest.raises(TrainingError, match=r"other settings: model\.units was 32 and is now 9"):
        start_run(again, dataset, choices=CHOICES, config="paper", changes=("model.units=9",))
    assert run_settings(again).training == load_settings("paper").training
    assert run_settings(again).model == replace(expected.model, dropout=0.5)
    assert json.loads((again / "run.json").read_text())["start_from"]["start_from"] == record["start_from"]
    with pytest.raises(
        OptionsError, match=r"model\.units is 32 in .*second\[2\], so it is in a run that starts from there: not"
    ):
        start_run(tmp_path / "no", dataset, choices=CHOICES, changes=("model.units=9",), start_from=folder)

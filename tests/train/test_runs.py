import json
import shutil
from collections.abc import Callable
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
from caption_train.runs import (
    data_choices,
    evaluate,
    open_cache,
    open_run,
    prepare,
    record_scores,
    start_run,
    trainer_of,
)
from caption_train.training import TrainConfig
from shapes import shape_photo, write_flickr8k

pytestmark = pytest.mark.tf

CONFIG = TrainConfig(
    embedding_dim=24,
    units=32,
    dropout=0.0,
    vocabulary=30,
    max_words=12,
    batch_size=8,
    epochs=24,
    learning_rate=0.02,
)
TINY = {"width": 0.1, "size": 75, "layer": "mixed0"}
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
    start_run(folder, dataset, CONFIG, "none", extractor_options=TINY, choices=CHOICES)
    trainer_of(folder, dataset, cache).run()
    return folder


def begin(folder: Path, dataset: Dataset, config: TrainConfig = CONFIG, weights: str = "none", **changes: Any) -> None:
    start_run(folder, dataset, config, weights, extractor_options=TINY | changes, choices=CHOICES)


def test_a_run_learns_its_captions_and_gives_them_back(run: Path, dataset: Dataset, cache: Path) -> None:
    rows = read_json_lines(run / "history.jsonl")
    assert rows[0]["loss"] > 1.5
    assert rows[-1]["loss"] < 0.1
    counts: list[int] = []
    options = DecodeOptions(max_words=CONFIG.max_words)
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
        *("run.json", "extractor.json", "extractor.weights.h5", "vocabulary.json"),
        *("last", "best", "history.jsonl", "loss.png"),
    } | (names & {"scores.json"})
    record = json.loads((run / "run.json").read_text())
    assert record["dataset"] == {
        "name": "flickr8k",
        "training_photos": 8,
        "training_captions": 40,
        "validation_photos": 3,
        **CHOICES,
    }
    assert record["training"] == asdict(CONFIG)
    extractor, config = load_extractor(run)
    assert record["extractor"] == {**asdict(config), "weights": "none", "sha256": weights_key(extractor)}
    assert data_choices(run) == CHOICES


def test_open_run(run: Path) -> None:
    last, best = open_run(run, "last"), open_run(run)
    rows = read_json_lines(run / "history.jsonl")
    assert last.facts["checkpoint"] == {"which": "last", "step": 5 * 24}
    assert best.facts["checkpoint"] == {"which": "best", "step": min(rows, key=lambda row: row["val_loss"])["step"]}
    assert best.facts["training"]["units"] == 32
    assert best.max_words == 12
    assert best.extractor_config == ExtractorConfig(**TINY)
    assert best.vocabulary.words[:6] == ("<pad>", "<unk>", "<start>", "<end>", "a", "circle")


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
    before = {name: (run / name).read_bytes() for name in ("run.json", "extractor.json", "extractor.weights.h5")}
    begin(run, dataset)
    start_run(run, dataset, CONFIG, "none", extractor_options={}, choices=CHOICES)  # not asked for again: as it was
    assert {name: (run / name).read_bytes() for name in before} == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda run, data: begin(run, data, replace(CONFIG, epochs=25)),
            "another training: epochs was 24 and is now 25",
        ),
        (lambda run, data: begin(run, data, width=0.5), r"another extractor: width was 0\.1 and is now 0\.5"),
        (lambda run, data: begin(run, data, weights="imagenet"), "extractor: weights was 'none' and is now 'imagenet'"),
        (
            lambda run, data: begin(run, replace(data, train=data.train[1:])),
            "another dataset: training_photos was 8 and is now 7",
        ),
        (
            lambda run, data: start_run(run, data, CONFIG, "none", extractor_options={}, choices=CHOICES | {"seed": 1}),
            "another dataset: seed was 0 and is now 1; give the same options to go on, or another folder to begin anew",
        ),
    ],
)
def test_going_on_with_other_options(
    run: Path, dataset: Dataset, change: Callable[[Path, Dataset], None], sentence: str
) -> None:
    with pytest.raises(TrainingError, match=sentence):
        change(run, dataset)


def test_a_kill_before_run_json_and_a_folder_that_lost_it(run: Path, dataset: Dataset, tmp_path: Path) -> None:
    begin(tmp_path / "new", dataset)
    weights = weights_key(load_extractor(tmp_path / "new")[0])
    (tmp_path / "new" / "run.json").unlink()
    begin(tmp_path / "new", dataset)
    assert weights_key(load_extractor(tmp_path / "new")[0]) == weights
    shutil.copytree(run, tmp_path / "lost")
    (tmp_path / "lost" / "run.json").unlink()
    with pytest.raises(TrainingError, match=r"lost has vocabulary\.json but no run\.json: .*take another"):
        begin(tmp_path / "lost", dataset)


def test_a_folder_of_weights_brings_its_own_extractor(dataset: Dataset, tmp_path: Path) -> None:
    config = ExtractorConfig(0.2, 80, "mixed0")
    extractor = build_extractor(config)
    save_extractor(extractor, config, tmp_path / "student")
    (tmp_path / "student" / "distillation.json").write_text('{"distillation": {"photos": 7}}')
    student = str(tmp_path / "student") + "/"
    start_run(tmp_path / "run", dataset, CONFIG, student, extractor_options={"size": 80}, choices=CHOICES)
    assert weights_key(load_extractor(tmp_path / "run")[0]) == weights_key(extractor)
    record = json.loads((tmp_path / "run" / "run.json").read_text())["extractor"]
    assert record == {
        "width": 0.2,
        "size": 80,
        "layer": "mixed0",
        "weights": "student",
        "sha256": weights_key(extractor),
        "distillation": {"photos": 7},
    }
    with pytest.raises(OptionsError, match=r"the extractor in .*student has size 80, not 75"):
        start_run(tmp_path / "other", dataset, CONFIG, student, extractor_options={"size": 75}, choices=CHOICES)
    assert not (tmp_path / "other").exists()
    shutil.rmtree(tmp_path / "student")  # the run has its own copy
    start_run(tmp_path / "run", dataset, CONFIG, student, extractor_options={}, choices=CHOICES)


def test_a_folder_called_none_is_not_meant(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "none").mkdir()
    monkeypatch.chdir(tmp_path)
    begin(tmp_path / "run", dataset)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["extractor"]["weights"] == "none"


def test_prepare(run: Path, dataset: Dataset, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grids are the extractor's, in float16; nothing is computed twice, and the vocabulary is read back."""
    train, validation, vocabulary = prepare(run, dataset, cache)
    assert (len(train), len(validation)) == (40, 15)
    extractor, _ = load_extractor(run)
    photo = read_photo(dataset.train[5].path, 75)
    grid = extractor(photo[np.newaxis].astype(np.float32), training=False).numpy().reshape(49, -1)
    np.testing.assert_allclose(train.cache.gather(train.rows[25:26])[0], grid, rtol=2e-3, atol=1e-4)
    assert train.cache.gather(train.rows[:1]).dtype == np.float16
    assert grid.std() > 0.01
    assert vocabulary.decode(validation.tokens[0].tolist()) == shape_photo(27)[1]

    def fail(*arguments: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("caption_train.runs.extract_with", lambda model: fail)
    monkeypatch.setattr("caption_train.runs.Vocabulary.build", fail)
    assert prepare(run, dataset, cache)[2] == vocabulary


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
    record = json.loads((folder / "run.json").read_text())
    for content, sentence in (
        ("[]", r"run\.json cannot be read: it is not a JSON object"),
        ("{", r"run\.json cannot be read: "),
        ("{}", r"run\.json was not written by this version: it has no 'training'"),
        (json.dumps(record | {"training": {"breadth": 1}}), r"run\.json was not written by this version: .*breadth"),
        (json.dumps(record | {"training": {"epochs": 0}}), r"not written by this version: .*epochs must be at least 1"),
    ):
        (folder / "run.json").write_text(content)
        with pytest.raises(TrainingError, match=sentence):
            open_run(folder)


def test_a_checkpoint_of_other_sizes(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    record = json.loads((folder / "run.json").read_text())
    record["training"]["units"] = 33
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(TrainingError, match=r"the checkpoint .* is of another model: ") as caught:
        open_run(folder)
    assert "\n" not in str(caught.value)

"""Runs that start from another one: fine-tuning of the extractor, then self-critical training."""

import os
import runpy
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from caption_rt.errors import OptionsError
from caption_rt.options import DecodeOptions
from caption_train.datasets import Dataset, load_dataset
from caption_train.files import read_json_lines
from caption_train.inception import convolutions_below, load_extractor, weights_key
from caption_train.runs import evaluate, open_run
from caption_train.stages import start_run, trainer_of
from caption_train.training import Trainer
from shapes import write_flickr8k

pytestmark = pytest.mark.tf

KEEP = Path(__file__).parents[2] / "models" / "keep.py"
CHOICES = {"limit": None, "seed": 0, "validation_share": 0.2}
BASE = (
    *("extractor.weights=none", "extractor.width=0.1", "extractor.size=75", "extractor.layer=mixed1"),
    *("model.embedding_dim=12", "model.units=16", "captions.max_words=12", "captions.min_count=1"),
    *("training.batch_size=8", "training.epochs=2", "training.learning_rate=0.02", "training.precision=float32"),
)
TUNED = (
    *("extractor.trainable_from=mixed1", "extractor.learning_rate=0.002"),
    *("training.learning_rate=0.002", "training.epochs=2", "training.checkpoint_steps=2"),
)
CRITICAL = (
    *("training.objective=self_critical", "training.learning_rate=0.01", "extractor.trainable_from=none"),
    "training.baseline=greedy",
    *("training.epochs=2", "training.checkpoint_steps=2", "training.batch_size=16"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("second")


def make_dataset(place: Path) -> Dataset:
    folder = place / "set"
    if not folder.exists():
        write_flickr8k(folder, range(0, 24, 3), (27, 30, 33), captions=["{}"] * 5)
    return load_dataset(folder)


@pytest.fixture(scope="module")
def dataset(place: Path) -> Dataset:
    return make_dataset(place)


def stage(place: Path, folder: Path, changes: tuple[str, ...], start_from: Path | None = None) -> Trainer:
    dataset = make_dataset(place)
    start_run(folder, dataset, choices=CHOICES, changes=changes, start_from=start_from)
    return trainer_of(folder, dataset, place / "grids")


@pytest.fixture(scope="module")
def base(place: Path, dataset: Dataset) -> Path:
    stage(place, place / "base", BASE).run()
    return place / "base"


@pytest.fixture(scope="module")
def tuned(place: Path, base: Path) -> Path:
    stage(place, place / "tuned", TUNED, base).run()
    return place / "tuned"


@pytest.fixture(scope="module")
def critical(place: Path, tuned: Path) -> Path:
    stage(place, place / "critical", CRITICAL, tuned).run()
    return place / "critical"


def losses(folder: Path) -> list[float]:
    return [row["objective"] for row in read_json_lines(folder / "steps.jsonl")]


def upper_differs(one: keras.Model, other: keras.Model, block: str) -> bool:
    """Whether kernels and offsets from a block on differ; below it, and all statistics, must be equal."""
    first, differ = convolutions_below(block), set()
    for mine, theirs in zip(one.weights, other.weights, strict=True):
        layer, name = mine.path.split("/")
        if int(layer.rpartition("_")[2]) >= first and name in ("kernel", "beta"):
            differ.add(not np.array_equal(mine, theirs))
        else:
            np.testing.assert_array_equal(mine, theirs, err_msg=mine.path)
    assert len(differ) == 1
    return differ.pop()


def test_the_extractor_learns_and_every_checkpoint_has_its_own(
    base: Path, tuned: Path, place: Path, dataset: Dataset
) -> None:
    begun, best, last = open_run(base), open_run(tuned), open_run(tuned, "last")
    assert upper_differs(begun.extractor, last.extractor, "mixed1")
    assert upper_differs(begun.extractor, best.extractor, "mixed1")
    # What other runs may start with, and what evaluation and export read.
    assert weights_key(load_extractor(tuned)[0]) == weights_key(best.extractor)
    rows = read_json_lines(tuned / "history.jsonl")
    scored = next(row for row in rows if row["step"] == best.facts["checkpoint"]["step"])
    found = evaluate(best, dataset.validation, place / "own", DecodeOptions(max_words=12, guard=False))
    assert found.scores["CIDEr"] == pytest.approx(scored["CIDEr"], abs=1e-3)
    assert found.scores["BLEU-1"] == pytest.approx(scored["BLEU-1"], abs=0.1)


def test_the_loss_falls(base: Path, tuned: Path) -> None:
    before, after = (read_json_lines(folder / "history.jsonl")[-1] for folder in (base, tuned))
    assert after["loss"] < before["loss"]


# Loaded in another process, which dies after the third of ten steps of an epoch.
CHILD = """
    import os, signal, sys
    from pathlib import Path
    sys.path[:0] = sys.argv[1].split(os.pathsep)
    import test_second_stages as test

    def on_step(step, loss):
        if step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    place, base, folder = map(Path, sys.argv[2:])
    test.stage(place, folder, test.TUNED, base).run(on_step)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="SIGKILL is of Unix")
def test_a_killed_fine_tuning_goes_on_as_if_nothing_had_been(
    place: Path, base: Path, tuned: Path, tmp_path: Path
) -> None:
    here = Path(__file__).resolve().parent
    arguments = [os.pathsep.join(map(str, (here, here.parent, *sys.path))), place, base, tmp_path / "run"]
    command = [sys.executable, "-c", textwrap.dedent(CHILD), *map(str, arguments)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    trainer = stage(place, tmp_path / "run", (), None)
    assert int(trainer.step) == 2
    trainer.run()
    assert losses(tmp_path / "run") == losses(tuned)
    mine, theirs = open_run(tmp_path / "run", "last"), open_run(tuned, "last")
    assert weights_key(mine.extractor) == weights_key(theirs.extractor)
    assert weights_key(load_extractor(tmp_path / "run")[0]) == weights_key(load_extractor(tuned)[0])


@pytest.mark.slow
def test_killed_before_the_best_extractor_was_written(place: Path, base: Path, tuned: Path, tmp_path: Path) -> None:
    """It is the last thing that an epoch writes; called again, the run writes it."""

    class Stop(Exception):
        pass

    def stop(*arguments: object) -> None:
        raise Stop

    trainer = stage(place, tmp_path / "run", TUNED, base)
    trainer.source.save = stop  # type: ignore[method-assign]
    with pytest.raises(Stop):
        trainer.run()
    assert weights_key(load_extractor(tmp_path / "run")[0]) == weights_key(load_extractor(base)[0])
    again = stage(place, tmp_path / "run", ())
    assert int(again.step) == again.steps_an_epoch
    again.run()
    assert losses(tmp_path / "run") == losses(tuned)
    assert weights_key(load_extractor(tmp_path / "run")[0]) == weights_key(load_extractor(tuned)[0])


def test_self_critical_training(tuned: Path, critical: Path) -> None:
    rows = read_json_lines(critical / "steps.jsonl")
    assert len(rows) == 6
    for row in rows:
        assert {"reward", "greedy_reward", "objective", "loss"} <= set(row)
        assert 0 <= row["reward"] <= 10
    assert len({row["reward"] for row in rows}) > 1
    assert read_json_lines(critical / "history.jsonl")[0]["val_loss"] < 20  # words that are never drawn count there
    # The extractor is the fine-tuned one, and stays as it is.
    assert weights_key(open_run(critical).extractor) == weights_key(open_run(tuned).extractor)


def test_what_is_known_of_a_run_goes_back_to_the_first_stage(base: Path, tuned: Path, critical: Path) -> None:
    """A bundle of the last stage states its extractor as it is, and how every stage was trained."""
    facts = open_run(critical).facts
    assert facts["extractor"]["sha256"] == weights_key(load_extractor(critical)[0])
    assert facts["extractor"]["sha256"] != open_run(base).facts["extractor"]["sha256"]
    assert facts["extractor"]["learnt_from_captions"] == "from mixed1 on"
    assert "learnt_from_captions" not in open_run(base).facts["extractor"]
    before = facts["start_from"]
    assert (before["run"], before["step"]) == ("tuned", open_run(tuned).facts["checkpoint"]["step"])
    assert before["settings"]["training.objective"] == "cross_entropy"
    assert before["settings"]["extractor.trainable_from"] == "mixed1"
    assert before["start_from"]["run"] == "base"
    assert before["start_from"]["settings"]["training.learning_rate"] == 0.02
    assert "training.seed" not in before["settings"]


@pytest.mark.slow
def test_a_stopped_self_critical_training_goes_on_as_if_nothing_had_been(
    place: Path, tuned: Path, critical: Path, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def on_step(step: int, loss: float) -> None:
        if step == 3:
            raise Stop

    with pytest.raises(Stop):
        stage(place, tmp_path / "run", CRITICAL, tuned).run(on_step)
    trainer = stage(place, tmp_path / "run", ())
    assert int(trainer.step) == 2
    trainer.run()
    assert losses(tmp_path / "run") == losses(critical)
    mine, theirs = (read_json_lines(folder / "steps.jsonl") for folder in (tmp_path / "run", critical))
    assert [row["reward"] for row in mine] == [row["reward"] for row in theirs]


@pytest.mark.slow
def test_what_is_kept_of_a_run_is_opened_like_it(tuned: Path, critical: Path, tmp_path: Path) -> None:
    """models/keep.py: what is committed of the default model's run."""
    for run in (tuned, critical):
        out = tmp_path / run.name
        command = [sys.executable, KEEP, run, out]
        subprocess.run(list(map(str, command)), check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
        mine, theirs = open_run(out), open_run(run)
        assert mine.facts == theirs.facts
        assert mine.vocabulary == theirs.vocabulary
        assert weights_key(mine.extractor) == weights_key(theirs.extractor)
        for weight, wanted in zip(mine.model.get_weights(), theirs.model.get_weights(), strict=True):
            np.testing.assert_array_equal(weight, wanted)
        # The extractor is in a file of its own, with what was learnt; the optimisers have two numbers a weight.
        kept = {name.partition("/")[0] for name, _ in tf.train.list_variables(str(out / "best"))}
        assert kept == {"_CHECKPOINTABLE_OBJECT_GRAPH", "encoder", "decoder", "step", "save_counter"}
        # Once more, and nothing is left of the copy before.
        (out / "older.txt").write_text("left over")
    subprocess.run(list(map(str, command)), check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert not (out / "older.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([tuned.name, critical.name])


@pytest.mark.slow
def test_what_the_extractor_learnt_comes_from_the_checkpoint_until_training_ends(
    tuned: Path, base: Path, tmp_path: Path
) -> None:
    begun = shutil.copytree(tuned, tmp_path / "begun")
    shutil.copy(base / "extractor.weights.h5", begun)
    found, wanted, first = (weights_key(open_run(folder).extractor) for folder in (begun, tuned, base))
    assert found == wanted
    assert found != first


@pytest.mark.parametrize(
    ("out", "reason"),
    [
        ("run", "lie in one another"),
        ("run/kept", "lie in one another"),
        (".", "lie in one another"),
        ("photos", "is there and is no run"),
        ("photos/a.jpg", "is there and is no run"),
        ("other", "is a run that can go on"),
    ],
)
def test_nothing_but_an_earlier_copy_is_replaced_by_what_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str, reason: str
) -> None:
    for name in ("run/run.json", "run/best/ckpt-1.index", "photos/a.jpg", "other/run.json", "other/last/checkpoint"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    before = sorted(tmp_path.rglob("*"))
    main = runpy.run_path(str(KEEP))["main"]
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "run"), str(tmp_path / out)])
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("block", ["mixed2", "mixed0", "conv_1"])
def test_blocks_that_cannot_learn(place: Path, base: Path, dataset: Dataset, tmp_path: Path, block: str) -> None:
    for changes, start in ((BASE, None), ((), base)):
        asked = (*changes, f"extractor.trainable_from={block}")
        with pytest.raises(OptionsError, match=f"trainable_from (must be one of|{block} comes after mixed1)"):
            start_run(tmp_path / "run", dataset, choices=CHOICES, changes=asked, start_from=start)
    assert not (tmp_path / "run").exists()

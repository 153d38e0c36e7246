import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from caption_train.batches import tutorial_loss
from caption_train.checkpoints import Checkpoints, latest_checkpoint
from caption_train.errors import TrainingError
from caption_train.files import read_json_lines
from caption_train.schedules import WarmupCosine, learning_rate
from caption_train.training import Trainer, _mean
from tiny_training import Made, tiny_data, tiny_settings, tiny_trainer

pytestmark = pytest.mark.tf

STEPS = 15  # 3 epochs of 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def unbroken(data: Made, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    trainer = tiny_trainer(data, tmp_path_factory.mktemp("unbroken"))
    trainer.run()
    return trainer


def history(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_json_lines(folder / "history.jsonl")]


def steps(folder: Path) -> list[dict[str, Any]]:
    rows = read_json_lines(folder / "steps.jsonl")
    return [{k: v for k, v in row.items() if k != "captions_per_second"} for row in rows]


def assert_same_run(mine: Trainer, other: Trainer) -> None:
    """The same numbers at every step and every epoch, and the same weights: to the last bit."""
    assert [row["step"] for row in steps(mine.folder)] == list(range(1, STEPS + 1))
    assert steps(mine.folder) == steps(other.folder)
    assert history(mine.folder) == history(other.folder)
    for here, there in zip(mine.model.weights, other.model.weights, strict=True):
        np.testing.assert_array_equal(here, there, err_msg=here.path)


def test_the_same_seed_gives_the_same_run_and_another_one_does_not(
    data: Made, unbroken: Trainer, tmp_path: Path
) -> None:
    again = tiny_trainer(data, tmp_path / "again")
    again.run()
    assert_same_run(again, unbroken)
    first, other = (tiny_trainer(data, tmp_path / str(seed), f"training.seed={seed}") for seed in (0, 1))
    assert np.abs(first.model.decoder.fc1.kernel.numpy() - other.model.decoder.fc1.kernel.numpy()).max() > 0.1


def test_history(data: Made, unbroken: Trainer) -> None:
    rows = history(unbroken.folder)
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 5), (2, 10), (3, 15)]
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    total, words = unbroken.validation.loss()
    assert words == data.validation.words
    assert rows[-1]["val_loss"] == pytest.approx(total / words, rel=1e-6)
    assert rows[-1]["val_tutorial_loss"] == pytest.approx(tutorial_loss(total, data.validation), rel=1e-6)
    for row in rows:
        assert row["perplexity"] == pytest.approx(math.exp(row["val_loss"]))
        assert row["tutorial_loss"] == pytest.approx(
            tutorial_loss(row["loss"] * data.train.words, data.train), rel=1e-6
        )
        assert 0 <= row["BLEU-4"] <= row["BLEU-1"] <= 100
        assert 0 <= row["CIDEr"] <= 10


def test_the_records_of_the_steps_add_up_to_those_of_the_epochs(data: Made, unbroken: Trainer) -> None:
    rows = steps(unbroken.folder)
    assert [row["epoch"] for row in rows] == [1] * 5 + [2] * 5 + [3] * 5
    rates = [row["learning_rate"] for row in rows]
    assert rates[0] == pytest.approx(0.02, rel=1e-3)  # the warm-up is shorter than a step
    assert rates[-1] < 1e-3
    mean = np.mean([row["loss"] for row in rows[:5]])  # batches differ a little in their number of words
    assert mean == pytest.approx(history(unbroken.folder)[0]["loss"], rel=0.05)


def test_tensorboard_gets_what_the_logs_have(unbroken: Trainer) -> None:
    found: dict[str, dict[int, float]] = {}
    for path in (unbroken.folder / "tensorboard").iterdir():
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                assert value.metadata.plugin_data.plugin_name == "scalars"
                found.setdefault(value.tag, {})[event.step] = float(tf.make_ndarray(value.tensor))
    losses = {row["step"]: pytest.approx(row["loss"], rel=1e-6) for row in steps(unbroken.folder)}
    assert found["train/loss"] == losses
    scores = {row["step"]: pytest.approx(row["CIDEr"], rel=1e-6) for row in history(unbroken.folder)}
    assert found["epoch/CIDEr"] == scores
    assert {"train/learning_rate", "train/captions_per_second", "epoch/val_loss", "epoch/BLEU-4"} <= set(found)


def test_pictures(unbroken: Trainer) -> None:
    with Image.open(unbroken.folder / "loss.png") as curve:
        assert curve.format == "PNG"
        assert len(curve.convert("RGB").getcolors(1 << 24)) > 50
    sheets = sorted(path.name for path in (unbroken.folder / "sheets").iterdir())
    assert sheets == ["epoch-001.png", "epoch-002.png", "epoch-003.png"]


def test_the_last_five_checkpoints_and_the_best_are_kept(data: Made, unbroken: Trainer, tmp_path: Path) -> None:
    kept = sorted(path.name for path in (unbroken.folder / "last").glob("*.index"))
    assert kept == sorted(f"ckpt-{step}.index" for step in (6, 9, 10, 12, 15))
    rows = history(unbroken.folder)
    best = max(rows, key=lambda row: (row["CIDEr"], -row["val_loss"]))
    assert [path.name for path in (unbroken.folder / "best").glob("*.index")] == [f"ckpt-{best['step']}.index"]
    trainer = tiny_trainer(data, tmp_path)
    restored = tf.train.Checkpoint(encoder=trainer.model.encoder, decoder=trainer.model.decoder)
    path = tf.train.latest_checkpoint(str(unbroken.folder / "best"))
    restored.restore(path).assert_existing_objects_matched().expect_partial()
    total, words = trainer.validation.loss()
    assert total / words == pytest.approx(best["val_loss"], rel=1e-6)


class _Scores:
    """In place of a validation: CIDEr and loss as told."""

    def __init__(self, *scores: tuple[float, float]) -> None:
        self.scores = iter(scores)

    def run(self) -> Any:
        cider, loss = next(self.scores)
        record = {"val_loss": loss, "perplexity": 1.0, "val_tutorial_loss": 0.0, "BLEU-4": 0.0, "CIDEr": cider}
        return type("Findings", (), {"record": record})

    def draw_sheet(self, *arguments: object) -> None:
        pass


def test_the_best_has_the_highest_cider_or_else_the_lowest_loss_and_training_ends_early(
    data: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = ("training.epochs=9", "training.patience=2")
    trainer = tiny_trainer(data, tmp_path, *changes)
    trainer.validation = _Scores((0.1, 2.0), (0.2, 3.0), (0.2, 2.5), (0.1, 1.0), (0.2, 2.5))
    caplog.set_level("INFO")
    assert [row["step"] for row in trainer.run()] == [5, 10, 15, 20, 25]
    assert [path.name for path in (tmp_path / "best").glob("*.index")] == ["ckpt-15.index"]
    assert caplog.messages[-1] == "no better CIDEr in 2 epochs: training ends here"
    again = tiny_trainer(data, tmp_path, *changes)
    assert again.finished
    assert len(again.run()) == 5


CHILD = """
    import os, signal, sys
    from pathlib import Path
    sys.path[:0] = sys.argv[1].split(os.pathsep)
    from tiny_training import tiny_data, tiny_trainer

    def on_step(step, loss):
        if step == int(sys.argv[4]):
            os.kill(os.getpid(), signal.SIGKILL)

    tiny_trainer(tiny_data(Path(sys.argv[2])), Path(sys.argv[3])).run(on_step)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="SIGKILL is of Unix")
def test_a_killed_run_goes_on_as_if_nothing_had_been(data: Made, unbroken: Trainer, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = [os.pathsep.join(map(str, sys.path)), tmp_path / "data", folder, 9]
    command = [sys.executable, "-c", textwrap.dedent(CHILD), *map(str, arguments)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    with (folder / "steps.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')  # half a line, as a kill may leave it
    trainer = tiny_trainer(data, folder)
    assert int(trainer.step) == 6  # of the epoch from 6 to 10
    assert [row["step"] for row in steps(folder)] == list(range(1, 10))
    taken: list[int] = []
    trainer.run(lambda step, loss: taken.append(step))
    assert taken == list(range(7, 16))
    assert_same_run(trainer, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("before", ["the record", "the checkpoint"])
def test_killed_between_two_writes_at_an_epochs_end(
    data: Made, unbroken: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    """An epoch ends with the best checkpoint, its record and the last checkpoint, in this order."""

    class Stop(Exception):
        pass

    def stop(*arguments: object) -> None:
        raise Stop

    folder = tmp_path / "run"
    shutil.copytree(unbroken.folder, folder)
    back_to(9, folder)  # the second of three epochs is about to end
    trainer = tiny_trainer(data, folder)
    if before == "the record":
        monkeypatch.setattr("caption_train.training.append_json_line", stop)
    else:
        monkeypatch.setattr(trainer._last, "save", stop)
    with pytest.raises(Stop):
        trainer.run()
    monkeypatch.undo()
    assert [row["step"] for row in history(folder)] == ([5] if before == "the record" else [5, 10])
    with (folder / "history.jsonl").open("a") as file:
        file.write('{"epoch": 3, "st')
    again = tiny_trainer(data, folder)
    assert int(again.step) == 9
    again.run()
    assert_same_run(again, unbroken)


def back_to(step: int, folder: Path) -> None:
    """Take a run folder back to a checkpoint: later ones become unknown, as before they were written."""
    state = folder / "last" / "checkpoint"
    known = tf.train.get_checkpoint_state(str(state.parent))
    names = [Path(path).name for path in known.all_model_checkpoint_paths]
    names = names[: names.index(f"ckpt-{step}") + 1]
    state.write_text(
        f'model_checkpoint_path: "{names[-1]}"\n'
        + "".join(f'all_model_checkpoint_paths: "{name}"\n' for name in names)
        + "".join(
            f"all_model_checkpoint_timestamps: {t}\n" for t in known.all_model_checkpoint_timestamps[: len(names)]
        )
        + f"last_preserved_timestamp: {known.last_preserved_timestamp}\n"
    )


def test_a_finished_run_has_nothing_to_do(data: Made, unbroken: Trainer) -> None:
    before = history(unbroken.folder)
    (unbroken.folder / "loss.png").unlink()
    taken: list[int] = []
    rows = tiny_trainer(data, unbroken.folder).run(lambda step, loss: taken.append(step))
    assert taken == []
    assert [row["step"] for row in rows] == [5, 10, 15]
    assert history(unbroken.folder) == before
    assert (unbroken.folder / "loss.png").exists()


def test_a_run_folder_may_be_moved_and_a_damaged_checkpoint_passed_over(
    data: Made, unbroken: Trainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(unbroken.folder, folder)
    for path in (folder / "last").glob("ckpt-15.data*"):
        path.write_bytes(path.read_bytes()[:100])
    trainer = tiny_trainer(data, folder)
    assert int(trainer.step) == 12
    assert "ckpt-15 cannot be read" in caplog.text
    trainer.run()
    assert_same_run(trainer, unbroken)
    for path in (folder / "last").glob("ckpt-*"):
        path.unlink()
    with pytest.raises(TrainingError, match=r"no checkpoint in .*last can be read: begin anew in another folder"):
        tiny_trainer(data, folder)


def test_a_clock_that_was_set_back(data: Made, unbroken: Trainer, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(unbroken.folder, folder)
    state = folder / "last" / "checkpoint"
    later = [f"all_model_checkpoint_timestamps: {time.time() + 3600}" for _ in range(5)]
    lines = [line for line in state.read_text().splitlines() if "timestamp" not in line]
    state.write_text("\n".join([*lines, *later, f"last_preserved_timestamp: {time.time() + 3000}"]))
    assert int(tiny_trainer(data, folder).step) == STEPS


DAMAGED = [b"", b"\0" * 200, b"\xff\xfe\x00", b"no protocol buffer", b'model_checkpoint_path: "ckpt-15"\nall_mod', None]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_record_of_checkpoints(tmp_path: Path, content: bytes | None) -> None:
    """As a power cut leaves it: what is there is taken, by its number, and what is too much deleted later on."""
    value = tf.Variable(0)
    for step in (3, 6, 9, 10, 12, 15):
        value.assign(step)
        Checkpoints(tmp_path, 5, {"value": value}).save(step)
    damage(tmp_path / "checkpoint", content)
    assert latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-15")
    (tmp_path / "ckpt-15.index").write_bytes(b"")
    checkpoints = Checkpoints(tmp_path, 5, {"value": value})
    assert checkpoints.restore()
    assert int(value) == 12
    checkpoints.save(15)
    checkpoints.save(18)
    assert sorted(path.stem for path in tmp_path.glob("*.index")) == [f"ckpt-{n}" for n in (10, 12, 15, 18, 9)]
    assert latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-18")


def damage(state: Path, content: bytes | None) -> None:
    if content is None:
        state.unlink()
    else:
        state.write_bytes(content)


def test_nothing_begins_anew_where_there_are_checkpoints(data: Made, unbroken: Trainer, tmp_path: Path) -> None:
    """Going on from the beginning would overwrite what is there."""
    folder = tmp_path / "run"
    shutil.copytree(unbroken.folder, folder)
    (folder / "last" / "checkpoint").unlink()
    assert int(tiny_trainer(data, folder).step) == STEPS
    for path in (folder / "last").glob("*.index"):
        path.write_bytes(b"")
    with pytest.raises(TrainingError, match=r"no checkpoint in .*last can be read: begin anew in another folder"):
        tiny_trainer(data, folder)
    for path in (folder / "last").iterdir():
        path.unlink()
    (folder / "last" / "checkpoint").touch()
    with pytest.raises(TrainingError, match="checkpoint, which says what checkpoints there are, is damaged: put a"):
        tiny_trainer(data, folder)
    shutil.rmtree(folder / "last")
    (folder / "start").mkdir()
    with pytest.raises(TrainingError, match="start has no checkpoint to begin with: begin anew in another folder"):
        tiny_trainer(data, folder)


def test_a_folder_whose_name_is_a_pattern(tmp_path: Path) -> None:
    value = tf.Variable(0)
    checkpoints = Checkpoints(tmp_path / "runs[1]", 2, {"value": value})
    for step in range(4):
        value.assign(step)
        checkpoints.save(step)
    assert latest_checkpoint(tmp_path / "runs[1]") == str(tmp_path / "runs[1]" / "ckpt-3")
    assert {path.stem for path in (tmp_path / "runs[1]").iterdir()} == {"checkpoint", "ckpt-2", "ckpt-3"}
    value.assign(9)
    assert Checkpoints(tmp_path / "runs[1]", 2, {"value": value}).restore()
    assert int(value) == 3


def test_a_checkpoint_of_another_model(data: Made, unbroken: Trainer) -> None:
    with pytest.raises(TrainingError, match=r"the checkpoint .*ckpt-15 is of another model: ") as caught:
        tiny_trainer(data, unbroken.folder, "model.units=8")
    assert "\n" not in str(caught.value)


def test_a_loss_that_is_no_number_and_no_memory_are_one_sentence(
    data: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor\nwith a long story")

    trainer = tiny_trainer(data, tmp_path)
    monkeypatch.setattr(trainer, "_train_step", lambda *arguments: (math.nan, 1.0, 4.0, 4.0))
    with pytest.raises(TrainingError, match="the loss is nan at step 0: lower the learning rate in a new run folder"):
        trainer.run()
    monkeypatch.setattr(trainer, "_train_step", fail)
    with pytest.raises(TrainingError, match=r"^step 0: out of memory or disk space \(OOM when allocating tensor\)$"):
        trainer.run()
    assert not (tmp_path / "last").exists()


def test_gradients_are_scaled_down_to_a_global_norm(data: Made, tmp_path: Path) -> None:
    free, clipped = (first_gradients(data, tmp_path / limit, limit) for limit in ("0", "0.05"))
    norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in free))
    assert norm > 0.05
    for mine, whole in zip(clipped, free, strict=True):
        np.testing.assert_allclose(mine, whole * 0.05 / norm, rtol=1e-4, atol=1e-9)


def first_gradients(data: Made, folder: Path, limit: str) -> list[np.ndarray]:
    """As Adam has them after one step: a tenth of them is its first moment."""
    trainer = tiny_trainer(data, folder, "model.dropout=0", f"training.clip_norm={limit}")
    trainer._take_step(next(trainer._batches(0, 0)))
    return [10 * np.asarray(moment) for moment in trainer.optimizer._momentums]


def test_what_an_objective_says_of_several_shares_is_their_mean() -> None:
    assert _mean([{"reward": 1.0}, {"reward": 4.0}], [20.0, 10.0]) == {"reward": pytest.approx(2)}
    assert _mean([{"reward": 0.1}, {"reward": 4.0}], [30.0, 0.0]) == {"reward": 0.1}
    assert _mean([{"reward": 0.3}], [0.0]) == {"reward": 0.3}
    assert _mean([{}, {}], [1.0, 2.0]) == {}


def test_weights_that_are_no_numbers_at_the_end_of_an_epoch(data: Made, tmp_path: Path) -> None:
    trainer = tiny_trainer(data, tmp_path)
    for weight in trainer.model.trainable_variables:
        weight.assign(np.full(weight.shape, math.nan))
    with pytest.raises(TrainingError, match="the validation loss is nan: lower the learning rate in a new run folder"):
        trainer.validation.run()


def test_the_rate_of_the_schedule() -> None:
    schedule = WarmupCosine(0.1, 1000)
    rates = [float(schedule(step)) for step in (0, 14, 29, 515, 999, 1000, 2000)]
    expected = [0.1 / 30, 0.05, 0.1, 0.05 * (1 + math.cos(math.pi * 0.515)), 0.0, 0.0, 0.0]
    np.testing.assert_allclose(rates, expected, rtol=0.02, atol=1e-6)
    assert WarmupCosine(**schedule.get_config())(7) == schedule(7)
    assert float(WarmupCosine(0.1, 1000, warmup=0.5)(249)) == pytest.approx(0.05)
    chosen = tiny_settings("training.schedule=constant").training
    assert learning_rate(chosen, 1000) == 0.02


def test_bfloat16_learns_as_well(data: Made, unbroken: Trainer, tmp_path: Path) -> None:
    trainer = tiny_trainer(data, tmp_path, "training.precision=bfloat16")
    assert all(weight.dtype == "float32" for weight in trainer.model.weights)
    trainer.run()
    for row, there in zip(history(tmp_path), history(unbroken.folder), strict=True):
        assert row["loss"] != there["loss"]
        assert row["loss"] == pytest.approx(there["loss"], rel=0.05)


def test_what_the_logs_hold_is_json(unbroken: Trainer) -> None:
    for name in ("history.jsonl", "steps.jsonl"):
        for line in (unbroken.folder / name).read_text().splitlines():
            assert json.loads(line)["step"] > 0

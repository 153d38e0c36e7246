import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from numpy.typing import NDArray
from PIL import Image

from caption_rt.errors import OptionsError
from caption_rt.image import read_photo
from caption_rt.vocabulary import Vocabulary
from caption_train.cache import GridCache
from caption_train.datasets import CaptionedImage
from caption_train.errors import DatasetError, TrainingError
from caption_train.files import read_json_lines
from caption_train.schedules import WarmupCosine
from caption_train.training import (
    CaptionData,
    TrainConfig,
    Trainer,
    batches_of_epoch,
    caption_data,
    tutorial_loss,
)
from shapes import shape_photo

pytestmark = pytest.mark.tf

# 20 captions in batches of 4: 5 steps an epoch, a checkpoint within each epoch and at its end.
CONFIG = TrainConfig(
    embedding_dim=12, units=16, batch_size=4, epochs=4, learning_rate=0.02, checkpoint_steps=3, max_words=12
)
Made = tuple[CaptionData, CaptionData, Vocabulary]


def extract(photos: NDArray[np.uint8]) -> NDArray[np.float32]:
    """In place of a network: each quarter's pixels as they are. Photos uint8 [n, 4, 4, 3] -> [n, 4, 12]."""
    quarters = photos.astype(np.float32).reshape(-1, 2, 2, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5)
    return quarters.reshape(-1, 4, 12) / 127.5 - 1


def make_data(folder: Path) -> Made:
    folder.mkdir(exist_ok=True)
    images = []
    for index in range(14):
        photo, caption = shape_photo(index)
        path = folder / f"{index}.png"
        photo.save(path)
        images.append(CaptionedImage(path, (caption, f"There is {caption}, in the middle.")))
    cache = GridCache.open(folder / "cache", "key", (4, 12))
    rows = cache.fill([image.path for image in images], extract, read=lambda path: read_photo(path, 4))
    train, validation = images[:10], images[10:]
    vocabulary = Vocabulary.build((caption for image in train for caption in image.captions), 50)
    return (
        caption_data(cache, train, rows[:10], vocabulary, 12),
        caption_data(cache, validation, rows[10:], vocabulary, 12),
        vocabulary,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def unbroken(data: Made, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    trainer = Trainer(CONFIG, *data, tmp_path_factory.mktemp("unbroken"))
    trainer.run()
    return trainer


def history(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_json_lines(folder / "history.jsonl")]


def assert_same_run(folder: Path, mine: Trainer, other: Trainer) -> None:
    """The same history and the same weights, but for the last digits of float32."""
    rows, expected = history(folder), history(other.folder)
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    for row, there in zip(rows, expected, strict=True):
        assert row == pytest.approx(there, rel=1e-5)
    for here, there in zip(mine.model.weights, other.model.weights, strict=True):
        # The softmax takes no notice of a number added to every score: this gradient is rounding and nothing else.
        if here.path.endswith("V/bias"):
            continue
        # Adam divides by the root of a gradient's square, so that rounding in a tiny gradient, which the order of
        # threads decides, is not tiny in the weight.
        np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-4)


def test_captions_become_tokens(data: Made) -> None:
    train, validation, vocabulary = data
    assert len(train) == 20
    assert train.tokens.dtype == train.rows.dtype == train.lengths.dtype == np.int64
    caption = shape_photo(1)[1]
    ids = [vocabulary.start_id, *vocabulary.encode(caption), vocabulary.end_id]
    assert train.tokens[2].tolist() == ids + [vocabulary.pad_id] * (train.tokens.shape[1] - len(ids))
    assert train.lengths[2] == len(ids) == 9
    assert train.rows.tolist() == [row for row in range(10) for _ in range(2)]
    assert validation.rows.tolist() == [row for row in range(10, 14) for _ in range(2)]


def test_long_captions_are_cut_and_unread_photos_left_out(data: Made) -> None:
    train, _, vocabulary = data
    images = [
        CaptionedImage(Path("gone.jpg"), ("a red circle",)),
        CaptionedImage(Path("there.jpg"), ("a circle of something on a red ground",)),
    ]
    made = caption_data(train.cache, images, np.array([-1, 7]), vocabulary, max_words=3)
    assert made.rows.tolist() == [7]
    expected = [vocabulary.start_id, *vocabulary.encode("a circle of"), vocabulary.end_id]
    assert made.tokens.tolist() == [expected]
    assert expected[3] == vocabulary.unk_id
    with pytest.raises(DatasetError, match="none of the 2 photos has a grid"):
        caption_data(train.cache, images, np.array([-1, -1]), vocabulary, 3)


def test_an_epoch_has_every_caption_once() -> None:
    lengths = np.random.default_rng(0).integers(3, 40, 1001)
    batches = batches_of_epoch(lengths, 10, seed=1, epoch=2)
    assert sorted(np.concatenate(batches).tolist()) == list(range(1001))
    assert sorted(map(len, batches)) == [1, *[10] * 100]
    again = batches_of_epoch(lengths, 10, seed=1, epoch=2)
    for one, other in zip(batches, again, strict=True):
        np.testing.assert_array_equal(one, other)
    others = [batches_of_epoch(lengths, 10, seed, epoch) for seed, epoch in ((1, 3), (2, 2))]
    assert all([b.tolist() for b in batches] != [b.tolist() for b in other] for other in others)


def test_captions_of_a_batch_are_of_similar_length_and_batches_in_any_order() -> None:
    lengths = np.random.default_rng(0).integers(3, 40, 2000)
    batches = batches_of_epoch(lengths, 10, seed=0, epoch=0)
    padding = sum(len(batch) * int(lengths[batch].max()) - int(lengths[batch].sum()) for batch in batches)
    assert padding / lengths.sum() < 0.05
    means = [lengths[batch].mean() for batch in batches]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2


def test_the_loss_is_the_cross_entropy_of_words_alone(data: Made, unbroken: Trainer) -> None:
    train, _, vocabulary = data
    tokens = train.tokens[:4]
    grid = train.cache.gather(train.rows[:4]).astype(np.float32)
    total, count = (float(x) for x in unbroken._validation_step(grid, tokens))
    logits = unbroken.model(grid, tokens[:, :-1]).numpy().astype(np.float64)
    expected, words = 0.0, 0
    for caption, scores in zip(tokens[:, 1:], logits, strict=True):
        for token, row in zip(caption, scores, strict=True):
            if token == vocabulary.pad_id:
                break
            expected -= row[token] - np.log(np.exp(row).sum())
            words += 1
    assert count == words == train.lengths[:4].sum() - 4
    assert total == pytest.approx(expected, rel=1e-5)
    wider = np.pad(tokens, ((0, 0), (0, 5)), constant_values=vocabulary.pad_id)
    np.testing.assert_allclose(unbroken._validation_step(grid, wider), (total, count), rtol=1e-5)


def test_the_tutorials_loss(data: Made) -> None:
    """The tutorial: for each word the batch's mean, masked at padding, summed over words, divided by the length."""
    train = data[0]
    cross_entropy = np.random.default_rng(0).uniform(0, 3, (len(train), train.tokens.shape[1] - 1))
    cross_entropy *= train.tokens[:, 1:] != 0
    batches = cross_entropy.reshape(5, 4, -1)
    expected = np.mean([batch.mean(axis=0).sum() / train.tokens.shape[1] for batch in batches])
    assert tutorial_loss(float(cross_entropy.sum()), train) == pytest.approx(expected)


def test_history(data: Made, unbroken: Trainer) -> None:
    rows = history(unbroken.folder)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    total, words = unbroken.validate()
    assert words == data[1].lengths.sum() - len(data[1])
    assert rows[-1]["val_loss"] == pytest.approx(total / words, rel=1e-6)
    assert rows[-1]["val_tutorial_loss"] == pytest.approx(tutorial_loss(total, data[1]), rel=1e-6)
    for row in rows:
        assert row["perplexity"] == pytest.approx(math.exp(row["val_loss"]))
        trained_words = data[0].lengths.sum() - len(data[0])
        assert row["tutorial_loss"] == pytest.approx(tutorial_loss(row["loss"] * trained_words, data[0]), rel=1e-6)
    with Image.open(unbroken.folder / "loss.png") as curve:
        assert curve.format == "PNG"
        assert len(curve.convert("RGB").getcolors(1 << 24)) > 50


def test_the_last_five_checkpoints_and_the_best_are_kept(data: Made, unbroken: Trainer, tmp_path: Path) -> None:
    kept = sorted(path.name for path in (unbroken.folder / "last").glob("*.index"))
    assert kept == [f"ckpt-{step}.index" for step in (10, 12, 15, 18, 20)]
    rows = history(unbroken.folder)
    best = min(rows, key=lambda row: row["val_loss"])
    assert [path.name for path in (unbroken.folder / "best").glob("*.index")] == [f"ckpt-{best['step']}.index"]
    trainer = Trainer(CONFIG, *data, tmp_path)
    restored = tf.train.Checkpoint(encoder=trainer.model.encoder, decoder=trainer.model.decoder)
    path = tf.train.latest_checkpoint(str(unbroken.folder / "best"))
    restored.restore(path).assert_existing_objects_matched().expect_partial()
    total, words = trainer.validate()
    assert total / words == pytest.approx(best["val_loss"], rel=1e-6)


def test_a_worse_epoch_does_not_become_the_best(data: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(replace(CONFIG, epochs=3), *data, tmp_path)
    losses = iter([(20.0, 10), (10.0, 10), (15.0, 10)])
    monkeypatch.setattr(trainer, "validate", lambda: next(losses))
    assert [row["val_loss"] for row in trainer.run()] == [2.0, 1.0, 1.5]
    assert [path.name for path in (tmp_path / "best").glob("*.index")] == ["ckpt-10.index"]


CHILD = """
    import os, signal, sys
    from pathlib import Path
    sys.path[:0] = sys.argv[1].split(os.pathsep)
    import test_training
    from caption_train.training import Trainer

    def on_step(step, loss):
        if step == int(sys.argv[4]):
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer(test_training.CONFIG, *test_training.make_data(Path(sys.argv[2])), Path(sys.argv[3])).run(on_step)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="SIGKILL is of Unix")
def test_a_killed_run_goes_on_as_if_nothing_had_been(data: Made, unbroken: Trainer, tmp_path: Path) -> None:
    here = Path(__file__).resolve().parent
    arguments = [os.pathsep.join(map(str, (here, here.parent, *sys.path))), tmp_path / "data", tmp_path / "run", 14]
    command = [sys.executable, "-c", textwrap.dedent(CHILD), *map(str, arguments)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    steps: list[int] = []
    trainer = Trainer(CONFIG, *data, tmp_path / "run")
    assert int(trainer.step) == 12  # of the epoch from 11 to 15
    trainer.run(lambda step, loss: steps.append(step))
    assert steps == list(range(13, 21))
    assert_same_run(tmp_path / "run", trainer, unbroken)


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
    back_to(12, folder)  # the third of four epochs is about to end
    trainer = Trainer(CONFIG, *data, folder)
    if before == "the record":
        monkeypatch.setattr("caption_train.training.append_json_line", stop)
    else:
        monkeypatch.setattr(trainer._last, "save", stop)
    with pytest.raises(Stop):
        trainer.run()
    monkeypatch.undo()
    assert [row["step"] for row in history(folder)] == ([5, 10] if before == "the record" else [5, 10, 15])
    with (folder / "history.jsonl").open("a") as file:
        file.write('{"epoch": 3, "st')  # half a line, as a kill may leave it
    again = Trainer(CONFIG, *data, folder)
    assert int(again.step) == 12
    again.run()
    assert_same_run(folder, again, unbroken)


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
    steps: list[int] = []
    rows = Trainer(CONFIG, *data, unbroken.folder).run(lambda step, loss: steps.append(step))
    assert steps == []
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    assert history(unbroken.folder) == before
    assert (unbroken.folder / "loss.png").exists()


def test_a_run_folder_may_be_moved_and_a_damaged_checkpoint_passed_over(
    data: Made, unbroken: Trainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(unbroken.folder, folder)
    for path in (folder / "last").glob("ckpt-20.data*"):
        path.write_bytes(path.read_bytes()[:100])
    trainer = Trainer(CONFIG, *data, folder)
    assert int(trainer.step) == 18
    assert "ckpt-20 cannot be read" in caplog.text
    trainer.run()
    assert_same_run(folder, trainer, unbroken)
    for path in (folder / "last").glob("ckpt-*"):
        path.unlink()
    with pytest.raises(TrainingError, match=r"no checkpoint in .*last can be read: begin anew in another folder"):
        Trainer(CONFIG, *data, folder)


def test_a_clock_that_was_set_back(data: Made, unbroken: Trainer, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(unbroken.folder, folder)
    state = folder / "last" / "checkpoint"
    later = [f"all_model_checkpoint_timestamps: {time.time() + 3600}" for _ in range(5)]
    lines = [line for line in state.read_text().splitlines() if "timestamp" not in line]
    state.write_text("\n".join([*lines, *later, f"last_preserved_timestamp: {time.time() + 3000}"]))
    assert int(Trainer(CONFIG, *data, folder).step) == 20


def test_a_checkpoint_of_another_model(data: Made, unbroken: Trainer) -> None:
    with pytest.raises(TrainingError, match=r"the checkpoint .*ckpt-20 is of another model: ") as caught:
        Trainer(replace(CONFIG, units=8), *data, unbroken.folder)
    assert "\n" not in str(caught.value)


def test_a_loss_that_is_no_number(data: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(CONFIG, *data, tmp_path)
    monkeypatch.setattr(trainer, "_train_step", lambda grid, tokens, seed: (tf.constant(np.nan), tf.constant(4.0)))
    with pytest.raises(TrainingError, match="the loss is nan at step 0: lower the learning rate in a new run folder"):
        trainer.run()
    assert not (tmp_path / "last").exists()


def test_no_memory_is_one_sentence(data: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor\nwith a long story")

    trainer = Trainer(CONFIG, *data, tmp_path)
    monkeypatch.setattr(trainer, "_train_step", fail)
    with pytest.raises(TrainingError, match=r"^step 0: out of memory or disk space \(OOM when allocating tensor\)$"):
        trainer.run()


def test_the_rate_of_the_schedule() -> None:
    schedule = WarmupCosine(0.1, 1000)
    rates = [float(schedule(step)) for step in (0, 14, 29, 515, 999, 1000, 2000)]
    expected = [0.1 / 30, 0.05, 0.1, 0.05 * (1 + math.cos(math.pi * 0.515)), 0.0, 0.0, 0.0]
    np.testing.assert_allclose(rates, expected, rtol=0.02, atol=1e-6)
    assert WarmupCosine(**schedule.get_config())(7) == schedule(7)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"epochs": 0}, "epochs must be at least 1, not 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, not -1"),
        ({"learning_rate": float("nan")}, "learning_rate must be a positive number, not nan"),
        ({"learning_rate": 0.0}, r"learning_rate must be a positive number, not 0\.0"),
        ({"clip_norm": float("inf")}, "clip_norm must be a positive number, not inf"),
        ({"schedule": "linear"}, "schedule must be 'cosine' or 'constant', not 'linear'"),
    ],
)
def test_config_refuses(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OptionsError, match=sentence):
        TrainConfig(**change)


def test_the_config_survives_json() -> None:
    assert TrainConfig(**json.loads(json.dumps(asdict(CONFIG)))) == CONFIG

"""Trains encoder and decoder on cached grids: batches, loss, checkpoints, and going on exactly where it stopped.

Everything random follows from the seed and the number of the step, never from how the process got there, so a run that
was killed and called again takes the steps that an unbroken one would have taken.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from caption_rt.errors import OptionsError
from caption_rt.vocabulary import Vocabulary
from caption_train.cache import ABSENT, GridCache
from caption_train.checkpoints import Checkpoints, tensorflow_errors
from caption_train.datasets import CaptionedImage
from caption_train.errors import DatasetError, TrainingError
from caption_train.files import append_json_line, read_json_lines, rewrite_json_lines
from caption_train.model import CaptionModel, ModelConfig, Recurrence
from caption_train.plots import plot_losses
from caption_train.schedules import WarmupCosine

logger = logging.getLogger(__name__)

LAST, BEST = "last", "best"
HISTORY = "history.jsonl"
LOSS_CURVE = "loss.png"
_SORTED_BATCHES = 64  # batches whose captions are sorted by length together
_KEPT_CHECKPOINTS = 5


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run."""

    embedding_dim: int = 256
    """Size of word embeddings and of a place's features."""
    units: int = 512
    """Units of GRU, attention and first output layer."""
    recurrence: Recurrence = "carry"
    """See `caption_train.model.ModelConfig`."""
    dropout: float = 0.3
    """See `caption_train.model.ModelConfig`; the tutorial has none."""
    vocabulary: int = 5000
    """Words kept beside the special ones."""
    max_words: int = 40
    """Captions are cut to so many words in training, and decoding stops there."""
    batch_size: int = 64
    """Captions a step."""
    epochs: int = 20
    """Passes over all captions."""
    learning_rate: float = 1e-3
    """Adam's; the peak where the schedule is a cosine."""
    schedule: str = "cosine"
    """``cosine`` (warm-up, then down to zero) or ``constant`` (the tutorial)."""
    clip_norm: float = 5.0
    """Gradients are scaled down to this global norm (Pascanu et al. 2013)."""
    checkpoint_steps: int = 500
    """Steps between two checkpoints; one is written at the end of every epoch as well."""
    seed: int = 0
    """Of the initial weights, the order of the captions and the dropout."""

    def __post_init__(self) -> None:
        """Check the values, those of the model among them: a run that has begun cannot have others.

        Raises:
            OptionsError: A number out of its range, an unknown schedule or recurrence.
        """
        model_config(self, places=1, channels=1, vocabulary_size=1)
        for name in ("vocabulary", "max_words", "batch_size", "epochs", "checkpoint_steps"):
            if getattr(self, name) < 1:
                raise OptionsError(f"training: {name} must be at least 1, not {getattr(self, name)}")
        for name in ("learning_rate", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise OptionsError(f"training: {name} must be a positive number, not {getattr(self, name)}")
        if self.schedule not in ("cosine", "constant"):
            raise OptionsError(f"training: schedule must be 'cosine' or 'constant', not {self.schedule!r}")


@dataclass(frozen=True)
class CaptionData:
    """Captions as token ids beside the rows of their photos' grids."""

    cache: GridCache
    """Where the grids are."""
    rows: NDArray[np.int64]
    """Row of each caption's photo in the cache, int64 [N]."""
    tokens: NDArray[np.int64]
    """``<start>``, words, ``<end>``, then ``<pad>``: int64 [N, T]."""
    lengths: NDArray[np.int64]
    """Tokens of each caption without padding, int64 [N]."""

    def __len__(self) -> int:
        """Number of captions."""
        return len(self.rows)


def caption_data(
    cache: GridCache,
    images: Sequence[CaptionedImage],
    rows: NDArray[np.int64],
    vocabulary: Vocabulary,
    max_words: int,
) -> CaptionData:
    """Encode the captions of photos.

    Args:
        cache: Where the photos' grids are.
        images: Photos with captions.
        rows: The photos' rows in the cache, int64 [len(images)]; photos with -1 are left out.
        vocabulary: Words to ids.
        max_words: Longer captions are cut.

    Raises:
        DatasetError: No photo could be read.
    """
    pairs = [
        (row, [vocabulary.start_id, *vocabulary.encode(caption)[:max_words], vocabulary.end_id])
        for image, row in zip(images, rows, strict=True)
        if row != ABSENT
        for caption in image.captions
    ]
    if not pairs:
        raise DatasetError(f"none of the {len(images)} photos has a grid: nothing to train or validate on")
    lengths = np.array([len(ids) for _, ids in pairs], np.int64)
    tokens = np.full((len(pairs), lengths.max()), vocabulary.pad_id, np.int64)
    for index, (_, ids) in enumerate(pairs):
        tokens[index, : len(ids)] = ids
    return CaptionData(cache, np.array([row for row, _ in pairs], np.int64), tokens, lengths)


def batches_of_epoch(lengths: NDArray[np.int64], batch_size: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """The captions of every batch of an epoch: random, but of similar length within a batch.

    Args:
        lengths: Tokens of each caption, int64 [N].
        batch_size: Captions a batch; the last one may be smaller.
        seed: Of the run.
        epoch: From 0.

    Returns:
        Indices int64, every caption once.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    pool = batch_size * _SORTED_BATCHES
    batches = []
    for start in range(0, len(order), pool):
        chosen = order[start : start + pool]
        chosen = chosen[np.argsort(lengths[chosen], kind="stable")]
        batches += [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


class Trainer:
    """One training run: model, optimiser, checkpoints."""

    def __init__(
        self, config: TrainConfig, train: CaptionData, validation: CaptionData, vocabulary: Vocabulary, folder: Path
    ) -> None:
        """Build everything and go back to the last checkpoint, if the folder has one.

        Raises:
            TrainingError: The checkpoint does not fit the configuration.
        """
        keras.utils.set_random_seed(config.seed)
        self.config, self.train_data, self.validation, self.folder = config, train, validation, folder
        places, channels = train.cache.grid_shape
        self.model = CaptionModel(model_config(config, places, channels, len(vocabulary)))
        self._pad = vocabulary.pad_id
        self.steps_an_epoch = math.ceil(len(train) / config.batch_size)
        self.total_steps = self.steps_an_epoch * config.epochs
        cosine = config.schedule == "cosine"
        rate = WarmupCosine(config.learning_rate, self.total_steps) if cosine else config.learning_rate
        self.optimizer = keras.optimizers.Adam(rate, global_clipnorm=config.clip_norm)
        self.optimizer.build(self.model.trainable_variables)
        self.step = tf.Variable(0, dtype=tf.int64, trainable=False)
        self.best = tf.Variable(math.inf, dtype=tf.float64, trainable=False)
        self._sums = tf.Variable([0.0, 0.0], dtype=tf.float64, trainable=False)  # this epoch's cross-entropy, tokens
        parts = {
            "encoder": self.model.encoder,
            "decoder": self.model.decoder,
            "optimizer": self.optimizer,
            "step": self.step,
            "best": self.best,
            "sums": self._sums,
        }
        self._last = Checkpoints(folder / LAST, _KEPT_CHECKPOINTS, parts)
        self._best = Checkpoints(folder / BEST, 1, parts)
        if self._last.restore():
            logger.info("going on after step %d of %d", int(self.step), self.total_steps)

    def run(self, on_step: Callable[[int, float], None] = lambda step, loss: None) -> list[dict[str, Any]]:
        """Train to the end of the last epoch.

        Args:
            on_step: Called after every step with its number and its loss a word.

        Returns:
            The history: a record an epoch, as in ``history.jsonl``.

        Raises:
            TrainingError: The loss is no number any more, or a checkpoint cannot be written.
            OSError: The history cannot be written.
        """
        history = [row for row in read_json_lines(self.folder / HISTORY) if row["step"] <= int(self.step)]
        rewrite_json_lines(self.folder / HISTORY, history)
        if history:
            plot_losses(history, self.folder / LOSS_CURVE)  # a kill may have come between the last record and its curve
        started = time.monotonic()
        while int(self.step) < self.total_steps:
            epoch, position = divmod(int(self.step), self.steps_an_epoch)
            order = batches_of_epoch(self.train_data.lengths, self.config.batch_size, self.config.seed, epoch)
            for batch in order[position:]:
                self._take_step(batch, on_step)
            record = self._record(epoch + 1) | {"seconds": round(time.monotonic() - started, 1)}
            started = time.monotonic()
            self._sums.assign([0.0, 0.0])
            history.append(record)
            if record["val_loss"] < float(self.best):
                self.best.assign(record["val_loss"])
                self._best.save(int(self.step))
            # The record goes first: should the run die in between, the epoch's end is computed and written again.
            append_json_line(self.folder / HISTORY, record)
            self._last.save(int(self.step))
            plot_losses(history, self.folder / LOSS_CURVE)
            logger.info(
                "epoch %d of %d: loss %.4f, validation loss %.4f, perplexity %.2f, tutorial's loss %.4f",
                *(epoch + 1, self.config.epochs, record["loss"], record["val_loss"]),
                *(record["perplexity"], record["tutorial_loss"]),
            )
        return history

    def _take_step(self, batch: NDArray[np.int64], on_step: Callable[[int, float], None]) -> None:
        grid, tokens = _load(self.train_data, batch)
        seed = np.array([self.config.seed, int(self.step)], np.int32)
        with tensorflow_errors(f"step {int(self.step)}"):
            total, count = (float(x) for x in self._train_step(grid, tokens, seed))
        if not math.isfinite(total):
            raise TrainingError(
                f"the loss is {total} at step {int(self.step)}: lower the learning rate in a new run folder"
            )
        self.step.assign_add(1)
        self._sums.assign_add([total, count])
        step = int(self.step)
        on_step(step, total / count)
        if step % self.config.checkpoint_steps == 0 and step % self.steps_an_epoch:
            self._last.save(step)

    def validate(self) -> tuple[float, int]:
        """Cross-entropy over all words of the validation captions, in nats, and the number of those words."""
        order = np.argsort(self.validation.lengths, kind="stable")
        size = self.config.batch_size
        sums = np.zeros(2)
        for start in range(0, len(order), size):
            sums += [float(x) for x in self._validation_step(*_load(self.validation, order[start : start + size]))]
        return float(sums[0]), int(sums[1])

    def _record(self, epoch: int) -> dict[str, Any]:
        total, count = (float(x) for x in self._sums.numpy())
        val_total, val_count = self.validate()
        return {
            "epoch": epoch,
            "step": int(self.step),
            "loss": total / count,
            "val_loss": val_total / val_count,
            "perplexity": math.exp(min(val_total / val_count, 700)),
            "tutorial_loss": tutorial_loss(total, self.train_data),
            "val_tutorial_loss": tutorial_loss(val_total, self.validation),
        }

    @tf.function(
        input_signature=[
            tf.TensorSpec((None, None, None), tf.float32),
            tf.TensorSpec((None, None), tf.int64),
            tf.TensorSpec((2,), tf.int32),
        ]
    )
    def _train_step(self, grid: tf.Tensor, tokens: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            total, count = self._cross_entropy(grid, tokens, seed)
            loss = total / count
        variables = self.model.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return total, count

    @tf.function(input_signature=[tf.TensorSpec((None, None, None), tf.float32), tf.TensorSpec((None, None), tf.int64)])
    def _validation_step(self, grid: tf.Tensor, tokens: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return self._cross_entropy(grid, tokens, None)

    def _cross_entropy(self, grid: tf.Tensor, tokens: tf.Tensor, seed: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor]:
        """Sum over all words but padding, in nats, and the number of those words."""
        logits = self.model(grid, tokens[:, :-1], seed=seed)
        targets = tokens[:, 1:]
        each = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=targets, logits=logits)
        mask = tf.cast(targets != self._pad, tf.float32)
        return tf.reduce_sum(each * mask), tf.reduce_sum(mask)


def model_config(config: TrainConfig, places: int, channels: int, vocabulary_size: int) -> ModelConfig:
    """The model of a run, given the grid and the vocabulary."""
    return ModelConfig(
        places, channels, vocabulary_size, config.embedding_dim, config.units, config.recurrence, config.dropout
    )


def tutorial_loss(cross_entropy: float, data: CaptionData) -> float:
    """The number that the tutorial prints: padding counts in the mean, though not in the sum.

    The tutorial sums over the words of a batch the batch's mean cross-entropy, zero at padding, and divides by the
    length to which all captions are padded; so its loss falls when one long caption joins the set.

    Args:
        cross_entropy: Sum over all captions of `data`, in nats.
        data: The captions.
    """
    return cross_entropy / (len(data) * int(data.tokens.shape[1]))


def _load(data: CaptionData, batch: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Grids float32 [m, P, C] and tokens int64 [m, T], cut to the batch's longest caption."""
    return data.cache.gather(data.rows[batch]).astype(np.float32), data.tokens[batch, : data.lengths[batch].max()]

"""The training loop: steps, epochs, checkpoints, and going on exactly where it stopped.

Everything random follows from the seed and the number of the step, never from how the process got there, so a run that
was killed and called again takes the steps that an unbroken one would have taken.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from caption_rt.vocabulary import Vocabulary
from caption_train.batches import Batch, CaptionData, batches_of_epoch, load_batch, tutorial_loss
from caption_train.checkpoints import Checkpoints, read_checkpoint, tensorflow_errors
from caption_train.errors import TrainingError
from caption_train.files import append_json_line, read_json_lines, rewrite_json_lines
from caption_train.logs import HISTORY, RunLog
from caption_train.model import CaptionModel, model_config
from caption_train.objectives import CrossEntropy, Objective
from caption_train.plots import plot_losses
from caption_train.precision import dtype_of_products
from caption_train.schedules import learning_rate
from caption_train.settings import Settings
from caption_train.sources import FeatureSource
from caption_train.validation import Validation

logger = logging.getLogger(__name__)

LAST, BEST, START = "last", "best", "start"
LOSS_CURVE = "loss.png"
_KEPT_CHECKPOINTS = 5

MakeObjective = Callable[[CaptionModel], Objective]
"""From the model that learns to what it learns."""


class Trainer:
    """One training run: model, optimiser, checkpoints."""

    def __init__(
        self,
        settings: Settings,
        train: CaptionData,
        validation: CaptionData,
        vocabulary: Vocabulary,
        source: FeatureSource,
        folder: Path,
        *,
        make_objective: MakeObjective | None = None,
    ) -> None:
        """Build everything and go back to the last checkpoint, if the folder has one, or to the weights to start from.

        Args:
            settings: Of the run.
            train: Captions to learn from.
            validation: Captions that choose the best checkpoint.
            vocabulary: Words and ids.
            source: Where grids come from.
            folder: Of the run.
            make_objective: What is learnt; cross-entropy as the settings have it, if not given.

        Raises:
            TrainingError: The checkpoint does not fit the settings.
        """
        chosen = settings.training
        keras.utils.set_random_seed(chosen.seed)
        self.settings, self.train_data, self.source, self.folder = settings, train, source, folder
        self._pad = vocabulary.pad_id
        self.steps_an_epoch = math.ceil(len(train) / chosen.batch_size)
        self.total_steps = self.steps_an_epoch * chosen.epochs
        config = model_config(settings, *source.grid_shape, len(vocabulary))
        self.model = CaptionModel(config, dtype_of_products(chosen.precision))
        self.variables = [*self.model.trainable_variables, *source.variables]
        self.optimizer = keras.optimizers.Adam(
            learning_rate(chosen, self.total_steps), global_clipnorm=chosen.clip_norm or None
        )
        self.optimizer.build(self.variables)
        self.step = tf.Variable(0, dtype=tf.int64, trainable=False)
        self.best = tf.Variable([-math.inf, -math.inf], dtype=tf.float64, trainable=False)  # see `_rank`
        self.stale = tf.Variable(0, dtype=tf.int64, trainable=False)  # epochs since the best one
        self._sums = tf.Variable([0.0, 0.0], dtype=tf.float64, trainable=False)  # this epoch's cross-entropy, words
        smoothing, penalty = chosen.label_smoothing, chosen.attention_penalty
        self.objective: Objective = (
            make_objective(self.model) if make_objective else CrossEntropy(self._pad, smoothing, penalty)
        )
        self.validation = Validation(settings, self.model, source, validation, vocabulary)
        self._train_step = self._compile()
        parts = {
            "encoder": self.model.encoder,
            "decoder": self.model.decoder,
            "optimizer": self.optimizer,
            "step": self.step,
            "best": self.best,
            "stale": self.stale,
            "sums": self._sums,
            **source.parts,
        }
        self._last = Checkpoints(folder / LAST, _KEPT_CHECKPOINTS, parts)
        self._best = Checkpoints(folder / BEST, 1, parts)
        self._begin()

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or the last ones were no better."""
        patience = self.settings.training.patience
        stale = patience > 0 and int(self.stale) >= patience
        return int(self.step) >= self.total_steps or (stale and int(self.step) % self.steps_an_epoch == 0)

    def run(self, on_step: Callable[[int, float], None] = lambda step, loss: None) -> list[dict[str, Any]]:
        """Train to the end of the last epoch.

        Args:
            on_step: Called after every step with its number and its cross-entropy a word.

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
        with RunLog(self.folder, int(self.step)) as log:
            while not self.finished:
                started = time.monotonic()
                epoch, position = divmod(int(self.step), self.steps_an_epoch)
                for batch, photos in self._batches(epoch, position):
                    self._take_step(batch, photos, log, on_step)
                self._end_epoch(epoch + 1, history, log, time.monotonic() - started)
        return history

    def _begin(self) -> None:
        if self._last.restore():
            logger.info("going on after step %d of %d", int(self.step), self.total_steps)
        elif (start := tf.train.latest_checkpoint(str(self.folder / START))) is not None:
            read_checkpoint(start, {"encoder": self.model.encoder, "decoder": self.model.decoder})

    def _batches(self, epoch: int, position: int) -> Iterator[tuple[Batch, NDArray[np.int64]]]:
        """The batches of an epoch from one on, with the indices of their photos; the next one is read meanwhile."""
        chosen = self.settings.training
        order = batches_of_epoch(self.train_data, chosen.batch_size, chosen.seed, epoch, chosen.grouping)[position:]
        with ThreadPoolExecutor(1, "batches") as reader:
            ahead = None
            for captions in [*order, None]:
                made, ahead = ahead, None
                if captions is not None:
                    ahead = reader.submit(load_batch, self.train_data, captions, self.source, self._pad)
                if made is not None:
                    yield made.result()

    def _take_step(
        self, batch: Batch, photos: NDArray[np.int64], log: RunLog, on_step: Callable[[int, float], None]
    ) -> None:
        started, step = time.monotonic(), int(self.step)
        seed = np.array([self.settings.training.seed, step], np.int32)
        rate = float(self.optimizer.learning_rate)
        with tensorflow_errors(f"step {step}"):
            batch, found = self.objective.prepare(batch, photos, step)
            normaliser = np.float32(self.objective.normaliser(batch))
            total, cross_entropy, words = (float(x) for x in self._train_step(batch, normaliser, seed))
        if not math.isfinite(total):
            raise TrainingError(f"the loss is {total} at step {step}: lower the learning rate in a new run folder")
        self.step.assign_add(1)
        self._sums.assign_add([cross_entropy, words])
        step += 1
        seconds = time.monotonic() - started
        log.step(
            {
                "step": step,
                "epoch": (step - 1) // self.steps_an_epoch + 1,
                "objective": total / float(normaliser),
                "loss": cross_entropy / words,
                "learning_rate": rate,
                "captions_per_second": round(len(batch.tokens) / seconds, 1),
                **found,
            }
        )
        on_step(step, cross_entropy / words)
        if step % self.settings.training.checkpoint_steps == 0 and step % self.steps_an_epoch:
            self._last.save(step)

    def _end_epoch(self, epoch: int, history: list[dict[str, Any]], log: RunLog, seconds: float) -> None:
        """Validate, and write down what came of it."""
        total, words = (float(x) for x in self._sums.numpy())
        found = self.validation.run()
        record = {
            "epoch": epoch,
            "step": int(self.step),
            "loss": total / words,
            "tutorial_loss": tutorial_loss(total, self.train_data),
            **found.record,
            "seconds": round(seconds, 1),
        }
        self._sums.assign([0.0, 0.0])
        history.append(record)
        rank = _rank(record)
        if rank > tuple(self.best.numpy()):
            self.best.assign(rank)
            self.stale.assign(0)
            self._best.save(int(self.step))
        else:
            self.stale.assign_add(1)
        self.validation.draw_sheet(found, self.folder, epoch)
        # The record goes first: should the run die in between, the epoch's end is computed and written again.
        append_json_line(self.folder / HISTORY, record)
        self._last.save(int(self.step))
        log.epoch(record)
        plot_losses(history, self.folder / LOSS_CURVE)
        logger.info(
            "epoch %d of %d: loss %.4f, validation loss %.4f, perplexity %.2f, CIDEr %.4f, BLEU-4 %.2f",
            *(epoch, self.settings.training.epochs, record["loss"], record["val_loss"]),
            *(record["perplexity"], record["CIDEr"], record["BLEU-4"]),
        )
        if self.finished and int(self.step) < self.total_steps:
            logger.info("no better CIDEr in %d epochs: training ends here", int(self.stale))

    def _compile(self) -> Callable[..., tuple[tf.Tensor, tf.Tensor, tf.Tensor]]:
        """The step in a graph, one for captions of every length: a batch to the sums of `objectives.Loss`."""
        batch = Batch(
            tf.TensorSpec((None, *self.source.loaded_shape), tf.float16),
            tf.TensorSpec((None,), tf.int32),
            tf.TensorSpec((None, None), tf.int64),
            tf.TensorSpec((None,), tf.float32),
        )
        signature = [batch, tf.TensorSpec((), tf.float32), tf.TensorSpec((2,), tf.int32)]
        compiled: Callable[..., Any] = tf.function(self.replica_step, input_signature=signature, autograph=False)
        return compiled

    def replica_step(
        self, batch: Batch, normaliser: tf.Tensor, seed: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """One step, or a replica's share of one.

        Args:
            batch: Tensors.
            normaliser: What the loss of the whole batch is divided by; float32, a scalar.
            seed: int32 [2], of the dropout.

        Returns:
            Loss, cross-entropy and words of the share, each a sum; see `caption_train.objectives.Loss`.
        """
        # Keras' variables hold TensorFlow's, of which the tape knows what a missing gradient looks like.
        variables = [variable.value for variable in self.variables]
        with tf.GradientTape() as tape:
            loss = self.objective.loss(self.model, self.source.grid(batch.loaded, training=True), batch, seed)
            scaled = loss.total / normaliser
        # The attention's V has a bias for the sake of the tutorial's checkpoints, and no gradient.
        gradients = tape.gradient(scaled, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        self.optimizer.apply(gradients, self.variables)
        return loss.total, loss.cross_entropy, loss.words


def _rank(record: Mapping[str, Any]) -> tuple[float, float]:
    """What makes an epoch the best: CIDEr, and where that does not tell, as with a single photo, the loss."""
    return record["CIDEr"], -record["val_loss"]

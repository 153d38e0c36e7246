"""The training loop: steps, epochs, checkpoints, and going on exactly where it stopped.

Everything random follows from the seed and the number of the step, never from how the process got there, so a run that
was killed and called again takes the steps that an unbroken one would have taken.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from caption_rt.vocabulary import Vocabulary
from caption_train.batches import Batch, CaptionData, batches_of_epoch, load_batch, tutorial_loss
from caption_train.checkpoints import Checkpoints, latest_checkpoint, read_checkpoint, tensorflow_errors
from caption_train.distributed import Distribution
from caption_train.errors import TrainingError
from caption_train.files import append_json_line, read_json_lines, rewrite_json_lines
from caption_train.logs import HISTORY, RunLog
from caption_train.model import CaptionModel, model_config
from caption_train.objectives import CrossEntropy, Objective
from caption_train.optimizer import FusedAdam
from caption_train.plots import plot_losses
from caption_train.precision import dtype_of_products
from caption_train.schedules import learning_rate
from caption_train.settings import Settings, TrainingSettings
from caption_train.sources import FeatureSource
from caption_train.validation import Validation

logger = logging.getLogger(__name__)

LAST, BEST, START = "last", "best", "start"
LOSS_CURVE = "loss.png"
_KEPT_CHECKPOINTS = 5

MakeObjective = Callable[[CaptionModel], Objective]
"""From the model that learns to what it learns."""


class _Share(NamedTuple):
    """What a replica learns from in a step."""

    batch: Batch
    """Captions."""
    photos: NDArray[np.int64]
    """Indices of the photos in the training data, int64 [n]."""
    counts: bool
    """False where the whole batch has too few photos for all replicas."""


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
        workers: Distribution | None = None,
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
            workers: The devices and processes that train together, in whose scope the source was made; one device, if
                not given.

        Raises:
            TrainingError: The checkpoint does not fit the settings, or the workers have different runs before them.
        """
        chosen = settings.training
        self._workers = workers or Distribution()
        self.settings, self.train_data, self.source, self.folder = settings, train, source, folder
        self._pad = vocabulary.pad_id
        self.steps_an_epoch = math.ceil(len(train) / chosen.batch_size)
        self.total_steps = self.steps_an_epoch * chosen.epochs
        config = model_config(settings, *source.grid_shape, len(vocabulary))
        keras.utils.set_random_seed(chosen.seed)
        with self._workers.scope():
            self.model = CaptionModel(config, dtype_of_products(chosen.precision))
            self.optimizer = _adam(chosen, self.total_steps, self.model.trainable_variables)
            self._taught = [(self.optimizer, self.model.trainable_variables)]
            optimizers = {"optimizer": self.optimizer}
            if source.variables:
                slower = replace(chosen, learning_rate=settings.extractor.learning_rate)
                optimizers["extractor_optimizer"] = _adam(slower, self.total_steps, source.variables)
                self._taught.append((optimizers["extractor_optimizer"], source.variables))
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
            **optimizers,
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
        with contextlib.ExitStack() as stack:
            log = None
            if self._workers.is_chief:
                self._make_whole(history)
                log = stack.enter_context(RunLog(self.folder, int(self.step)))
            while not self.finished:
                started = time.monotonic()
                epoch, position = divmod(int(self.step), self.steps_an_epoch)
                for shares in self._batches(epoch, position):
                    record = self._take_step(shares)
                    if log is not None:
                        log.step(record)
                    on_step(record["step"], record["loss"])
                    self._save_between(record["step"])
                self._end_epoch(epoch + 1, history, log, time.monotonic() - started)
        return history

    def _make_whole(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Take away what was written after the checkpoint, and write what a kill at an epoch's end left out."""
        rewrite_json_lines(self.folder / HISTORY, history)
        if history:
            plot_losses(history, self.folder / LOSS_CURVE)
        if history and history[-1]["step"] == int(self.step) and not int(self.stale):
            self.source.save(self.folder)

    def _begin(self) -> None:
        if self._last.restore():
            logger.info("going on after step %d of %d", int(self.step), self.total_steps)
        elif (self.folder / START).exists():
            start = latest_checkpoint(self.folder / START)
            if start is None:
                raise TrainingError(
                    f"{self.folder / START} has no checkpoint to begin with: begin anew in another folder"
                )
            read_checkpoint(start, {"encoder": self.model.encoder, "decoder": self.model.decoder})
        if not self._workers.agree(int(self.step)) or not self._workers.agree(len(self.train_data)):
            raise TrainingError(
                f"the workers have not the same checkpoints or captions: {self.folder} and the data must be one folder "
                "that all of them see"
            )

    def _batches(self, epoch: int, position: int) -> Iterator[list[_Share]]:
        """The batches of an epoch from one on, as this process' shares of them; the next one is read meanwhile."""
        chosen = self.settings.training
        order = batches_of_epoch(self.train_data, chosen.batch_size, chosen.seed, epoch, chosen.grouping)[position:]
        with ThreadPoolExecutor(1, "batches") as reader:
            ahead = None
            for captions in [*order, None]:
                made, ahead = ahead, None
                if captions is not None:
                    ahead = reader.submit(self._load, captions)
                if made is not None:
                    yield made.result()

    def _load(self, captions: NDArray[np.int64]) -> list[_Share]:
        """What each replica of this process learns from in a step."""
        shares = []
        for chosen in self._workers.shares(self.train_data.photo_of[captions]):
            # A replica for which the last batch of an epoch has nothing computes something that does not count.
            here = captions[chosen] if len(chosen) else captions[:1]
            shares.append(_Share(*load_batch(self.train_data, here, self.source, self._pad), counts=len(chosen) > 0))
        return shares

    def _take_step(self, shares: Sequence[_Share]) -> dict[str, Any]:
        """One step; gives what the logs are to say of it."""
        started, step = time.monotonic(), int(self.step)
        seed = np.array([self.settings.training.seed, step], np.int32)
        rate = float(self.optimizer.learning_rate)
        with tensorflow_errors(f"step {step}"):
            prepared = [self.objective.prepare(share.batch, share.photos, step) for share in shares]
            batches = [batch for batch, _ in prepared]
            normalisers = [
                share.counts * self.objective.normaliser(batch) for share, batch in zip(shares, batches, strict=True)
            ]
            sums = self._train_step(batches, np.array(normalisers, np.float32), seed)
            total, cross_entropy, words, normaliser = (float(x) for x in sums)
        if not math.isfinite(total):
            raise TrainingError(f"the loss is {total} at step {step}: lower the learning rate in a new run folder")
        self.step.assign_add(1)
        self._sums.assign_add([cross_entropy, words])
        seconds = time.monotonic() - started
        return {
            "step": step + 1,
            "epoch": step // self.steps_an_epoch + 1,
            "objective": total / normaliser,
            "loss": cross_entropy / words,
            "learning_rate": rate,
            "captions_per_second": round(sum(len(batch.tokens) for batch in batches) / seconds, 1),
            **_mean([facts for _, facts in prepared], normalisers),
        }

    def _save_between(self, step: int) -> None:
        """Write a checkpoint after a step within an epoch, where one is due."""
        due = step % self.settings.training.checkpoint_steps == 0 and step % self.steps_an_epoch
        if due and self._workers.is_chief:
            self._last.save(step)

    def _end_epoch(self, epoch: int, history: list[dict[str, Any]], log: RunLog | None, seconds: float) -> None:
        """Validate, and write down what came of it: the chief does, and the others are told whether it was better."""
        total, words = (float(x) for x in self._sums.numpy())
        found = self.validation.run() if log is not None else None
        rank = tuple(self._workers.from_chief(_rank(found.record) if found else (0.0, 0.0)))
        better = rank > tuple(self.best.numpy())
        self._sums.assign([0.0, 0.0])
        if better:
            self.best.assign(rank)
            self.stale.assign(0)
        else:
            self.stale.assign_add(1)
        if found is None or log is None:
            return
        record = {
            "epoch": epoch,
            "step": int(self.step),
            "loss": total / words,
            "tutorial_loss": tutorial_loss(total, self.train_data),
            **found.record,
            "seconds": round(seconds, 1),
        }
        history.append(record)
        if better:
            self._best.save(int(self.step))
        self.validation.draw_sheet(found, self.folder, epoch)
        # The record goes first: should the run die in between, the epoch's end is computed and written again.
        append_json_line(self.folder / HISTORY, record)
        self._last.save(int(self.step))
        if better:
            self.source.save(self.folder)  # after the last checkpoint: what a run begins with stays until there is one
        log.epoch(record)
        plot_losses(history, self.folder / LOSS_CURVE)
        logger.info(
            "epoch %d of %d: loss %.4f, validation loss %.4f, perplexity %.2f, CIDEr %.4f, BLEU-4 %.2f",
            *(epoch, self.settings.training.epochs, record["loss"], record["val_loss"]),
            *(record["perplexity"], record["CIDEr"], record["BLEU-4"]),
        )
        if self.finished and int(self.step) < self.total_steps:
            logger.info("no better CIDEr in %d epochs: training ends here", int(self.stale))

    def _compile(self) -> Callable[..., Any]:
        """The step in a graph, one for captions of every length; see `replica_step`."""
        batch = Batch(
            tf.TensorSpec((None, *self.source.loaded_shape), tf.float16),
            tf.TensorSpec((None,), tf.int32),
            tf.TensorSpec((None, None), tf.int64),
            tf.TensorSpec((None,), tf.float32),
        )

        def step(batches: list[Batch], normalisers: tf.Tensor, seed: tf.Tensor) -> list[tf.Tensor]:
            return self._workers.run(
                lambda here, replica: self.replica_step(batches[here], normalisers[here], self._seed(seed, replica))
            )

        signature = [[batch] * self._workers.local, tf.TensorSpec((None,), tf.float32), tf.TensorSpec((2,), tf.int32)]
        compiled: Callable[..., Any] = tf.function(step, input_signature=signature, autograph=False)
        return compiled

    def _seed(self, seed: tf.Tensor, replica: int) -> tf.Tensor:
        """Of a replica's dropout."""
        return seed if self._workers.replicas == 1 else tf.random.experimental.stateless_fold_in(seed, replica)

    def replica_step(self, batch: Batch, normaliser: tf.Tensor, seed: tf.Tensor) -> list[tf.Tensor]:
        """One step of a replica, with its share of the batch.

        Args:
            batch: Tensors.
            normaliser: The share's part of what the loss of the whole batch is divided by; 0 where the share does not
                count. Float32, a scalar.
            seed: int32 [2], of the dropout.

        Returns:
            Loss, cross-entropy and words of the whole batch, each a sum (see `caption_train.objectives.Loss`), and
            what the loss is divided by.
        """
        taught = [variable for _, variables in self._taught for variable in variables]
        replicas, counts = self._workers.replicas, tf.sign(normaliser)
        (whole,) = self._workers.all_reduce([normaliser])
        with tf.GradientTape() as tape:
            loss = self.objective.loss(self.model, self.source.grid(batch.loaded, training=True), batch, seed)
            total = loss.total * counts
            scaled = total / (whole * replicas)  # Keras' optimisers sum over the replicas once more
        # Keras' variables hold TensorFlow's, of which the tape knows what a missing gradient looks like. The
        # attention's V has a bias for the sake of the tutorial's checkpoints, and no gradient.
        mine = tape.gradient(scaled, [x.value for x in taught], unconnected_gradients=tf.UnconnectedGradients.ZERO)
        sums = self._workers.all_reduce([total, loss.cross_entropy * counts, loss.words * counts])
        gradients = [tf.convert_to_tensor(gradient) for gradient in self._workers.all_reduce(mine)]
        gradients = _clipped(gradients, self.settings.training.clip_norm / replicas)
        done = 0
        for optimizer, variables in self._taught:
            optimizer.apply(gradients[done : done + len(variables)], variables)
            done += len(variables)
        return [*sums, whole]


def _clipped(gradients: list[tf.Tensor], most: float) -> list[tf.Tensor]:
    """Gradients scaled down to a global norm; 0 leaves them as they are. Most are short enough and are not touched."""
    if not most:
        return gradients
    norm = tf.linalg.global_norm(gradients)
    clipped: list[tf.Tensor] = tf.cond(
        norm > most, lambda: [gradient * (most / norm) for gradient in gradients], lambda: gradients
    )
    return clipped


def _mean(facts: Sequence[Mapping[str, float]], weights: Sequence[float]) -> dict[str, float]:
    """What an objective says of the shares of a process together; where none of them counts, all do alike."""
    weights = weights if any(weights) else [1.0] * len(facts)
    parts = [weight / sum(weights) for weight in weights]
    return {name: sum(part * each[name] for part, each in zip(parts, facts, strict=True)) for name in facts[0]}


def _adam(settings: TrainingSettings, total_steps: int, variables: Sequence[Any]) -> keras.optimizers.Optimizer:
    optimizer = FusedAdam(learning_rate(settings, total_steps))
    optimizer.build(variables)
    return optimizer


def _rank(record: Mapping[str, Any]) -> tuple[float, float]:
    """What makes an epoch the best: CIDEr, and where that does not tell, as with a single photo, the loss."""
    return record["CIDEr"], -record["val_loss"]

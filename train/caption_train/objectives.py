"""How a training step computes its loss: cross-entropy with teacher forcing, regularised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from caption_train.batches import Batch
from caption_train.model import CaptionModel


class Loss(NamedTuple):
    """A batch's loss in sums, so that shares of a batch on several machines add up to the whole one's."""

    total: tf.Tensor
    """What is minimised once it is divided by the batch's `Objective.normaliser`; float32, a scalar."""
    cross_entropy: tf.Tensor
    """Of all words, in nats, without smoothing, weights and penalties; float32, a scalar."""
    words: tf.Tensor
    """How many words that are; float32, a scalar."""


class Objective(Protocol):
    """What the captioner is trained for. `prepare` runs on the host, `loss` is traced into the step."""

    def prepare(self, batch: Batch, photos: NDArray[np.int64], step: int) -> tuple[Batch, Mapping[str, float]]:
        """The batch that the step really learns from, and what the logs are to say of it.

        Args:
            batch: Real captions, and what was loaded of their photos.
            photos: Indices of the n photos in the training data, int64 [n].
            step: Of the step, from 0; all that is random here follows from it and the run's seed.

        Returns:
            For cross-entropy the batch itself; for self-critical training captions that were drawn from the model,
            their weights being their rewards (see `caption_train.batches.make_batch`).
        """

    def normaliser(self, batch: Batch) -> float:
        """What the loss of the whole batch is divided by, known before the step."""

    def loss(self, model: CaptionModel, grid: tf.Tensor, batch: Batch, seed: tf.Tensor | None) -> Loss:
        """The loss of a batch, or of a replica's share of one.

        Args:
            model: The captioner.
            grid: The photos' grids, of a floating type, [n, P, C].
            batch: Tensors.
            seed: int32 [2] of the dropout; None for no dropout.
        """


class CrossEntropy:
    """The words' cross-entropy with teacher forcing, label smoothing and the paper's penalty on attention.

    For each caption, weighted by ``batch.weights``, the loss is that of Xu et al. 2015, equation 14::

        sum_t -log P(y_t) + attention_penalty * sum_i (1 - sum_t alpha_ti)^2

    and is divided by the number of words of the batch.
    """

    def __init__(self, pad_id: int, label_smoothing: float = 0.0, attention_penalty: float = 0.0) -> None:
        """Take what is regularised.

        Args:
            pad_id: Token id of what is no word.
            label_smoothing: Share of the target probability that is spread evenly over all words (Szegedy et al. 2016,
                section 7).
            attention_penalty: The paper's lambda; 0 leaves the term out.
        """
        self._pad, self._smoothing, self._penalty = pad_id, label_smoothing, attention_penalty

    def prepare(self, batch: Batch, photos: NDArray[np.int64], step: int) -> tuple[Batch, Mapping[str, float]]:
        """The real captions as they are; see `Objective`."""
        return batch, {}

    def normaliser(self, batch: Batch) -> float:
        """The number of words."""
        return float(np.count_nonzero(batch.tokens[:, 1:] != self._pad))

    def loss(self, model: CaptionModel, grid: tf.Tensor, batch: Batch, seed: tf.Tensor | None) -> Loss:
        """The sums; see `Objective` and the class."""
        taught = model.teach(grid, batch.photos, batch.tokens, pad_id=self._pad, seed=seed)
        each = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=taught.targets, logits=taught.logits)
        smoothed = each
        if self._smoothing:
            spread = tf.reduce_logsumexp(taught.logits, axis=1) - tf.reduce_mean(taught.logits, axis=1)
            smoothed = each + self._smoothing * (spread - each)
        total = tf.reduce_sum(smoothed * tf.gather(batch.weights, taught.captions))
        if self._penalty:
            missed = tf.reduce_sum(tf.square(1 - taught.attention), axis=1)  # [m]
            total += self._penalty * tf.reduce_sum(missed * batch.weights)
        return Loss(total, tf.reduce_sum(each), tf.cast(tf.size(each), tf.float32))

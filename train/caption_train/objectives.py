"""How a training step computes its loss: cross-entropy with teacher forcing, regularised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

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
        each = cross_entropy(taught.logits, taught.targets)
        smoothed = cross_entropy(taught.logits, taught.targets, self._smoothing) if self._smoothing else each
        total = tf.reduce_sum(smoothed * tf.gather(batch.weights, taught.captions))
        if self._penalty:
            missed = tf.reduce_sum(tf.square(1 - taught.attention), axis=1)  # [m]
            total += self._penalty * tf.reduce_sum(missed * batch.weights)
        return Loss(total, tf.reduce_sum(each), tf.cast(tf.size(each), tf.float32))


def cross_entropy(logits: tf.Tensor, targets: tf.Tensor, smoothing: float = 0.0) -> tf.Tensor:
    """The cross-entropy of words, in a third of the time of TensorFlow's own.

    Its softmax is oneDNN's, which both the value and the gradient take;
    `tf.nn.sparse_softmax_cross_entropy_with_logits` goes over all logits a dozen times.

    Args:
        logits: float32 [N, V].
        targets: The right words, int64 [N].
        smoothing: Share of the target probability that is spread evenly over all words (Szegedy et al. 2016,
            section 7).

    Returns:
        In nats, float32 [N].
    """

    @tf.custom_gradient
    def differentiable(logits: tf.Tensor) -> Any:
        probabilities = tf.nn.softmax(logits)
        # log(sum(exp(x))) from the largest logit, whose probability is never too small for its logarithm.
        normaliser = tf.reduce_max(logits, axis=1) - tf.math.log(tf.reduce_max(probabilities, axis=1))
        places = tf.stack([tf.range(tf.size(targets, tf.int64), dtype=tf.int64), targets], axis=1)
        value = normaliser - (1 - smoothing) * tf.gather_nd(logits, places)
        if smoothing:
            value -= smoothing * tf.reduce_mean(logits, axis=1)

        def backward(d_value: tf.Tensor) -> tf.Tensor:
            d_logits = probabilities * d_value[:, tf.newaxis]
            if smoothing:
                d_logits -= (smoothing / logits.shape[1]) * d_value[:, tf.newaxis]
            return tf.tensor_scatter_nd_sub(d_logits, places, (1 - smoothing) * d_value)

        return value, backward

    losses: tf.Tensor = differentiable(logits)
    return losses

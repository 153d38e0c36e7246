"""In what units a student's grid is held against its teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from caption_train.distill_views import Views


@dataclass(frozen=True)
class Scale:
    """What the teacher's channels are like over the held-out photos: each counts by how much of its variance is met.

    It is the channels' roots that are learnt: a channel after its ReLU has a long tail, and a third of the squared
    error would come from it (Perronnin et al. 2010, "Improving the Fisher Kernel", section 3.2).
    """

    mean: NDArray[np.float32]
    """Of the roots, float32 [C]."""
    deviation: NDArray[np.float32]
    """Standard deviation over all places, float32 [C]."""
    deviation_of_means: NDArray[np.float32]
    """That of a photo's mean over its places, in units of `deviation`, float32 [C]."""

    @classmethod
    def of(cls, views: Views) -> Scale:
        """Measure it."""
        roots = np.sqrt(np.maximum(views.cache.gather(views.rows).astype(np.float32), 0))
        # A channel that never fires has no scale of its own; the floors keep noise in it from counting.
        mean, deviation = roots.mean((0, 1)), np.maximum(roots.std((0, 1)), 1e-2)
        return cls(mean, deviation, np.maximum((roots.mean(1) / deviation).std(0), 5e-2))

    def target(self, grids: Any, shape: tuple[int, int, int]) -> tf.Tensor:
        """The teacher's grids float16 [n, P, C] as float32 [n, rows, columns, C], each channel's root normalised."""
        roots = tf.sqrt(tf.maximum(tf.cast(grids, tf.float32), 0))
        return tf.reshape((roots - self.mean) / self.deviation, (-1, *shape))

    def grid(self, target: NDArray[np.float32]) -> NDArray[np.float32]:
        """The way back: float32 [n, rows, columns, C] to grids [n, P, C]."""
        roots: NDArray[np.float32] = np.maximum(target * self.deviation + self.mean, 0)
        return (roots * roots).reshape(len(target), -1, target.shape[-1])

    def errors(self, prediction: tf.Tensor, target: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Mean squared errors at each place, and of a photo's means; the teacher's variance is 1 in both.

        The means say what is to be seen rather than where, which is most of what a caption needs.
        """
        error = prediction - target
        means = tf.reduce_mean(error, (1, 2)) / self.deviation_of_means
        return tf.reduce_mean(tf.square(error)), tf.reduce_mean(tf.square(means))

"""How the learning rate goes over a run."""

from __future__ import annotations

import math
from typing import Any

import keras


@keras.saving.register_keras_serializable(package="caption_train")
class WarmupCosine(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up over the first 3 % of the steps, then a cosine to zero (Loshchilov and Hutter 2017)."""

    def __init__(self, peak: float, total_steps: int) -> None:
        """Take the highest rate and the number of steps of the whole run."""
        self.peak, self.total_steps = peak, total_steps

    def __call__(self, step: Any) -> Any:
        """The rate at a step, a scalar tensor."""
        warmup = max(1.0, 0.03 * self.total_steps)
        position = keras.ops.cast(step, "float32")
        cosine = 0.5 * (1 + keras.ops.cos(math.pi * keras.ops.minimum(position / self.total_steps, 1.0)))
        return self.peak * keras.ops.minimum((position + 1) / warmup, cosine)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, as Keras asks for."""
        return {"peak": self.peak, "total_steps": self.total_steps}

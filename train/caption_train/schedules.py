"""How the learning rate goes over a run."""

from __future__ import annotations

import math
from typing import Any

import keras

from caption_train.settings import TrainingSettings


@keras.saving.register_keras_serializable(package="caption_train")
class WarmupCosine(keras.optimizers.schedules.LearningRateSchedule):
    """A linear warm-up, then a cosine to zero (Loshchilov and Hutter 2017)."""

    def __init__(self, peak: float, total_steps: int, warmup: float = 0.03) -> None:
        """Take the highest rate, the number of steps of the whole run, and in which share of them the rate rises."""
        self.peak, self.total_steps, self.warmup = peak, total_steps, warmup

    def __call__(self, step: Any) -> Any:
        """The rate at a step, a scalar tensor."""
        warmup = max(1.0, self.warmup * self.total_steps)
        position = keras.ops.cast(step, "float32")
        cosine = 0.5 * (1 + keras.ops.cos(math.pi * keras.ops.minimum(position / self.total_steps, 1.0)))
        return self.peak * keras.ops.minimum((position + 1) / warmup, cosine)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, as Keras asks for."""
        return {"peak": self.peak, "total_steps": self.total_steps, "warmup": self.warmup}


def learning_rate(settings: TrainingSettings, total_steps: int) -> float | WarmupCosine:
    """What Adam is given for the rate of a run of so many steps."""
    if settings.schedule == "constant":
        return settings.learning_rate
    return WarmupCosine(settings.learning_rate, total_steps, settings.warmup)

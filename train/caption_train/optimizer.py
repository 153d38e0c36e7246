"""Adam whose step goes over a variable once."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable(package="caption_train")
class FusedAdam(keras.optimizers.Adam):
    """Keras' Adam (Kingma and Ba 2015, the form before section 2.1) with TensorFlow's kernel for it.

    Keras makes the step of a dozen operations, each of which goes over all values. The numbers are the same but for
    rounding. Under a `tf.distribute` strategy, whose variables the kernel does not know, it is Keras' own.
    """

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """One variable's step; see `keras.optimizers.Optimizer`. The variable is TensorFlow's."""
        if tf.distribute.has_strategy() or self.amsgrad:
            super().update_step(gradient, variable, learning_rate)
            return
        step = tf.cast(self.iterations.value + 1, tf.float32)
        index = self._get_variable_index(variable)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[index].value.handle,
            v=self._velocities[index].value.handle,
            beta1_power=tf.pow(self.beta_1, step),
            beta2_power=tf.pow(self.beta_2, step),
            lr=tf.cast(learning_rate, tf.float32),
            beta1=self.beta_1,
            beta2=self.beta_2,
            epsilon=self.epsilon,
            grad=tf.convert_to_tensor(gradient),
        )

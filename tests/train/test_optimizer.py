from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from caption_train.optimizer import FusedAdam

pytestmark = pytest.mark.tf


def traced(optimizer: keras.optimizers.Optimizer, variables: list[Any]) -> Callable[[list[tf.Tensor]], None]:
    return tf.function(lambda gradients: optimizer.apply(gradients, variables))


def test_its_steps_are_those_of_keras_adam() -> None:
    rng = np.random.default_rng(0)
    starts = [rng.normal(size=shape).astype(np.float32) for shape in ((7, 3), (3,))]
    runs = []
    for kind in (FusedAdam, keras.optimizers.Adam):
        variables = [keras.Variable(start) for start in starts]
        optimizer = kind(0.03, global_clipnorm=1.5)
        optimizer.build(variables)
        step = traced(optimizer, variables)
        draws = np.random.default_rng(1)
        for _ in range(20):
            step([tf.constant(draws.normal(size=start.shape).astype(np.float32)) for start in starts])
        assert int(optimizer.iterations) == 20
        runs.append(([np.asarray(x) for x in optimizer.variables], [np.asarray(x) for x in variables]))
    for mine, theirs in zip(*runs, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert np.abs(runs[0][1][0] - starts[0]).max() > 0.1

"""The recurrence and its hand-written gradient against a plain loop and automatic differentiation."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from caption_train.recurrence import Weights, plan, unroll

pytestmark = pytest.mark.tf

PHOTOS, PLACES, SIZE, ATTENTION, UNITS = 3, 6, 4, 5, 7
LENGTHS = (5, 4, 4, 2, 1)  # the longest first
PHOTO_OF = (2, 0, 2, 2, 0)  # none is of the second photo


def make_arguments(seed: int = 0) -> list[tf.Tensor]:
    rng = np.random.default_rng(seed)
    shapes = [
        (sum(LENGTHS), 3 * UNITS),
        (len(LENGTHS), UNITS),
        (PHOTOS, PLACES, SIZE),
        (PHOTOS, PLACES, ATTENTION),
        (UNITS, ATTENTION + 3 * UNITS),
        (ATTENTION + 3 * UNITS,),
        (ATTENTION, 1),
        (SIZE, 3 * UNITS),
    ]
    return [tf.constant(rng.normal(0, 0.7, shape), tf.float32) for shape in shapes]


def is_word() -> tf.Tensor:
    return tf.sequence_mask(LENGTHS, max(LENGTHS) + 2)  # padded further than need be


def plain(arguments: list[tf.Tensor], carry: bool) -> tuple[tf.Tensor, tf.Tensor]:
    """The same, caption by caption and word by word, from the equations."""
    inputs, states, features, keys, state_kernel, state_bias, score, context_kernel = arguments
    at = {}  # of caption and word, the place in `inputs`
    for word in range(max(LENGTHS)):
        for caption, length in enumerate(LENGTHS):
            if word < length:
                at[caption, word] = len(at)
    outputs: dict[int, tf.Tensor] = {}
    attended = []
    for caption, (length, photo) in enumerate(zip(LENGTHS, PHOTO_OF, strict=True)):
        state, total = states[caption : caption + 1], tf.zeros((1, PLACES))
        for word in range(length):
            query, *from_state = tf.split(state @ state_kernel + state_bias, [ATTENTION, *[UNITS] * 3], axis=1)
            attention = tf.nn.softmax(tf.transpose(tf.tanh(keys[photo] + query) @ score))
            place = at[caption, word]
            z, r, h = tf.split(inputs[place : place + 1] + attention @ features[photo] @ context_kernel, 3, axis=1)
            update, reset = tf.sigmoid(z + from_state[0]), tf.sigmoid(r + from_state[1])
            candidate = tf.tanh(h + reset * from_state[2])
            state = update * (state if carry else 0.0) + (1 - update) * candidate
            outputs[place] = state
            total += attention
        attended.append(total)
    return tf.concat([outputs[place] for place in range(len(at))], 0), tf.concat(attended, 0)


def gradients(function: Any, arguments: list[tf.Tensor]) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """Results, and the gradients of a number in which every result has a weight of its own."""
    rng = np.random.default_rng(9)
    with tf.GradientTape() as tape:
        tape.watch(arguments)
        results = function(arguments)
        loss = tf.add_n([tf.reduce_sum(tf.sin(x) * rng.normal(size=x.shape).astype(np.float32)) for x in results])
    return list(results), tape.gradient(loss, arguments)


def ours(carry: bool, dtype: tf.DType = tf.float32) -> Any:
    def function(arguments: list[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        chosen = plan(tf.constant(PHOTO_OF, tf.int32), is_word())
        return unroll(*arguments[:4], Weights(*arguments[4:]), chosen, carry=carry, dtype=dtype)

    return function


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("traced", [True, False])
def test_results_and_gradients_are_those_of_the_plain_loop(carry: bool, traced: bool) -> None:
    function = tf.function(ours(carry)) if traced else ours(carry)
    results, mine = gradients(function, make_arguments())
    expected, theirs = gradients(lambda arguments: plain(arguments, carry), make_arguments())
    for one, other in zip(results, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    for one, other in zip(mine, theirs, strict=True):
        assert np.abs(other).max() > 0.1
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_near() -> None:
    results, mine = gradients(ours(True, tf.bfloat16), make_arguments())
    expected, theirs = gradients(ours(True), make_arguments())
    for one, other in zip([*results, *mine], [*expected, *theirs], strict=True):
        assert one.dtype == tf.float32
        assert 0 < np.abs(one - other).max() < 0.02 * np.abs(other).max()


def test_the_plan() -> None:
    made = plan(tf.constant(PHOTO_OF), is_word())
    assert made.active.numpy().tolist() == [5, 4, 3, 3, 1]
    assert made.starts.numpy().tolist() == [0, 5, 9, 12, 15]

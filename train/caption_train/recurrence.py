"""Attention and GRU over whole captions with teacher forcing: what makes training fast.

Two things set this apart from a loop that is left to automatic differentiation. Captions that have ended take no part:
with the longest caption first, word t is computed for the first ``active[t]`` rows alone. And the gradient is written
by hand, so that going back a word costs only what depends on the next one: every weight's gradient is one matrix
product over all words, after the loop. `tests/train/test_recurrence.py` holds it against automatic differentiation.

Shapes: n photos, m captions, N words of all captions together (word by word: all first ones, then all second ones, and
so on), T words of the longest caption, P places, E features, A attention units, U GRU units.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf


class Weights(NamedTuple):
    """The weights that take part in the recurrence; float32."""

    state_kernel: tf.Tensor
    """[U, A + 3U]: the attention's W2 beside the GRU's recurrent kernel, since both multiply the state."""
    state_bias: tf.Tensor
    """[A + 3U]."""
    score: tf.Tensor
    """[A, 1]: the attention's V. (The softmax after it takes no notice of a bias.)"""
    context_kernel: tf.Tensor
    """[E, 3U]: the rows of the GRU's kernel that multiply the context."""


class Plan(NamedTuple):
    """Which rows are computed at which word."""

    photos: tf.Tensor
    """Which of the n photos each caption is of, int32 [m]."""
    active: tf.Tensor
    """Captions that have a word t, which are the first ones: int32 [T], falling, the first one m."""
    starts: tf.Tensor
    """Where the words t begin among all N, int32 [T]."""


def plan(photos: tf.Tensor, is_word: tf.Tensor) -> Plan:
    """See which rows are computed when.

    Args:
        photos: Which of the n photos each caption is of, int32 [m].
        is_word: What of the captions is no padding, bool [m, T], the longest caption first.
    """
    active = tf.reduce_sum(tf.cast(is_word, tf.int32), axis=0)
    active = tf.boolean_mask(active, active > 0)
    return Plan(photos, active, tf.cumsum(active, exclusive=True))


def unroll(
    inputs: tf.Tensor,
    state: tf.Tensor,
    features: tf.Tensor,
    keys: tf.Tensor,
    weights: Weights,
    plan: Plan,
    *,
    carry: bool,
    dtype: tf.DType = tf.float32,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Go through all words of all captions.

    Args:
        inputs: What the GRU's kernel makes of the words' embeddings, its input bias added: float32 [N, 3U].
        state: Before the first word, float32 [m, U].
        features: float32 [n, P, E].
        keys: float32 [n, P, A].
        weights: See there.
        plan: See there.
        carry: Whether the GRU's state goes from word to word; the attention sees the last one in either case.
        dtype: Of the matrix products with weights; what is added up is float32 throughout.

    Returns:
        The GRU's outputs float32 [N, U], and the sum of each caption's attention over its words float32 [m, P].
    """

    @tf.custom_gradient
    def differentiable(
        inputs: tf.Tensor, state: tf.Tensor, features: tf.Tensor, keys: tf.Tensor, *weights: tf.Tensor
    ) -> Any:
        loop = _Loop(inputs, state, features, keys, Weights(*weights), plan, 1.0 if carry else 0.0, dtype)
        return loop.forward(), loop.backward

    outputs, attention = differentiable(inputs, state, features, keys, *weights)
    return outputs, attention


class _Loop:
    """One unrolling: `forward` keeps in lists, an element a word, what `backward` needs."""

    def __init__(
        self,
        inputs: tf.Tensor,
        state: tf.Tensor,
        features: tf.Tensor,
        keys: tf.Tensor,
        weights: Weights,
        plan: Plan,
        carry: float,
        dtype: tf.DType,
    ) -> None:
        self.inputs, self.state, self.weights, self.plan = inputs, state, weights, plan
        self.carry, self.dtype = carry, dtype
        self.features = tf.gather(features, plan.photos)  # [m, P, E]
        self.keys = tf.gather(keys, plan.photos)  # [m, P, A]
        self.photos = tf.shape(keys)[0]
        self.captions, self.words = tf.shape(state)[0], tf.size(plan.active)
        self.places, self.features_size, self.attention_units = keys.shape[1], features.shape[2], keys.shape[2]
        self.units = state.shape[1]
        self.state_kernel = tf.cast(weights.state_kernel, dtype)
        self.context_kernel = tf.cast(weights.context_kernel, dtype)

    def forward(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Outputs [N, U] and the sum of attention [m, P]."""
        units, places = self.units, self.places
        shapes = {
            "before": (units,),  # the state before the word
            "looked": (places, self.attention_units),  # tanh(keys + query)
            "attention": (places,),
            "context": (self.features_size,),
            "update": (units,),
            "reset": (units,),
            "from_state": (units,),  # the candidate's share of the state, before the reset gate
            "candidate": (units,),
            "output": (units,),
        }
        kept = {name: self._list(*shape) for name, shape in shapes.items()}

        def word(t: tf.Tensor, state: tf.Tensor, attended: tf.Tensor, kept: dict[str, Any]) -> Any:
            count, start = self.plan.active[t], self.plan.starts[t]
            made = self._word(state[:count], self.inputs[start : start + count], count)
            kept = {name: kept[name].write(t, made[name]) for name in kept}
            return t + 1, made["output"], attended + self._pad(made["attention"], self.captions), kept

        attended = tf.zeros((self.captions, places))
        _, _, attended, self._kept = tf.while_loop(
            lambda t, *_: t < self.words,
            word,
            (0, self.state, attended, kept),
            shape_invariants=(
                tf.TensorShape(()),
                tf.TensorShape((None, units)),
                attended.shape,
                {name: tf.TensorShape(None) for name in kept},
            ),
        )
        return self._kept["output"].concat(), attended

    def _word(self, state: tf.Tensor, inputs: tf.Tensor, count: tf.Tensor) -> dict[str, tf.Tensor]:
        """One word of k captions: Bahdanau's attention, then the GRU of Cho et al. 2014, reset after the product."""
        units = self.units
        from_state = self._product(state, self.state_kernel) + self.weights.state_bias
        query, from_z, from_r, from_h = tf.split(from_state, [self.attention_units, *[units] * 3], axis=1)
        looked = tf.tanh(self.keys[:count] + query[:, tf.newaxis])  # [k, P, A]
        flat = tf.reshape(looked, (-1, self.attention_units))
        attention = tf.nn.softmax(tf.reshape(tf.matmul(flat, self.weights.score), (-1, self.places)))
        context = tf.matmul(attention[:, tf.newaxis], self.features[:count])[:, 0]  # [k, E]
        z, r, h = tf.split(inputs + self._product(context, self.context_kernel), 3, axis=1)
        update, reset = tf.sigmoid(z + from_z), tf.sigmoid(r + from_r)
        candidate = tf.tanh(h + reset * from_h)
        output = candidate + update * (self.carry * state - candidate)
        return {
            "before": state,
            "looked": looked,
            "attention": attention,
            "context": context,
            "update": update,
            "reset": reset,
            "from_state": from_h,
            "candidate": candidate,
            "output": output,
        }

    def backward(self, d_outputs: tf.Tensor, d_attended: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """Gradients of `unroll`'s arguments, from those of its results: [N, U] and [m, P]."""
        units, places, attention_units = self.units, self.places, self.attention_units
        lists = {
            "gates": self._list(3 * units),
            "from_state": self._list(attention_units + 3 * units),
            # Padded to m captions, so that one product over all words makes the features' gradient.
            "attention": self._list(places),
            "context": self._list(self.features_size),
        }
        sums = {
            "squares": tf.zeros((self.photos, places * attention_units)),
            "scores": tf.zeros((self.photos, places)),
            "score": tf.zeros((attention_units, 1)),
        }
        one_hot = tf.one_hot(self.plan.photos, self.photos, axis=0)  # [n, m]

        def word(t: tf.Tensor, d_state: tf.Tensor, sums: dict[str, tf.Tensor], lists: dict[str, Any]) -> Any:
            count, start = self.plan.active[t], self.plan.starts[t]
            kept = {name: values.read(t) for name, values in self._kept.items()}
            # A caption whose last word this is gets nothing from later ones.
            d_output = d_outputs[start : start + count] + self._pad(d_state, count)
            d_gates, d_recurrent, d_before = self._gru_backward(d_output, kept)
            d_context = self._product(d_gates, self.context_kernel, transpose=True)  # [k, E]
            d_query, more = self._attention_backward(d_context, d_attended[:count], kept, one_hot[:, :count])
            d_from_state = tf.concat([d_query, d_recurrent], axis=1)
            d_before += self._product(d_from_state, self.state_kernel, transpose=True)
            made = {
                "gates": d_gates,
                "from_state": d_from_state,
                "attention": self._pad(kept["attention"], self.captions),
                "context": self._pad(d_context, self.captions),
            }
            lists = {name: lists[name].write(t, made[name]) for name in lists}
            return t - 1, d_before, {name: sums[name] + more[name] for name in sums}, lists

        _, d_state, sums, lists = tf.while_loop(
            lambda t, *_: t >= 0,
            word,
            (self.words - 1, tf.zeros((0, units)), sums, lists),
            shape_invariants=(
                tf.TensorShape(()),
                tf.TensorShape((None, units)),
                {name: x.shape for name, x in sums.items()},
                {name: tf.TensorShape(None) for name in lists},
            ),
        )
        return self._gradients(d_state, sums, lists)

    def _gradients(
        self, d_state: tf.Tensor, sums: dict[str, tf.Tensor], lists: dict[str, Any]
    ) -> tuple[tf.Tensor, ...]:
        """What remains after the last (the first) word: products over all words."""
        d_gates, d_from_state = lists["gates"].concat(), lists["from_state"].concat()
        before, context = self._kept["before"].concat(), self._kept["context"].concat()
        attention, d_context = lists["attention"].stack(), lists["context"].stack()  # [T, m, P], [T, m, E]
        d_features = tf.matmul(tf.transpose(attention, (1, 2, 0)), tf.transpose(d_context, (1, 0, 2)))  # [m, P, E]
        d_features = tf.math.unsorted_segment_sum(d_features, self.plan.photos, self.photos)
        shape = (self.photos, self.places, self.attention_units)
        d_keys = self.weights.score[:, 0] * (sums["scores"][:, :, tf.newaxis] - tf.reshape(sums["squares"], shape))
        return (
            d_gates,
            d_state,
            d_features,
            d_keys,
            self._product(before, d_from_state, transpose_first=True),
            tf.reduce_sum(d_from_state, axis=0),
            sums["score"],
            self._product(context, d_gates, transpose_first=True),
        )

    def _gru_backward(self, d_output: tf.Tensor, kept: dict[str, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Gradients of the gates' sums and of what of them comes from the state, [k, 3U] each; of the state, [k, U]."""
        update, reset, candidate = kept["update"], kept["reset"], kept["candidate"]
        before = self.carry * kept["before"]
        d_z = d_output * (before - candidate) * update * (1 - update)
        d_h = d_output * (1 - update) * (1 - tf.square(candidate))
        d_r = d_h * kept["from_state"] * reset * (1 - reset)
        return (
            tf.concat([d_z, d_r, d_h], axis=1),
            tf.concat([d_z, d_r, d_h * reset], axis=1),
            self.carry * (d_output * update),
        )

    def _attention_backward(
        self, d_context: tf.Tensor, d_attended: tf.Tensor, kept: dict[str, tf.Tensor], one_hot: tf.Tensor
    ) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
        """The query's gradient [k, A], and what is summed up over words for the keys' and V's.

        The derivative of tanh is 1 - tanh^2: the 1 depends on no unit, so only the squares are summed at full size.
        """
        count = tf.shape(d_context)[0]
        looked, attention = kept["looked"], kept["attention"]
        d_attention = tf.matmul(self.features[:count], d_context[:, :, tf.newaxis])[:, :, 0] + d_attended
        d_scores = attention * (d_attention - tf.reduce_sum(attention * d_attention, axis=1, keepdims=True))  # [k, P]
        squares = tf.square(looked)  # [k, P, A]
        d_query = tf.reduce_sum(d_scores, axis=1, keepdims=True) - tf.matmul(d_scores[:, tf.newaxis], squares)[:, 0]
        weighted = tf.reshape(d_scores[:, :, tf.newaxis] * squares, (-1, self.places * self.attention_units))
        flat = tf.reshape(looked, (-1, self.attention_units))
        return d_query * self.weights.score[:, 0], {
            "squares": tf.matmul(one_hot, weighted),
            "scores": tf.matmul(one_hot, d_scores),
            "score": tf.matmul(flat, tf.reshape(d_scores, (-1, 1)), transpose_a=True),
        }

    def _product(
        self, x: tf.Tensor, y: tf.Tensor, *, transpose: bool = False, transpose_first: bool = False
    ) -> tf.Tensor:
        """A matrix product in `dtype`, given back as float32."""
        x, y = tf.cast(x, self.dtype), tf.cast(y, self.dtype)
        return tf.cast(tf.matmul(x, y, transpose_a=transpose_first, transpose_b=transpose), tf.float32)

    def _list(self, *shape: int) -> tf.TensorArray:
        """An element a word, each of another number of rows."""
        return tf.TensorArray(
            tf.float32, size=self.words, element_shape=(None, *shape), infer_shape=False, clear_after_read=False
        )

    @staticmethod
    def _pad(x: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
        """Rows of zeros below."""
        return tf.pad(x, [[0, rows - tf.shape(x)[0]], [0, 0]])

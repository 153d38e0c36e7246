"""The captioner's own networks: encoder, Bahdanau attention and GRU decoder.

Xu et al. 2015, "Show, Attend and Tell", as TensorFlow's image-captioning tutorial builds it. Attributes keep the
tutorial's names (``encoder.fc``; ``decoder.embedding``, ``.gru``, ``.fc1``, ``.fc2``, ``.attention.W1/W2/V``), so that
a checkpoint of either reads as one of the other. Shapes in comments: n photos, m rows (captions or hypotheses), T
words, P places, C channels, E features, A attention units, U GRU units, V words in the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from caption_rt.errors import OptionsError
from caption_rt.search import Step
from caption_train.recurrence import Weights, plan, unroll
from caption_train.settings import InitialState, Recurrence, Settings


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of encoder and decoder, and how the recurrence goes."""

    places: int
    """Places of the grid, rows x columns: 64 for InceptionV3 at 299 pixels."""
    channels: int
    """Channels of the grid: 2048 for InceptionV3's mixed10."""
    vocabulary_size: int
    """Words with the special ones: rows of the embedding, outputs of the last layer."""
    embedding_dim: int = 256
    """Size of a word's embedding and of a place's features (the tutorial's one number for both)."""
    units: int = 512
    """Units of the GRU, of the attention and of the first output layer (likewise one number)."""
    recurrence: Recurrence = "carry"
    """``carry``: the GRU's state goes from word to word. ``reset``: it starts at zero with each word and the last
    state reaches the attention alone, which is what the tutorial's code does."""
    dropout: float = 0.0
    """Share of the word embeddings' and of the GRU outputs' elements dropped in training (Srivastava et al. 2014)."""
    initial_state: InitialState = "zeros"
    """The GRU's state before the first word. ``mean``: a dense layer with tanh on the mean of the features (Xu et al.
    2015, section 3.1.2, f_init). ``zeros``: the tutorial."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            OptionsError: A size that is not positive, an unknown recurrence or initial state, a dropout outside [0, 1).
        """
        for name in ("places", "channels", "vocabulary_size", "embedding_dim", "units"):
            if getattr(self, name) < 1:
                raise OptionsError(f"model: {name} must be at least 1, not {getattr(self, name)}")
        if self.recurrence not in get_args(Recurrence):
            raise OptionsError(f"model: recurrence must be 'carry' or 'reset', not {self.recurrence!r}")
        if self.initial_state not in get_args(InitialState):
            raise OptionsError(f"model: initial_state must be 'mean' or 'zeros', not {self.initial_state!r}")
        if not 0 <= self.dropout < 1:
            raise OptionsError(f"model: dropout must lie in [0, 1), not {self.dropout}")


def model_config(settings: Settings, places: int, channels: int, vocabulary_size: int) -> ModelConfig:
    """The model of a run, given the grid and the vocabulary."""
    chosen = settings.model
    return ModelConfig(
        places,
        channels,
        vocabulary_size,
        chosen.embedding_dim,
        chosen.units,
        chosen.recurrence,
        chosen.dropout,
        chosen.initial_state,
    )


class Taught(NamedTuple):
    """What teacher forcing gives for m captions of N words together; padding is no word, ``<end>`` is one."""

    logits: tf.Tensor
    """float32 [N, V]: the first word of all captions, then the second one, and so on."""
    targets: tf.Tensor
    """The words that are to be predicted, int64 [N]."""
    captions: tf.Tensor
    """Which of the m captions each word is of, int32 [N]."""
    attention: tf.Tensor
    """Sum of each caption's attention over its words, float32 [m, P]."""


class BahdanauAttention(keras.layers.Layer):
    """Additive attention (Bahdanau et al. 2015, appendix A.1.2) with the keys computed beforehand."""

    def __init__(self, config: ModelConfig) -> None:
        """Make the three layers: W1 for the features, W2 for the state, V for the score."""
        super().__init__(name="attention")
        self.W1 = keras.layers.Dense(config.units, name="W1")
        self.W2 = keras.layers.Dense(config.units, name="W2")
        self.V = keras.layers.Dense(1, name="V")
        self.W1.build((None, config.places, config.embedding_dim))
        self.W2.build((None, config.units))
        self.V.build((None, config.places, config.units))
        self.built = True

    def call(self, features: tf.Tensor, keys: tf.Tensor, state: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Look at the places.

        Args:
            features: float32 [m, P, E].
            keys: float32 [m, P, A], W1 of the features.
            state: float32 [m, U].

        Returns:
            Context float32 [m, E], the features' weighted sum, and the weights float32 [m, P], which sum to 1.
        """
        query = self.W2(state)[:, tf.newaxis]  # [m, 1, A]
        scores = self.V(tf.tanh(keys + query))[:, :, 0]  # [m, P]
        weights = tf.nn.softmax(scores)
        context = tf.reduce_sum(weights[:, :, tf.newaxis] * features, axis=1)
        return context, weights


class Encoder(keras.Model):
    """One dense layer with ReLU on every place of the grid."""

    def __init__(self, config: ModelConfig) -> None:
        """Make and build the layer."""
        super().__init__(name="encoder")
        self.fc = keras.layers.Dense(config.embedding_dim, activation="relu", name="fc")
        self.fc.build((None, config.places, config.channels))
        self.built = True

    def call(self, grid: tf.Tensor) -> tf.Tensor:
        """Grid float32 [n, P, C] -> features float32 [n, P, E]."""
        return self.fc(grid)


class Decoder(keras.Model):
    """Embedding, attention, GRU and two output layers; `step` is one word."""

    def __init__(self, config: ModelConfig) -> None:
        """Make and build the layers."""
        super().__init__(name="decoder")
        self.config = config
        size, units = config.embedding_dim, config.units
        self.embedding = keras.layers.Embedding(config.vocabulary_size, size, name="embedding")
        self.gru = keras.layers.GRU(units, return_sequences=True, return_state=True, name="gru")
        self.fc1 = keras.layers.Dense(units, name="fc1")
        self.fc2 = keras.layers.Dense(config.vocabulary_size, name="fc2")
        self.attention = BahdanauAttention(config)
        if config.initial_state == "mean":
            self.init = keras.layers.Dense(units, activation="tanh", name="init")
            self.init.build((None, size))
        self.embedding.build((None,))
        self.gru.build((None, None, 2 * size))
        self.fc1.build((None, units))
        self.fc2.build((None, units))
        self.built = True

    def recur(
        self, embedded: tf.Tensor, state: tf.Tensor, features: tf.Tensor, keys: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Attend, then one step of the GRU.

        Args:
            embedded: The previous word's embedding, float32 [m, E].
            state: float32 [m, U].
            features: float32 [m, P, E].
            keys: float32 [m, P, A].

        Returns:
            The next state float32 [m, U] (the GRU's output as well) and the attention float32 [m, P].
        """
        context, weights = self.attention(features, keys, state)
        inputs = tf.concat([context, embedded], axis=-1)  # [m, 2E]
        before = state if self.config.recurrence == "carry" else tf.zeros_like(state)
        output, _ = self.gru.cell(inputs, [before])
        return output, weights

    def step(
        self, token: tf.Tensor, state: tf.Tensor, features: tf.Tensor, keys: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """One word: what ``decoder.onnx`` computes.

        Args:
            token: The previous words' ids, int64 [m].
            state: float32 [m, U].
            features: float32 [m, P, E].
            keys: float32 [m, P, A].

        Returns:
            Log-probabilities of the next word float32 [m, V] (natural logarithm), the next state float32 [m, U], the
            attention float32 [m, P].
        """
        next_state, weights = self.recur(self.embedding(token), state, features, keys)
        return tf.nn.log_softmax(self.fc2(self.fc1(next_state))), next_state, weights

    def first_state(self, features: tf.Tensor) -> tf.Tensor:
        """The state before the first word, float32 [n, U], of features float32 [n, P, E]."""
        if self.config.initial_state == "mean":
            return self.init(tf.reduce_mean(features, axis=1))
        return tf.zeros((tf.shape(features)[0], self.config.units))


class CaptionModel(keras.Model):
    """Encoder and decoder together."""

    def __init__(self, config: ModelConfig, dtype_of_products: tf.DType = tf.float32) -> None:
        """Build both with random weights.

        Args:
            config: Sizes and rules.
            dtype_of_products: Of the matrix products in `call` and `teach`: bfloat16 where training is to be fast.
                Weights, gradients, attention and all that is added up are float32 in any case, and so are `encode`
                and `Decoder.step`.
        """
        super().__init__(name="captioner")
        self.config, self.dtype_of_products = config, dtype_of_products
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.built = True

    def encode(self, grid: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Once a photo: what ``encoder.onnx`` computes.

        Args:
            grid: float32 [n, P, C].

        Returns:
            Features float32 [n, P, E], keys float32 [n, P, A], the initial state float32 [n, U].
        """
        features = self.encoder(grid)
        keys = self.decoder.attention.W1(features)
        return features, keys, self.decoder.first_state(features)

    def call(self, grid: tf.Tensor, tokens: tf.Tensor, seed: tf.Tensor | None = None) -> tf.Tensor:
        """Teacher forcing on captions of one length.

        Args:
            grid: A photo for each caption, of a floating type, [m, P, C].
            tokens: The words that precede those to be predicted, ``<start>`` first, int64 [m, T].
            seed: int32 [2] of the dropout; None for no dropout.

        Returns:
            Logits float32 [m, T, V] of the words that follow.
        """
        rows, words = tf.unstack(tf.shape(tokens))
        logits, _ = self._predict(grid, tf.range(rows), tokens, tf.ones_like(tokens, tf.bool), seed)
        return tf.transpose(tf.reshape(logits, (words, rows, self.config.vocabulary_size)), (1, 0, 2))

    def teach(
        self, grid: tf.Tensor, photos: tf.Tensor, tokens: tf.Tensor, *, pad_id: int, seed: tf.Tensor | None = None
    ) -> Taught:
        """Teacher forcing over a batch of captions of different lengths; padding costs nothing.

        Args:
            grid: Of a floating type, [n, P, C].
            photos: Which of the n photos each caption is of, int32 [m].
            tokens: ``<start>``, words, ``<end>``, padding: int64 [m, T], the longest caption first.
            pad_id: Token id of the padding.
            seed: int32 [2] of the dropout; None for no dropout.
        """
        is_word = tokens[:, 1:] != pad_id
        logits, attention = self._predict(grid, photos, tokens[:, :-1], is_word, seed)
        captions = tf.broadcast_to(tf.range(tf.shape(tokens)[0])[:, tf.newaxis], tf.shape(is_word))
        return Taught(logits, _packed(tokens[:, 1:], is_word), _packed(captions, is_word), attention)

    def _predict(
        self, grid: tf.Tensor, photos: tf.Tensor, tokens: tf.Tensor, is_word: tf.Tensor, seed: tf.Tensor | None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Logits float32 [N, V], a caption's attention summed over its words float32 [m, P].

        Only attention and GRU go word by word; everything else is done once a photo, or once for all words.
        """
        decoder, size = self.decoder, self.config.embedding_dim
        grid = tf.ensure_shape(grid, (None, self.config.places, self.config.channels))
        features = tf.nn.relu(self._dense(self.encoder.fc, grid))  # [n, P, E]
        keys = self._dense(decoder.attention.W1, features)  # [n, P, A]
        state = tf.gather(decoder.first_state(features), photos)  # [m, U]
        embedded = self._drop(decoder.embedding(_packed(tokens, is_word)), seed, 0)  # [N, E]
        cell = decoder.gru.cell
        # The kernel's first rows multiply the context, the others the embedding (see `Decoder.recur`).
        of_context, of_embedding = tf.split(tf.convert_to_tensor(cell.kernel), [size, size])
        inputs = self._product(embedded, of_embedding) + cell.bias[0]  # [N, 3U]
        carry = self.config.recurrence == "carry"
        recurrent = tf.convert_to_tensor(cell.recurrent_kernel)
        weights = Weights(
            tf.concat([decoder.attention.W2.kernel, recurrent if carry else tf.zeros_like(recurrent)], axis=1),
            tf.concat([decoder.attention.W2.bias, cell.bias[1]], axis=0),
            tf.convert_to_tensor(decoder.attention.V.kernel),
            of_context,
        )
        outputs, attention = unroll(
            inputs, state, features, keys, weights, plan(photos, is_word), carry=carry, dtype=self.dtype_of_products
        )
        outputs = self._drop(outputs, seed, 1)  # [N, U]
        return self._dense(decoder.fc2, self._dense(decoder.fc1, outputs)), attention

    def _dense(self, layer: keras.layers.Dense, x: tf.Tensor) -> tf.Tensor:
        """A dense layer without its activation, float32."""
        return self._product(x, layer.kernel) + layer.bias

    def _product(self, x: tf.Tensor, kernel: Any) -> tf.Tensor:
        """A matrix product in the type that training has for them, given back as float32."""
        x, kernel = (tf.cast(y, self.dtype_of_products) for y in (x, tf.convert_to_tensor(kernel)))
        return tf.cast(tf.matmul(x, kernel), tf.float32)

    def _drop(self, x: tf.Tensor, seed: tf.Tensor | None, place: int) -> tf.Tensor:
        """Stateless dropout: the masks follow from the seed alone, so that a resumed run draws the same ones."""
        if seed is None or not self.config.dropout:
            return x
        return tf.nn.experimental.stateless_dropout(x, self.config.dropout, seed=tf.add(seed, (place, 0)))


def _packed(x: tf.Tensor, is_word: tf.Tensor) -> tf.Tensor:
    """What of [m, T] is no padding, word by word: [N]."""
    return tf.boolean_mask(tf.transpose(x), tf.transpose(is_word))


class TensorFlowStepper:
    """The decoder as `caption_rt.search.Stepper`: the same search captions in TensorFlow and on the device."""

    def __init__(self, model: CaptionModel) -> None:
        """Trace the two functions once; `on` then binds them to photos."""
        config = model.config
        place = (None, config.places)
        self._encode = tf.function(
            model.encode,
            input_signature=[tf.TensorSpec((*place, config.channels), tf.float32, "grid")],
            autograph=False,
        )
        self._step = tf.function(
            model.decoder.step,
            input_signature=[
                tf.TensorSpec((None,), tf.int64, "token"),
                tf.TensorSpec((None, config.units), tf.float32, "state"),
                tf.TensorSpec((*place, config.embedding_dim), tf.float32, "features"),
                tf.TensorSpec((*place, config.units), tf.float32, "keys"),
            ],
            autograph=False,
        )

    def on(self, grid: NDArray[np.float32]) -> BoundStepper:
        """Bind to photos.

        Args:
            grid: float32 [n, P, C].
        """
        features, keys, state = (np.asarray(x) for x in self._encode(np.asarray(grid, np.float32)))
        return BoundStepper(self, features, keys, state)

    def step(
        self,
        token: NDArray[np.int64],
        state: NDArray[np.float32],
        features: NDArray[np.float32],
        keys: NDArray[np.float32],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """`Decoder.step` on arrays."""
        log_probs, next_state, attention = (np.asarray(x) for x in self._step(token, state, features, keys))
        return log_probs, next_state, attention


class BoundStepper:
    """A `TensorFlowStepper` with the features of n photos; satisfies `caption_rt.search.Stepper`."""

    def __init__(
        self,
        stepper: TensorFlowStepper,
        features: NDArray[np.float32],
        keys: NDArray[np.float32],
        state: NDArray[np.float32],
    ) -> None:
        """Keep the photos' arrays; see `TensorFlowStepper.on`."""
        self._stepper, self._features, self._keys, self._state = stepper, features, keys, state

    @property
    def batch_size(self) -> int:
        """Number of photos."""
        return len(self._features)

    def initial_state(self) -> NDArray[np.float32]:
        """State before the first word, float32 [n, U]."""
        return self._state

    def step(self, tokens: NDArray[np.int64], state: NDArray[np.float32], images: NDArray[np.int64]) -> Step:
        """One word for m rows, row i belonging to photo ``images[i]``; see `caption_rt.search.Stepper`."""
        return Step(*self._stepper.step(tokens, state, self._features[images], self._keys[images]))

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from numpy.typing import NDArray

from caption_rt.errors import OptionsError
from caption_train.model import CaptionModel, ModelConfig, TensorFlowStepper

pytestmark = pytest.mark.tf

PLACES, CHANNELS, WORDS, SIZE, UNITS = 6, 5, 11, 4, 7
Array = NDArray[np.float64]


def make_model(recurrence: str = "carry", dropout: float = 0.0, seed: int = 0) -> CaptionModel:
    """A small model; no weight, biases included, is zero, so that one left out of a computation is seen."""
    model = CaptionModel(ModelConfig(PLACES, CHANNELS, WORDS, SIZE, UNITS, recurrence, dropout))
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        variable.assign(rng.normal(0, 0.5, variable.shape))
    return model


def make_inputs(rows: int = 3, words: int = 5) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rng = np.random.default_rng(1)
    return rng.normal(size=(rows, PLACES, CHANNELS)).astype(np.float32), rng.integers(0, WORDS, (rows, words))


class Reference:
    """The model in NumPy, from its equations."""

    def __init__(self, model: CaptionModel) -> None:
        decoder = model.decoder
        self.carry = model.config.recurrence == "carry"
        self.embedding = decoder.embedding.get_weights()[0].astype(np.float64)
        self.gru = [array.astype(np.float64) for array in decoder.gru.get_weights()]
        layers = {
            "fc": model.encoder.fc,
            "fc1": decoder.fc1,
            "fc2": decoder.fc2,
            "W1": decoder.attention.W1,
            "W2": decoder.attention.W2,
            "V": decoder.attention.V,
        }
        self.dense = {name: [a.astype(np.float64) for a in layer.get_weights()] for name, layer in layers.items()}

    def layer(self, name: str, x: Array) -> Array:
        kernel, bias = self.dense[name]
        return x @ kernel + bias

    def features(self, grid: NDArray[np.float32]) -> Array:
        return np.maximum(self.layer("fc", grid.astype(np.float64)), 0)

    def step(self, token: NDArray[np.int64], state: Array, features: Array) -> tuple[Array, Array, Array]:
        """Bahdanau et al. 2015; Cho et al. 2014 with the reset gate behind the product; two dense layers."""
        score = np.tanh(self.layer("W1", features) + self.layer("W2", state)[:, None])
        attention = softmax(self.layer("V", score)[:, :, 0])
        context = np.einsum("mp,mpe->me", attention, features)
        inputs = np.concatenate([context, self.embedding[token]], axis=1)
        before = state if self.carry else np.zeros_like(state)
        kernel, recurrent_kernel, (bias, recurrent_bias) = self.gru
        from_inputs = np.split(inputs @ kernel + bias, 3, axis=1)
        from_state = np.split(before @ recurrent_kernel + recurrent_bias, 3, axis=1)
        update, reset = (1 / (1 + np.exp(-(from_inputs[i] + from_state[i]))) for i in (0, 1))
        candidate = np.tanh(from_inputs[2] + reset * from_state[2])
        new = update * before + (1 - update) * candidate
        return np.log(softmax(self.layer("fc2", self.layer("fc1", new)))), new, attention


def softmax(x: Array) -> Array:
    exponentials = np.exp(x - x.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("recurrence", ["carry", "reset"])
def test_a_step_is_the_equations(recurrence: str) -> None:
    model = make_model(recurrence)
    reference = Reference(model)
    grid, tokens = make_inputs()
    features, keys, state = model.encode(grid)
    expected_features = reference.features(grid)
    np.testing.assert_allclose(features, expected_features, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(keys, reference.layer("W1", expected_features), rtol=1e-5, atol=1e-6)
    assert state.shape == (3, UNITS)
    assert not np.any(state)
    expected_state = np.zeros((3, UNITS))
    for t in range(tokens.shape[1]):
        log_probs, state, attention = model.decoder.step(tokens[:, t], state, features, keys)
        expected, expected_state, expected_attention = reference.step(tokens[:, t], expected_state, expected_features)
        np.testing.assert_allclose(log_probs, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state, expected_state, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(attention, expected_attention, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(np.sum(attention, axis=1), 1, rtol=1e-6)
        np.testing.assert_allclose(np.sum(np.exp(log_probs), axis=1), 1, rtol=1e-5)


def test_the_recurrences_differ_from_the_second_word_on() -> None:
    grid, tokens = make_inputs()
    carry, reset = (make_model(recurrence)(grid, tokens).numpy() for recurrence in ("carry", "reset"))
    np.testing.assert_array_equal(carry[:, 0], reset[:, 0])
    assert np.abs(carry[:, 1:] - reset[:, 1:]).max(axis=(0, 2)).min() > 0.01


@pytest.mark.parametrize("recurrence", ["carry", "reset"])
def test_teacher_forcing_is_one_step_after_the_other(recurrence: str) -> None:
    model = make_model(recurrence, dropout=0.5)  # which is for training alone
    grid, tokens = make_inputs()
    logits = model(grid, tokens)
    assert logits.shape == (3, 5, WORDS)
    features, keys, state = model.encode(grid)
    for t in range(5):
        log_probs, state, _ = model.decoder.step(tokens[:, t], state, features, keys)
        np.testing.assert_allclose(tf.nn.log_softmax(logits[:, t]), log_probs, rtol=1e-4, atol=1e-5)


def test_one_trace_serves_captions_of_every_length() -> None:
    model = make_model()
    traces = 0

    @tf.function(input_signature=[tf.TensorSpec((None, None, None)), tf.TensorSpec((None, None), tf.int64)])
    def forward(grid: tf.Tensor, tokens: tf.Tensor) -> tf.Tensor:
        nonlocal traces
        traces += 1
        return model(grid, tokens)

    for words in (1, 4, 9):
        grid, tokens = make_inputs(2, words)
        np.testing.assert_allclose(forward(grid, tokens), model(grid, tokens), rtol=1e-4, atol=1e-5)
    assert traces == 1


def test_dropout_follows_from_its_seed() -> None:
    model = make_model(dropout=0.5)
    grid, tokens = make_inputs()
    first, again, other = (model(grid, tokens, seed=np.array(s, np.int32)).numpy() for s in ([0, 1], [0, 1], [0, 2]))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01
    without = make_model()
    np.testing.assert_array_equal(without(grid, tokens, seed=np.array([0, 1], np.int32)), model(grid, tokens))


def test_every_weight_gets_a_gradient() -> None:
    model = make_model()
    grid, tokens = make_inputs()
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(grid, tokens) ** 2)
    names = {
        variable.path: float(tf.reduce_max(tf.abs(tf.convert_to_tensor(gradient))))
        for variable, gradient in zip(
            model.trainable_variables,
            tape.gradient(
                loss, [v.value for v in model.trainable_variables], unconnected_gradients=tf.UnconnectedGradients.ZERO
            ),
            strict=True,
        )
    }
    assert len(names) == 16
    # A bias before the softmax moves all places alike, and so changes nothing.
    assert [name for name, size in names.items() if size < 1e-4] == [model.decoder.attention.V.bias.path]


def test_the_stepper_gathers_the_photos_of_its_rows() -> None:
    model = make_model()
    grid, tokens = make_inputs(2)
    stepper = TensorFlowStepper(model).on(grid)
    assert stepper.batch_size == 2
    state = np.repeat(stepper.initial_state(), [1, 2], axis=0)
    state[2] = 0.3
    step = stepper.step(tokens[[0, 1, 1], [0, 0, 1]], state, np.array([0, 1, 1]))
    features, keys, _ = model.encode(grid[[0, 1, 1]])
    log_probs, new, attention = model.decoder.step(tokens[[0, 1, 1], [0, 0, 1]], state, features, keys)
    np.testing.assert_allclose(step.log_probs, log_probs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(step.state, new, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(step.attention, attention, rtol=1e-4, atol=1e-6)
    assert step.log_probs.dtype == step.state.dtype == step.attention.dtype == np.float32


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"units": 0}, "units must be at least 1, not 0"),
        ({"places": -1}, "places must be at least 1, not -1"),
        ({"recurrence": "carried"}, "recurrence must be 'carry' or 'reset', not 'carried'"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), not 1.0"),
        ({"dropout": float("nan")}, r"dropout must lie in \[0, 1\), not nan"),
    ],
)
def test_config_refuses(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OptionsError, match=sentence):
        ModelConfig(**{"places": 1, "channels": 1, "vocabulary_size": 5, **change})


def test_a_checkpoint_has_the_names_of_the_tutorial(tmp_path: Path) -> None:
    model = make_model()
    path = tf.train.Checkpoint(encoder=model.encoder, decoder=model.decoder).write(str(tmp_path / "ckpt"))
    variables = {
        key.split("/.ATTRIBUTES")[0]: tuple(shape)
        for key, shape in tf.train.list_variables(path)
        if key.endswith("/.ATTRIBUTES/VARIABLE_VALUE")
    }
    expected = {"encoder/fc": [(CHANNELS, SIZE), (SIZE,)], "decoder/embedding": [(WORDS, SIZE)]}
    expected["decoder/gru/cell"] = [(2 * SIZE, 3 * UNITS), (UNITS, 3 * UNITS), (2, 3 * UNITS)]
    for name, rows, columns in (
        ("fc1", UNITS, UNITS),
        ("fc2", UNITS, WORDS),
        ("attention/W1", SIZE, UNITS),
        ("attention/W2", UNITS, UNITS),
        ("attention/V", UNITS, 1),
    ):
        expected[f"decoder/{name}"] = [(rows, columns), (columns,)]
    for prefix, shapes in expected.items():
        found = [shape for key, shape in variables.items() if key.startswith(f"{prefix}/")]
        assert sorted(found) == sorted(shapes), prefix


class TheirAttention(keras.Model):
    """As somebody who followed the tutorial writes it: no sizes but the units, built when first called."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.W1 = keras.layers.Dense(units)
        self.W2 = keras.layers.Dense(units)
        self.V = keras.layers.Dense(1)

    def call(self, features: tf.Tensor, hidden: tf.Tensor) -> tf.Tensor:
        scores = self.V(tf.nn.tanh(self.W1(features) + self.W2(tf.expand_dims(hidden, 1))))
        return tf.reduce_sum(tf.nn.softmax(scores, axis=1) * features, axis=1)


class TheirEncoder(keras.Model):
    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.fc = keras.layers.Dense(embedding_dim)

    def call(self, grid: tf.Tensor) -> tf.Tensor:
        return tf.nn.relu(self.fc(grid))


class TheirDecoder(keras.Model):
    def __init__(self, embedding_dim: int, units: int, vocabulary_size: int) -> None:
        super().__init__()
        self.units = units
        self.embedding = keras.layers.Embedding(vocabulary_size, embedding_dim)
        self.gru = keras.layers.GRU(
            units, return_sequences=True, return_state=True, recurrent_initializer="glorot_uniform"
        )
        self.fc1 = keras.layers.Dense(units)
        self.fc2 = keras.layers.Dense(vocabulary_size)
        self.attention = TheirAttention(units)

    def call(self, word: tf.Tensor, features: tf.Tensor, hidden: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        context = tf.expand_dims(self.attention(features, hidden), 1)
        output, state = self.gru(tf.concat([context, self.embedding(word)], axis=-1))
        flat = tf.reshape(self.fc1(output), (-1, self.units))
        return self.fc2(flat), state


def test_a_checkpoint_of_the_tutorials_model_is_read(tmp_path: Path) -> None:
    encoder, decoder = TheirEncoder(SIZE), TheirDecoder(SIZE, UNITS, WORDS)
    optimizer = keras.optimizers.Adam()
    grid, tokens = make_inputs()

    def teacher_forcing() -> list[tf.Tensor]:
        features, hidden, logits = encoder(grid), tf.zeros((3, UNITS)), []
        for t in range(tokens.shape[1]):
            predicted, hidden = decoder(tokens[:, t : t + 1], features, hidden)
            logits.append(predicted)
        return logits

    with tf.GradientTape() as tape:  # a step of training, as such a checkpoint has the optimiser's state too
        loss = tf.reduce_sum(tf.stack(teacher_forcing()) ** 2)
    variables = encoder.trainable_variables + decoder.trainable_variables
    optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
    checkpoint = tf.train.Checkpoint(encoder=encoder, decoder=decoder, optimizer=optimizer)
    manager = tf.train.CheckpointManager(checkpoint, str(tmp_path), max_to_keep=5)
    manager.save()
    expected = tf.stack(teacher_forcing(), axis=1)

    model = make_model("reset")  # which is how their decoder goes
    ours = tf.train.Checkpoint(encoder=model.encoder, decoder=model.decoder)
    ours.restore(tf.train.latest_checkpoint(str(tmp_path))).assert_existing_objects_matched().expect_partial()
    np.testing.assert_allclose(model(grid, tokens), expected, rtol=1e-4, atol=1e-6)

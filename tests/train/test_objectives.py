import numpy as np
import pytest
import tensorflow as tf

from caption_train.batches import Batch, make_batch
from caption_train.model import CaptionModel, ModelConfig
from caption_train.objectives import CrossEntropy, Loss, cross_entropy

pytestmark = pytest.mark.tf

PAD, WORDS, PLACES, CHANNELS = 0, 9, 4, 3


@pytest.fixture(scope="module")
def model() -> CaptionModel:
    made = CaptionModel(ModelConfig(PLACES, CHANNELS, WORDS, 5, 6, initial_state="mean"))
    rng = np.random.default_rng(0)
    for variable in made.weights:
        variable.assign(rng.normal(0, 0.7, variable.shape))
    return made


@pytest.fixture(scope="module")
def batch() -> Batch:
    rng = np.random.default_rng(1)
    captions = [[2, *rng.integers(4, WORDS, length), 3] for length in (2, 5, 3, 5)]
    weights = np.array([1, 0.5, 2, -1], np.float32)
    grid = rng.normal(size=(2, PLACES, CHANNELS)).astype(np.float16)
    return make_batch(grid, np.array([0, 1, 1, 0]), captions, PAD, weights)


def loss_of(model: CaptionModel, batch: Batch, **options: float) -> Loss:
    return CrossEntropy(PAD, **options).loss(model, batch.loaded, Batch(*map(tf.constant, batch)), None)


def attention_of(model: CaptionModel, grid: np.ndarray, caption: list[int]) -> np.ndarray:
    """Attention of each word, [T, P], by the decoder's single steps."""
    features, keys, state = model.encode(grid[np.newaxis].astype(np.float32))
    rows = []
    for token in caption[:-1]:
        _, state, attention = model.decoder.step(tf.constant([token], tf.int64), state, features, keys)
        rows.append(np.asarray(attention)[0])
    return np.array(rows)


def test_the_loss_is_the_cross_entropy_of_words_alone(model: CaptionModel, batch: Batch) -> None:
    found = loss_of(model, batch)
    total = weighted = words = 0.0
    for row, photo, weight in zip(batch.tokens, batch.photos, batch.weights, strict=True):
        caption = row[row != PAD]
        logits = model(batch.loaded[photo][np.newaxis], caption[np.newaxis, :-1]).numpy()[0].astype(np.float64)
        picked = logits[np.arange(len(caption) - 1), caption[1:]]
        mine = float((np.log(np.exp(logits).sum(axis=1)) - picked).sum())
        total, weighted, words = total + mine, weighted + weight * mine, words + len(caption) - 1
    assert float(found.words) == words == CrossEntropy(PAD).normaliser(batch) == 19
    assert float(found.cross_entropy) == pytest.approx(total, rel=1e-5)
    assert float(found.total) == pytest.approx(weighted, rel=1e-5)


def test_padding_changes_nothing(model: CaptionModel, batch: Batch) -> None:
    wider = batch._replace(tokens=np.pad(batch.tokens, ((0, 0), (0, 5)), constant_values=PAD))
    for options in ({}, {"label_smoothing": 0.2, "attention_penalty": 1.0}):
        np.testing.assert_allclose(loss_of(model, wider, **options), loss_of(model, batch, **options), rtol=1e-6)
    assert CrossEntropy(PAD).normaliser(wider) == 19


def test_the_papers_penalty_on_attention(model: CaptionModel, batch: Batch) -> None:
    """Equation 14: lambda * sum over places of (1 - sum over words of alpha)^2."""
    without, with_it = loss_of(model, batch), loss_of(model, batch, attention_penalty=0.3)
    expected = 0.0
    for row, photo, weight in zip(batch.tokens, batch.photos, batch.weights, strict=True):
        attention = attention_of(model, batch.loaded[photo], row[row != PAD].tolist())
        expected += 0.3 * weight * float(((1 - attention.sum(axis=0)) ** 2).sum())
    assert float(with_it.total - without.total) == pytest.approx(expected, rel=1e-4)
    assert abs(expected) > 0.1
    assert float(with_it.cross_entropy) == float(without.cross_entropy)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_and_its_gradient_are_tensorflows(smoothing: float) -> None:
    rng = np.random.default_rng(0)
    logits = tf.constant(rng.normal(0, 3, (7, WORDS)), tf.float32)
    targets = tf.constant(rng.integers(0, WORDS, 7))
    weights = rng.normal(size=7).astype(np.float32)
    smooth = tf.one_hot(targets, WORDS) * (1 - smoothing) + smoothing / WORDS
    found = []
    for function in (
        lambda x: cross_entropy(x, targets, smoothing),
        lambda x: tf.nn.softmax_cross_entropy_with_logits(labels=smooth, logits=x),
    ):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            losses = function(logits)
            loss = tf.reduce_sum(losses * weights)
        found.append((losses, tape.gradient(loss, logits)))
    for mine, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_cross_entropy_of_a_word_that_is_as_good_as_impossible_is_finite() -> None:
    losses = cross_entropy(tf.constant([[0.0, 500.0, -500.0]]), tf.constant([2], tf.int64))
    assert losses.numpy().tolist() == [1000.0]

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from caption_rt.options import DecodeOptions
from caption_rt.search import SpecialTokens, decode
from caption_rt.vocabulary import Vocabulary
from caption_train.batches import Batch, make_batch
from caption_train.datasets import CaptionedImage
from caption_train.model import CaptionModel, ModelConfig, TensorFlowStepper
from caption_train.self_critical import Rules, SelfCritical, reward_of, roll_out

pytestmark = pytest.mark.tf

MAX_WORDS = 6
VOCABULARY = Vocabulary.build(["a brown dog runs", "two people sit on a red chair", "a red dog"])
IMAGES = [
    CaptionedImage(Path("0.jpg"), ("A brown dog runs.", "The brown dog is running")),
    CaptionedImage(Path("1.jpg"), ("Two people sit on a chair", "two people")),
    CaptionedImage(Path("2.jpg"), ("a red chair", "a chair, red")),
    CaptionedImage(Path("3.jpg"), ("a red dog sits", "a dog")),
]


class Grids:
    """A source of four grids."""

    grid_shape = loaded_shape = (3, 5)
    variables: Sequence[Any] = ()
    parts: Mapping[str, Any] = {}
    all = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float16)

    def load(self, rows: np.ndarray) -> np.ndarray:
        return self.all[rows]

    def grid(self, loaded: tf.Tensor, *, training: bool) -> tf.Tensor:
        return loaded


def make_model(seed: int = 0, scale: float = 0.7) -> CaptionModel:
    keras.utils.set_random_seed(seed)
    model = CaptionModel(ModelConfig(3, 5, len(VOCABULARY), embedding_dim=8, units=12))
    rng = np.random.default_rng(seed)
    for variable in model.weights:  # larger than what Keras draws, so that words differ
        variable.assign(rng.normal(0, scale, variable.shape))
    return model


@pytest.fixture(scope="module")
def model() -> CaptionModel:
    return make_model()


def objective(model: CaptionModel, baseline: Any = "greedy", samples: int = 3, seed: int = 7) -> SelfCritical:
    rules = Rules.of(VOCABULARY, MAX_WORDS)
    reward = reward_of(IMAGES, VOCABULARY)
    return SelfCritical(model, Grids(), reward, rules, samples=samples, baseline=baseline, seed=seed)


def batch_of(photos: Sequence[int]) -> Batch:
    captions = [[VOCABULARY.start_id, VOCABULARY.end_id] for _ in photos]
    return make_batch(Grids().load(np.array(photos)), np.arange(len(photos)), captions, VOCABULARY.pad_id)


def test_greedy_is_what_the_search_finds(model: CaptionModel) -> None:
    rules = Rules.of(VOCABULARY, MAX_WORDS)
    grid = Grids.all.astype(np.float32)
    found = decode(
        TensorFlowStepper(model).on(grid),
        DecodeOptions(max_words=MAX_WORDS),
        SpecialTokens(rules.start_id, rules.end_id, frozenset(rules.banned)),
    )
    owners = np.array([3, 0, 1, 2, 3], np.int32)
    tokens = roll_out(model, grid, owners, np.zeros((5, MAX_WORDS), np.float32), rules).numpy()
    for owner, row in zip(owners, tokens, strict=True):
        words = [token for token in row if token not in (rules.pad_id, rules.end_id)]
        assert words == list(found[owner][0].tokens)
    assert len({tuple(row) for row in tokens}) > 1


def test_words_are_drawn_with_their_probabilities(model: CaptionModel) -> None:
    rules = Rules.of(VOCABULARY, 1)
    count = 20_000
    draws = (1 - np.random.default_rng(0).random((count, 1))).astype(np.float32)
    grid = Grids.all[:1].astype(np.float32)
    tokens = roll_out(model, grid, np.zeros(count, np.int32), draws, rules).numpy()[:, 0]
    features, keys, state = model.encode(grid)
    log_probs, *_ = model.decoder.step(np.array([rules.start_id]), state, features, keys)
    probabilities = np.exp(log_probs.numpy()[0].astype(np.float64))
    probabilities[list(rules.banned)] = 0
    probabilities /= probabilities.sum()
    shares = np.bincount(tokens, minlength=len(VOCABULARY)) / count
    assert shares[list(rules.banned)].tolist() == [0, 0, 0]
    # Four standard deviations of a share.
    np.testing.assert_array_less(np.abs(shares - probabilities), 4 * np.sqrt(probabilities / count) + 1e-9)


def test_the_extremes_of_a_draw_choose_allowed_words(model: CaptionModel) -> None:
    rules = Rules.of(VOCABULARY, MAX_WORDS)
    for draw in (2**-24, 1):  # the least and the greatest that are drawn
        draws = np.full((4, MAX_WORDS), draw, np.float32)
        tokens = roll_out(model, Grids.all, np.arange(4, dtype=np.int32), draws, rules).numpy()
        assert tokens.max() < len(VOCABULARY)
        started = tokens[:, 0]
        assert not set(started.tolist()) & set(rules.banned)


def log_prob(model: CaptionModel, photo: int, caption: Sequence[int], banned: Sequence[int]) -> float:
    """Of a caption's words and end, a step at a time, the banned words' share given to the others."""
    features, keys, state = model.encode(Grids.all[photo : photo + 1].astype(np.float32))
    total, token = 0.0, VOCABULARY.start_id
    for following in caption:
        log_probs, state, _ = model.decoder.step(np.array([token]), state, features, keys)
        row = log_probs.numpy()[0].astype(np.float64)
        total += row[following] - np.log1p(-np.exp(row[list(banned)]).sum())
        token = following
    return total


@pytest.mark.parametrize("baseline", ["greedy", "samples"])
def test_the_loss(model: CaptionModel, baseline: str) -> None:
    """-(r - b) sum log p, by hand: rewards from the texts, the baseline, the log-probabilities step by step."""
    made, rules, reward = objective(model, baseline), Rules.of(VOCABULARY, MAX_WORDS), reward_of(IMAGES, VOCABULARY)
    photos = np.array([1, 3])
    learnt, logs = made.prepare(batch_of(photos), photos, 5)
    assert learnt.tokens.shape[0] == 6
    assert made.normaliser(learnt) == 6
    captions = [[int(token) for token in row[1:] if token != rules.pad_id] for row in learnt.tokens]
    assert sorted(map(len, captions), reverse=True) == list(map(len, captions))
    rewards = reward.scores(photos[learnt.photos], captions)
    assert logs["reward"] == pytest.approx(rewards.mean())
    greedy = roll_out(model, Grids.all, photos.astype(np.int32), np.zeros((2, MAX_WORDS), np.float32), rules).numpy()
    greedy_rewards = reward.scores(photos, [[t for t in row if t != rules.pad_id] for row in greedy])
    if baseline == "greedy":
        assert logs["greedy_reward"] == pytest.approx(greedy_rewards.mean())
        baselines = greedy_rewards[learnt.photos]
    else:
        sums = np.bincount(learnt.photos, rewards)
        baselines = (sums[learnt.photos] - rewards) / 2
    np.testing.assert_allclose(learnt.weights, rewards - baselines, atol=1e-5)
    assert np.abs(learnt.weights).max() > 0.01
    expected = -sum(
        weight * log_prob(model, photos[owner], caption, rules.banned)
        for weight, owner, caption in zip(learnt.weights, learnt.photos, captions, strict=True)
    )
    loss = made.loss(model, tf.constant(learnt.loaded), learnt, None)
    assert float(loss.total) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert float(loss.words) == sum(map(len, captions))


def test_shares_of_a_batch_draw_what_the_whole_does(model: CaptionModel) -> None:
    def drawn(photos: Sequence[int], step: int = 3) -> set[tuple[Any, ...]]:
        learnt, _ = objective(model).prepare(batch_of(photos), np.array(photos), step)
        return {
            (photos[owner], *tokens[tokens != VOCABULARY.pad_id].tolist(), round(float(weight), 4))
            for owner, tokens, weight in zip(learnt.photos, learnt.tokens, learnt.weights, strict=True)
        }

    whole = drawn([0, 1, 2, 3])
    assert drawn([2, 0]) | drawn([1, 3]) == whole
    assert drawn([0, 1, 2, 3], step=4) != whole


@pytest.mark.slow
def test_training_raises_the_reward() -> None:
    model = make_model(scale=0.3)
    made = objective(model, samples=8)
    optimizer = keras.optimizers.Adam(0.02)
    photos = np.arange(4)
    rewards = []
    for step in range(60):
        learnt, logs = made.prepare(batch_of(photos), photos, step)
        rewards.append(logs["reward"])
        with tf.GradientTape() as tape:
            loss = made.loss(model, tf.constant(learnt.loaded), learnt, None).total / made.normaliser(learnt)
        variables = model.trainable_variables
        gradients = tape.gradient(loss, variables)
        optimizer.apply(
            [tf.zeros(v.shape) if g is None else g for g, v in zip(gradients, variables, strict=True)], variables
        )
    assert np.mean(rewards[:5]) < 1
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 1


def test_words_that_the_model_does_not_know_match_themselves_alone() -> None:
    vocabulary = Vocabulary.build(["a b"])
    images = [CaptionedImage(Path(name), captions) for name, captions in (("0", ("a zebra",)), ("1", ("b <end> cow",)))]
    reward = reward_of(images, vocabulary)
    known = {vocabulary.words.index(word) for word in "ab"}
    (zebra,), (end, cow) = (
        [token for token in reward._references[photo][0][:-1] if token not in known] for photo in range(2)
    )
    assert len({zebra, end, cow} | set(range(len(vocabulary)))) == len(vocabulary) + 3
    assert [captions[0][-1] for captions in reward._references] == [vocabulary.end_id] * 2

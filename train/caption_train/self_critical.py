"""Self-critical sequence training: the model learns from the CIDEr of captions that it draws itself.

Rennie et al. 2017, "Self-critical Sequence Training for Image Captioning" (https://arxiv.org/abs/1612.00563). A caption
w that was drawn has the loss::

    -(r(w) - b) * sum_t log p(w_t | w_1 ... w_t-1)        over its words and its end

where r is its reward and b the reward of the caption that the model gives when it is used (greedy), their equations 7
and 8; or, with several samples a photo, the mean reward of the photo's other samples (Luo 2020, "A Better Variant of
Self-Critical Sequence Training", https://arxiv.org/abs/2003.09971), which saves the greedy search.

The reward is CIDEr-D with the document frequencies of the training captions. The end counts as a word there: without
it the model learns to stop after "with a" (Rennie et al.). There is neither dropout nor label smoothing, and
words that no search may choose (padding, start, unknown) have no probability: what learns is the model as it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from caption_rt.vocabulary import SPECIALS, Vocabulary, normalize_caption
from caption_train.batches import Batch, make_batch
from caption_train.cider import CiderD
from caption_train.datasets import CaptionedImage
from caption_train.model import CaptionModel
from caption_train.objectives import Loss, cross_entropy
from caption_train.settings import Baseline
from caption_train.sources import FeatureSource

_FORBIDDEN = -1e9  # instead of minus infinity, which times a weight of 0 is no number


class Rules(NamedTuple):
    """What a caption may be."""

    start_id: int
    """Given to the decoder before the first word."""
    end_id: int
    """Ends a caption."""
    pad_id: int
    """Fills what is behind the end."""
    banned: tuple[int, ...]
    """Never chosen."""
    max_words: int
    """After so many words a caption is cut."""

    @classmethod
    def of(cls, vocabulary: Vocabulary, max_words: int) -> Rules:
        """Those of a vocabulary, as `caption_rt.search` has them."""
        banned = tuple(sorted(vocabulary.unspoken_ids))
        return cls(vocabulary.start_id, vocabulary.end_id, vocabulary.pad_id, banned, max_words)

    def mask(self, size: int) -> NDArray[np.float32]:
        """What is added to scores of `size` words so that the banned ones are not chosen, float32 [size]."""
        mask = np.zeros(size, np.float32)
        mask[list(self.banned)] = _FORBIDDEN
        return mask


def roll_out(model: CaptionModel, grid: tf.Tensor, photos: tf.Tensor, draws: tf.Tensor, rules: Rules) -> tf.Tensor:
    """Caption photos word by word within the graph, each caption greedily or by chance.

    Args:
        model: The captioner.
        grid: The photos' grids, of a floating type, [n, P, C].
        photos: Which of the n photos each of m captions is of, int32 [m].
        draws: A number for each word, float32 [m, max_words]: above 0, up to 1, it chooses the word at that place of
            the words' probabilities laid end to end; 0 chooses the most probable word.
        rules: What may be chosen, and when to stop.

    Returns:
        Token ids, int64 [m, T], T at most `max_words`: words and, unless it was cut, the end, then padding.
    """
    features, keys, state = (tf.gather(x, photos) for x in model.encode(tf.cast(grid, tf.float32)))
    mask = rules.mask(model.config.vocabulary_size)
    captions = tf.shape(photos)[0]

    def word(t: tf.Tensor, token: tf.Tensor, state: tf.Tensor, ended: tf.Tensor, tokens: tf.TensorArray) -> Any:
        log_probs, state, _ = model.decoder.step(token, state, features, keys)
        scores = log_probs + mask
        chosen = tf.where(draws[:, t] > 0, _at(tf.nn.softmax(scores), draws[:, t]), tf.argmax(scores, axis=1))
        chosen = tf.where(ended, tf.constant(rules.pad_id, tf.int64), chosen)
        return t + 1, chosen, state, ended | (chosen == rules.end_id), tokens.write(t, chosen)

    start = tf.fill((captions,), tf.constant(rules.start_id, tf.int64))
    length, *_, tokens = tf.while_loop(
        lambda t, token, state, ended, tokens: (t < rules.max_words) & ~tf.reduce_all(ended),
        word,
        (
            0,
            start,
            state,
            tf.zeros((captions,), tf.bool),
            tf.TensorArray(tf.int64, rules.max_words, element_shape=(None,)),
        ),
    )
    return tf.transpose(tokens.gather(tf.range(length)))


def _at(probabilities: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
    """The words at places (above 0, up to 1) of their probabilities [m, V] laid end to end, int64 [m]."""
    ends = tf.cumsum(probabilities, axis=1)
    place = draws[:, tf.newaxis] * ends[:, -1:]
    return tf.reduce_sum(tf.cast(ends < place, tf.int64), axis=1)


def reward_of(images: Sequence[CaptionedImage], vocabulary: Vocabulary) -> CiderD:
    """CIDEr-D against the real captions of photos, whose document frequencies count.

    A word that the model does not know has an id of its own behind the vocabulary's, so that it matches itself alone.

    Args:
        images: The training photos; the scorer knows them by their indices.
        vocabulary: Words to ids.
    """
    ids = {word: index for index, word in enumerate(vocabulary.words) if word not in SPECIALS}
    unknown = len(vocabulary)

    def encode(caption: str) -> list[int]:
        words = (ids.setdefault(word, unknown + len(ids)) for word in normalize_caption(caption))
        return [*words, vocabulary.end_id]

    return CiderD([[encode(caption) for caption in image.captions] for image in images])


class SelfCritical:
    """Draws captions and rewards them; a `caption_train.objectives.Objective`.

    A batch's real captions do not count, only its photos.
    """

    def __init__(
        self,
        model: CaptionModel,
        source: FeatureSource,
        reward: CiderD,
        rules: Rules,
        *,
        samples: int,
        baseline: Baseline,
        seed: int,
    ) -> None:
        """Take what captions are drawn from and how.

        Args:
            model: The captioner that learns.
            source: Where grids come from.
            reward: Scores captions of the training photos.
            rules: What captions may be.
            samples: Captions drawn of each photo, at least 2 where the others are the baseline.
            baseline: ``greedy`` (Rennie et al.) or ``samples``, the mean of the photo's others (Luo).
            seed: Of the run.
        """
        self._reward, self._rules, self._seed = reward, rules, seed
        self._samples, self._greedy = samples, baseline == "greedy"

        @tf.function(
            input_signature=[
                tf.TensorSpec((None, *source.loaded_shape), tf.float16),
                tf.TensorSpec((None,), tf.int32),
                tf.TensorSpec((None, rules.max_words), tf.float32),
            ]
        )
        def draw(loaded: tf.Tensor, photos: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
            return roll_out(model, source.grid(loaded, training=False), photos, draws, rules)

        self._draw = draw

    def prepare(self, batch: Batch, photos: NDArray[np.int64], step: int) -> tuple[Batch, Mapping[str, float]]:
        """Draw captions and weight each with its reward above the baseline; see `caption_train.objectives.Objective`.

        What is drawn of a photo follows from the seed, the step and the photo's index, and from nothing else in the
        batch: shares of a batch draw what the whole batch would.

        Returns:
            A batch of ``samples`` captions of every photo; and ``reward``, the mean CIDEr-D of what was drawn, with
            ``greedy_reward``, that of the greedy captions, where those are the baseline.
        """
        count, samples = len(photos), self._samples
        draws = np.zeros((self._greedy + samples, count, self._rules.max_words), np.float32)
        for index, photo in enumerate(photos):
            rng = np.random.default_rng([self._seed, step, int(photo)])
            draws[-samples:, index] = 1 - rng.random((samples, self._rules.max_words), np.float32)  # above 0, up to 1
        owners = np.tile(np.arange(count, dtype=np.int32), len(draws))
        tokens = self._draw(batch.loaded, owners, draws.reshape(len(owners), -1)).numpy()
        captions = [row[row != self._rules.pad_id].tolist() for row in tokens]
        rewards = self._reward.scores(photos[owners], captions).reshape(len(draws), count)
        drawn = rewards[-samples:]
        logs = {"reward": float(drawn.mean())}
        if self._greedy:
            baseline = rewards[:1]
            logs["greedy_reward"] = float(baseline.mean())
        else:
            baseline = (drawn.sum(axis=0) - drawn) / (samples - 1)
        learnt = make_batch(
            batch.loaded,
            owners[-samples * count :],
            [[self._rules.start_id, *caption] for caption in captions[-samples * count :]],
            self._rules.pad_id,
            (drawn - baseline).astype(np.float32).ravel(),
        )
        return learnt, logs

    def normaliser(self, batch: Batch) -> float:
        """The number of captions: of a whole caption all words count alike, however long it is."""
        return float(len(batch.tokens))

    def loss(self, model: CaptionModel, grid: tf.Tensor, batch: Batch, seed: tf.Tensor | None) -> Loss:
        """The sums; see `caption_train.objectives.Objective`. `seed` is not used: there is no dropout."""
        taught = model.teach(grid, batch.photos, batch.tokens, pad_id=self._rules.pad_id, seed=None)
        words = tf.cast(tf.size(taught.targets), tf.float32)
        each = cross_entropy(taught.logits, taught.targets)
        spoken = cross_entropy(taught.logits + self._rules.mask(model.config.vocabulary_size), taught.targets)
        total = tf.reduce_sum(spoken * tf.gather(batch.weights, taught.captions))
        return Loss(total, tf.reduce_sum(each), words)

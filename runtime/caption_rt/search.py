"""From log-probabilities to words: greedy and beam search over a `Stepper`.

This module knows neither ONNX nor files: the runtime's decoder graph and the Keras model in training are both steppers.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from caption_rt.errors import EngineError, OptionsError

__all__ = ["DecodeOptions", "Ended", "Hypothesis", "Step", "Stepper", "decode"]

Ended: TypeAlias = Literal["end", "max_words"]
"""Why a caption ended: the model said so, or it was cut at the longest length."""

# More is a slip of the finger: the memory for it would be gone before the first word.
_MOST = 1000


@dataclass(frozen=True)
class DecodeOptions:
    """How one call decodes.

    Raises:
        OptionsError: a value is out of its range.
    """

    beam_size: int = 1
    """Hypotheses kept a photo, 1 to 1000. 1 is greedy: the most likely word each time, until the end token."""
    length_penalty: float = 0.0
    """The exponent alpha, at least 0, of the length penalty of Wu et al. 2016 (https://arxiv.org/abs/1609.08144),
    equation 14: hypotheses are ranked by log P / ((5 + length) / 6) ** alpha. 0 ranks by log P itself; more favours
    longer captions. Greedy search does not rank and is not changed by it."""
    max_words: int = 20
    """A caption is cut after this many words, 1 to 1000."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("beam_size", "max_words"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST:
                raise OptionsError(f"{name} must be a whole number from 1 to {_MOST}, not {value!r}")
        penalty = self.length_penalty
        if not isinstance(penalty, int | float) or isinstance(penalty, bool) or not 0 <= penalty < math.inf:
            raise OptionsError(f"length_penalty must be a number of at least 0, not {penalty!r}")


class Step(NamedTuple):
    """What a decoder says after one token of each of m rows."""

    log_probs: NDArray[np.float32]
    """float32 [m, V], natural logarithms: the next word's log-probabilities."""
    state: NDArray[np.float32]
    """float32 [m, U]: the recurrent state to go on with."""
    attention: NDArray[np.float32]
    """float32 [m, P]: where it looked for this next word; each row sums to 1."""


class Stepper(Protocol):
    """A decoder over a batch of n photos, one word a step."""

    @property
    def batch_size(self) -> int:
        """The number of photos, n."""

    def initial_state(self) -> NDArray[np.float32]:
        """float32 [n, U]: the state before the first word, a row a photo."""

    def step(self, tokens: NDArray[np.int64], state: NDArray[np.float32], images: NDArray[np.int64]) -> Step:
        """Advance m hypotheses by a word.

        Args:
            tokens: int64 [m]: the last token id of each hypothesis.
            state: float32 [m, U]: the state of each.
            images: int64 [m], ascending: the photo (0 to n - 1) of each; several rows, or none, may be of one.
        """


@dataclass(frozen=True)
class Hypothesis:
    """A caption as token ids."""

    tokens: tuple[int, ...]
    """The words' token ids, without start and end."""
    log_probs: tuple[float, ...]
    """The log-probability of each word given the ones before."""
    log_prob: float
    """The log-probability of the whole: the sum over its words and, where it ended by itself, its end token."""
    attention: NDArray[np.float32]
    """float32 [words, P]: where the model looked for each word."""
    ended: Ended
    """Why it ended."""
    score: float
    """What hypotheses are ranked by; higher is better. See `DecodeOptions.length_penalty`."""


class _Live(NamedTuple):
    """A hypothesis that goes on."""

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    log_prob: float
    attention: tuple[NDArray[np.float32], ...]


def decode(
    stepper: Stepper, options: DecodeOptions, *, start_id: int, end_id: int, banned: Collection[int]
) -> list[list[Hypothesis]]:
    """Caption every photo of a batch.

    Beam search as Sutskever et al. 2014 (https://arxiv.org/abs/1409.3215) and Wu et al. 2016 describe it: each photo
    keeps its `beam_size` most likely unfinished hypotheses. A hypothesis is finished when its end token is among the
    `beam_size` most likely continuations of the photo. A photo is done when it has `beam_size` finished ones and no
    unfinished one can still get a better score than the worst of them; it then leaves the batch. What is unfinished at
    the longest length is ranked with the finished ones as it is.

    Of equally likely continuations, that of the better hypothesis comes first, then the lower token id; equally good
    captions are ranked by their token ids: the result is the same on every run. The log-probabilities are the model's
    own: those of banned tokens are not redistributed.

    Args:
        stepper: the decoder, over n photos.
        options: how to decode.
        start_id: token id given before the first word.
        end_id: token id that ends a caption.
        banned: token ids that are never chosen (padding, start, unknown).

    Returns:
        For each of the n photos its hypotheses, best first, at least 1 and at most `beam_size`.

    Raises:
        EngineError: the decoder gave a value that is no number, or allows no word at all.
    """
    photos = [_Photo(options, end_id) for _ in range(stepper.batch_size)]
    forbidden = np.array(sorted(banned), dtype=np.int64)
    images = np.arange(len(photos))
    tokens = np.full(len(photos), start_id, dtype=np.int64)
    state = stepper.initial_state()
    for _ in range(options.max_words):
        if not len(images):
            break
        step = stepper.step(tokens, state, images)
        log_probs = step.log_probs.astype(np.float64)
        if np.isnan(log_probs).any():
            raise EngineError("the decoder gave a log-probability that is not a number")
        log_probs[:, forbidden] = -np.inf
        parents: list[int] = []
        chosen: list[int] = []
        first = 0
        for image in _unique(images):
            photo = photos[image]
            last = first + len(photo.live)
            rows, words = photo.advance(log_probs[first:last], step.attention[first:last])
            parents += [first + row for row in rows]
            chosen += words
            first = last
        kept = np.array(parents, dtype=np.int64)
        images, tokens, state = images[kept], np.array(chosen, dtype=np.int64), step.state[kept]
    return [photo.ranked() for photo in photos]


def _unique(images: NDArray[np.int64]) -> list[int]:
    """The photos that still have rows; `images` is ascending."""
    return list(dict.fromkeys(images.tolist()))


class _Photo:
    """The search of one photo: its live hypotheses, and the finished ones."""

    def __init__(self, options: DecodeOptions, end_id: int) -> None:
        self._options = options
        self._end_id = end_id
        self._finished: list[Hypothesis] = []
        self._places = 0
        self.live: list[_Live] = [_Live((), (), 0.0, ())]

    def advance(
        self, log_probs: NDArray[np.float64], attention: NDArray[np.float32]
    ) -> tuple[Sequence[int], Sequence[int]]:
        """Extend the live hypotheses by a word.

        Args:
            log_probs: float64 [live, V], -inf where a token is banned.
            attention: float32 [live, P].

        Returns:
            For each hypothesis that is live now: the row it came from, and its new token id.
        """
        size, self._places = self._options.beam_size, attention.shape[1]
        totals = log_probs + np.array([[live.log_prob] for live in self.live])
        live: list[_Live] = []
        parents: list[int] = []
        # At most one continuation of each of the `size` hypotheses is its end, so twice as many hold `size` that go on.
        # Greedy search goes no further than its first end.
        for rank, (row, token) in enumerate(_best(totals, 2 * size if size > 1 else 1)):
            parent, log_prob = self.live[row], float(totals[row, token])
            if token == self._end_id:
                if rank < size:
                    self._finish(parent._replace(log_prob=log_prob), "end")
                continue
            if len(live) < size:
                seen = (*parent.attention, attention[row])
                word = float(log_probs[row, token])
                live.append(_Live((*parent.tokens, token), (*parent.log_probs, word), log_prob, seen))
                parents.append(row)
        if not live and not self._finished:
            raise EngineError("the decoder allows no word: all its log-probabilities are minus infinity")
        self.live = [] if self._is_done(live) else live
        return parents[: len(self.live)], [hypothesis.tokens[-1] for hypothesis in self.live]

    def ranked(self) -> list[Hypothesis]:
        """All hypotheses, best first, those that were cut among them."""
        for hypothesis in self.live:
            self._finish(hypothesis, "max_words")
        return sorted(self._finished, key=_rank)[: self._options.beam_size]

    def _is_done(self, live: Sequence[_Live]) -> bool:
        size = self._options.beam_size
        if len(self._finished) < size or not live:
            return not live
        # A log-probability only falls as words come, and is divided by at most the penalty of the longest caption.
        bound = live[0].log_prob / self._penalty(self._options.max_words)
        return bound < sorted(self._finished, key=_rank)[size - 1].score

    def _finish(self, live: _Live, ended: Ended) -> None:
        length = len(live.tokens) + (ended == "end")
        attention = np.stack(live.attention) if live.attention else np.zeros((0, self._places), np.float32)
        self._finished.append(
            Hypothesis(
                live.tokens,
                live.log_probs,
                live.log_prob,
                attention,
                ended,
                live.log_prob / self._penalty(length),
            )
        )

    def _penalty(self, length: int) -> float:
        """Wu et al. 2016, equation 14."""
        return float(((5 + length) / 6) ** self._options.length_penalty)


def _rank(hypothesis: Hypothesis) -> tuple[float, tuple[int, ...]]:
    return -hypothesis.score, hypothesis.tokens


def _best(totals: NDArray[np.float64], count: int) -> list[tuple[int, int]]:
    """The (row, column) of the highest values, best first; equal ones in the order of their position."""
    flat = totals.ravel()
    if count == 1:
        candidates = np.array([flat.argmax()])
    elif count < flat.size:
        # Everything that is as good as the last one wanted, so that ties at the edge do not depend on the partition.
        edge = np.partition(flat, flat.size - count)[flat.size - count]
        candidates = np.flatnonzero(flat >= edge)
    else:
        candidates = np.arange(flat.size)
    candidates = candidates[flat[candidates] > -np.inf]
    order = np.argsort(-flat[candidates], kind="stable")[:count]
    return [divmod(int(position), totals.shape[1]) for position in candidates[order]]

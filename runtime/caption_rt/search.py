"""From log-probabilities to words: the decoding loop over a `Stepper`.

This module knows neither ONNX nor files: the runtime's decoder graph and the Keras model in training are both steppers.
How words are chosen stands in `caption_rt.strategies`, what may not be chosen in `caption_rt.filters`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from caption_rt.errors import EngineError
from caption_rt.filters import filters_of
from caption_rt.options import DecodeOptions
from caption_rt.strategies import Beam, Hypothesis, Live, PhotoSearch, Samples

__all__ = ["Rows", "Search", "SpecialTokens", "Step", "Stepper", "decode"]


Rows: TypeAlias = Any
"""Something with a row for each hypothesis, of which ``rows[int64 [k]]`` gives some, in that order, one perhaps several
times: a NumPy array, or an array on a GPU that stays there."""

_REMEDY = "try another precision, or export the model again"


class SpecialTokens(NamedTuple):
    """The token ids that mean something to a search; `caption_rt.captioning.special_tokens` gives a vocabulary's."""

    start_id: int
    """Given to the decoder before the first word."""
    end_id: int
    """Ends a caption."""
    banned: frozenset[int]
    """Never chosen: padding, start, unknown words, and what a caller does not want to hear."""


class Step(NamedTuple):
    """What a decoder says after one token of each of m rows."""

    log_probs: NDArray[np.float32]
    """float32 [m, V], natural logarithms: the next word's log-probabilities."""
    state: Rows
    """float32 [m, U]: the recurrent state to go on with."""
    attention: NDArray[np.float32]
    """float32 [m, P]: where it looked for this next word; each row sums to 1."""


class Stepper(Protocol):
    """A decoder over a batch of n photos, one word a step."""

    @property
    def batch_size(self) -> int:
        """The number of photos, n."""

    def initial_state(self) -> Rows:
        """float32 [n, U]: the state before the first word, a row a photo."""

    def step(self, tokens: NDArray[np.int64], state: Rows, images: NDArray[np.int64]) -> Step:
        """Advance m hypotheses by a word.

        Args:
            tokens: int64 [m]: the last token id of each hypothesis.
            state: float32 [m, U]: the state of each.
            images: int64 [m], ascending: the photo (0 to n - 1) of each; several rows, or none, may be of one.
        """


class Search:
    """The decoding of a batch, a word at a time. `decode` runs one to its end.

    Args:
        stepper: the decoder, over n photos.
        options: how to decode.
        special: the token ids that mean something.
        photo_seed: for the number of a photo, 0 to n - 1, a number of its own, 0 to 2**64 - 1, on which samples of it
            depend; None takes the photo's number. Only asked when sampling.
    """

    def __init__(
        self,
        stepper: Stepper,
        options: DecodeOptions,
        special: SpecialTokens,
        *,
        photo_seed: Callable[[int], int] | None = None,
    ) -> None:
        """Begin with no words."""
        self._stepper = stepper
        self._filters = filters_of(options, end_id=special.end_id, banned=special.banned)
        self._photos: list[PhotoSearch] = [
            Samples(options, special.end_id, photo_seed(photo) if photo_seed else photo)
            if options.sample
            else Beam(options, special.end_id)
            for photo in range(stepper.batch_size)
        ]
        self._images = np.repeat(np.arange(len(self._photos)), options.n_best if options.sample else 1)
        self._tokens = np.full(len(self._images), special.start_id, dtype=np.int64)
        self._state = stepper.initial_state()
        if len(self._images) > len(self._photos):
            self._state = self._state[self._images]
        self._words_left = options.max_words

    def advance(self) -> bool:
        """Take a word further in every caption that goes on.

        Returns:
            Whether any goes on now.

        Raises:
            EngineError: the decoder gave a value that is no number, or allows no word at all.
        """
        if self._words_left and len(self._images):
            self._words_left -= 1
            step = self._stepper.step(self._tokens, self._state, self._images)
            log_probs = _checked(np.array(step.log_probs, np.float32))  # a copy: filters change it
            live = [hypothesis.tokens for photo in self._photos for hypothesis in photo.live]
            for filter_ in self._filters:
                filter_.apply(log_probs, live)
            parents: list[int] = []
            chosen: list[int] = []
            first = 0
            for photo in self._photos:
                last = first + len(photo.live)
                if first < last:
                    rows, words = photo.advance(log_probs[first:last], step.attention[first:last])
                    parents += [first + row for row in rows]
                    chosen += words
                first = last
            kept = np.array(parents, dtype=np.int64)
            self._images, self._tokens = self._images[kept], np.array(chosen, dtype=np.int64)
            self._state = step.state[kept] if len(kept) else step.state
        return bool(self._words_left and len(self._images))

    def settled(self, photo: int) -> Live:
        """What the best caption of a photo begins with for certain, as far as that can be told now."""
        return self._photos[photo].settled()

    def results(self) -> list[list[Hypothesis]]:
        """For each of the n photos its hypotheses, best first; those that are not finished are cut."""
        return [photo.ranked() for photo in self._photos]


def decode(
    stepper: Stepper,
    options: DecodeOptions,
    special: SpecialTokens,
    *,
    photo_seed: Callable[[int], int] | None = None,
) -> list[list[Hypothesis]]:
    """Caption every photo of a batch: greedy, by a beam or by samples, without the guard.

    A photo leaves the batch when it is done. The log-probabilities are the model's own: those of banned tokens are not
    redistributed.

    Args:
        stepper: see `Search`, as for all arguments.
        options: see `Search`.
        special: see `Search`.
        photo_seed: see `Search`.

    Returns:
        For each of the n photos its hypotheses, best first, at least 1 and at most `options.n_best`.

    Raises:
        EngineError: the decoder gave a value that is no number, or allows no word at all.
    """
    search = Search(stepper, options, special, photo_seed=photo_seed)
    while search.advance():
        pass
    return search.results()


def _checked(log_probs: NDArray[np.float32]) -> NDArray[np.float32]:
    """The log-probabilities, if each row has one to choose; a value that is no number makes its row's maximum one."""
    highest = log_probs.max(axis=1)
    if np.isnan(highest).any():
        raise EngineError(f"the decoder gave a log-probability that is not a number: {_REMEDY}")
    if (highest == -np.inf).any():
        raise EngineError(f"the decoder allows no word, all its log-probabilities are minus infinity: {_REMEDY}")
    return log_probs

"""The guard against degenerate captions: what is wrong with a caption, and how it is decoded again.

A caption is degenerate when it has a fault (`faults_of`):

- ``repetition``: a word or phrase comes twice in a row, or a phrase of three words or more comes twice at all;
- ``no_end``: it was cut at `max_words`, and these are 20 or more (a lower limit is the caller's wish, not a fault);
- ``low_log_prob``: a word's log-probability is below -5 on average, the end token's counted.

It is then decoded again, with the limits that were asked for (lengths, banned words) and the next of these strategies
until one gives a caption without a fault:

1. as asked;
2. a beam of 5, or of the size asked for where that is larger, in which no two words come twice in the same order;
3. the most likely of 10 samples at temperature 0.7, in which no two words come twice in the same order.

Where all have faults, the first of those with the fewest is given. The figures come from real captions: see
docs/decisions.md, "The guard against degenerate captions".
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from caption_rt.options import DecodeOptions, Strategy
from caption_rt.search import Rows, SpecialTokens, Step, Stepper, decode
from caption_rt.strategies import Hypothesis

__all__ = ["Fault", "Guarded", "decode_guarded", "faults_of", "strategies_after"]

Fault: TypeAlias = Literal["repetition", "no_end", "low_log_prob"]
"""What makes a caption degenerate."""

_LONG = 20
_LOW_LOG_PROB = -5.0
_PHRASE = 3


@dataclass(frozen=True)
class Guarded:
    """The captions of a photo, and how they came about."""

    hypotheses: list[Hypothesis]
    """Best first, at least 1 and at most `DecodeOptions.n_best`."""
    strategy: Strategy
    """How their words were chosen."""
    retried_for: tuple[Fault, ...]
    """The faults of the caption that was found as asked, for which it was decoded again; empty if it was not."""
    faults: tuple[Fault, ...]
    """The faults of the best of `hypotheses`; not empty only where no strategy found a better one."""


def faults_of(hypothesis: Hypothesis) -> tuple[Fault, ...]:
    """What makes a caption degenerate; see the module's text."""
    found: list[Fault] = []
    tokens = hypothesis.tokens
    if _repeats(tokens):
        found.append("repetition")
    if hypothesis.ended == "max_words" and len(tokens) >= _LONG:
        found.append("no_end")
    if hypothesis.log_prob / (len(tokens) + (hypothesis.ended == "end") or 1) < _LOW_LOG_PROB:
        found.append("low_log_prob")
    return tuple(found)


def strategies_after(options: DecodeOptions) -> Iterator[DecodeOptions]:
    """How a caption that was degenerate with `options` is decoded again, in this order."""
    once = min(2, options.no_repeat_ngram or 2)
    size = max(5, options.beam_size, options.n_best)
    yield replace(options, sample=False, beam_size=size, no_repeat_ngram=once)
    yield replace(
        options,
        sample=True,
        beam_size=1,
        n_best=max(10, options.n_best),
        temperature=0.7,
        top_k=0,
        top_p=1.0,
        no_repeat_ngram=once,
    )


def decode_guarded(
    stepper: Stepper,
    options: DecodeOptions,
    special: SpecialTokens,
    *,
    photo_seed: Callable[[int], int] | None = None,
) -> list[Guarded]:
    """Caption every photo of a batch, and decode degenerate captions again if `options.guard` is set.

    Args:
        stepper: see `caption_rt.search.Search`, as for all arguments.
        options: see `caption_rt.search.Search`.
        special: see `caption_rt.search.Search`.
        photo_seed: see `caption_rt.search.Search`.

    Raises:
        EngineError: see `caption_rt.search.decode`.
    """

    def run(options: DecodeOptions, photos: NDArray[np.int64]) -> list[Guarded]:
        found = decode(
            _Some(stepper, photos),
            options,
            special,
            photo_seed=lambda photo: photo_seed(int(photos[photo])) if photo_seed else int(photos[photo]),
        )
        return [Guarded(hypotheses, options.strategy, (), faults_of(hypotheses[0])) for hypotheses in found]

    results = run(options, np.arange(stepper.batch_size))
    if not options.guard:
        return results
    first_faults = [result.faults for result in results]
    for next_options in strategies_after(options):
        photos = np.array([photo for photo, result in enumerate(results) if result.faults], dtype=np.int64)
        if not len(photos):
            break
        for photo, result in zip(photos.tolist(), run(next_options, photos), strict=True):
            if len(result.faults) < len(results[photo].faults):
                results[photo] = replace(result, hypotheses=result.hypotheses[: options.n_best])
    return [replace(result, retried_for=faults) for result, faults in zip(results, first_faults, strict=True)]


class _Some:
    """Some photos of a stepper, as a stepper."""

    def __init__(self, stepper: Stepper, photos: NDArray[np.int64]) -> None:
        self._stepper = stepper
        self._photos = photos

    @property
    def batch_size(self) -> int:
        return len(self._photos)

    def initial_state(self) -> Rows:
        state = self._stepper.initial_state()
        return state if len(self._photos) == self._stepper.batch_size else state[self._photos]

    def step(self, tokens: NDArray[np.int64], state: Rows, images: NDArray[np.int64]) -> Step:
        return self._stepper.step(tokens, state, self._photos[images])


def _repeats(tokens: Sequence[int]) -> bool:
    for length in range(1, len(tokens) // 2 + 1):
        for first in range(len(tokens) - 2 * length + 1):
            phrase = tokens[first : first + length]
            if phrase == tokens[first + length : first + 2 * length]:
                return True
    phrases = [tuple(tokens[first : first + _PHRASE]) for first in range(len(tokens) - _PHRASE + 1)]
    return len(set(phrases)) < len(phrases)

"""Which words a hypothesis may go on with: each filter has one job, and sets what it forbids to minus infinity."""

from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from caption_rt.options import DecodeOptions

__all__ = ["Filter", "filters_of"]


class Filter(Protocol):
    """Forbids words."""

    def apply(self, log_probs: NDArray[np.float32], hypotheses: Sequence[Sequence[int]]) -> None:
        """Forbid in place.

        Args:
            log_probs: float32 [m, V]: the next word's log-probabilities; what is forbidden becomes -inf.
            hypotheses: the token ids of each of the m hypotheses so far, without the start token.
        """


def filters_of(options: DecodeOptions, *, end_id: int, banned: Collection[int]) -> list[Filter]:
    """The filters that options ask for.

    Args:
        options: how to decode.
        end_id: token id that ends a caption.
        banned: token ids that are never chosen.
    """
    found: list[Filter] = [_Banned(banned)]
    if options.min_words:
        found.append(_MinWords(options.min_words, end_id))
    if options.no_repeat_ngram:
        found.append(_NoRepeatNgram(options.no_repeat_ngram))
    return found


class _Banned:
    """Some tokens never."""

    def __init__(self, tokens: Collection[int]) -> None:
        self._tokens = np.array(sorted(tokens), dtype=np.int64)

    def apply(self, log_probs: NDArray[np.float32], hypotheses: Sequence[Sequence[int]]) -> None:
        log_probs[:, self._tokens] = -np.inf


class _MinWords:
    """No end before so many words."""

    def __init__(self, words: int, end_id: int) -> None:
        self._words = words
        self._end_id = end_id

    def apply(self, log_probs: NDArray[np.float32], hypotheses: Sequence[Sequence[int]]) -> None:
        for row, tokens in enumerate(hypotheses):
            if len(tokens) < self._words:
                log_probs[row, self._end_id] = -np.inf


class _NoRepeatNgram:
    """No sequence of n words twice."""

    def __init__(self, size: int) -> None:
        self._before = size - 1

    def apply(self, log_probs: NDArray[np.float32], hypotheses: Sequence[Sequence[int]]) -> None:
        for row, tokens in enumerate(hypotheses):
            last = list(tokens[len(tokens) - self._before :]) if self._before else []
            for position in range(len(tokens) - self._before):
                if list(tokens[position : position + self._before]) == last:
                    log_probs[row, tokens[position + self._before]] = -np.inf

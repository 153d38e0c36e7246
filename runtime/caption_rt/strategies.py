"""The search of one photo: a beam, of which greedy search is the narrowest, or samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from caption_rt.options import DecodeOptions

__all__ = ["Beam", "Ended", "Hypothesis", "Live", "PhotoSearch", "Samples"]

Ended: TypeAlias = Literal["end", "max_words", "no_word"]
"""Why a caption ended: the model said so; it was cut at the longest length; or the options left it no further word."""

_BLOCK = 128


@dataclass(frozen=True)
class Hypothesis:
    """A caption as token ids."""

    tokens: tuple[int, ...]
    """The words' token ids, without start and end."""
    log_probs: tuple[float, ...]
    """The log-probability of each word given the ones before: the model's own, whatever temperature drew it."""
    log_prob: float
    """The log-probability of the whole: the sum over its words and, where it ended by itself, its end token."""
    attention: NDArray[np.float32]
    """float32 [words, P]: where the model looked for each word."""
    ended: Ended
    """Why it ended."""
    score: float
    """What hypotheses are ranked by; higher is better. See `DecodeOptions.length_penalty`."""


class Live(NamedTuple):
    """A hypothesis that goes on."""

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    log_prob: float
    attention: tuple[NDArray[np.float32], ...]

    def extended(self, token: int, log_prob: float, attention: NDArray[np.float32]) -> "Live":
        """The hypothesis with one more word."""
        return Live(
            (*self.tokens, token),
            (*self.log_probs, log_prob),
            self.log_prob + log_prob,
            (*self.attention, attention),
        )


class PhotoSearch(Protocol):
    """The hypotheses of one photo."""

    @property
    def live(self) -> Sequence[Live]:
        """Those that go on, a row of the decoder's batch each."""

    def advance(
        self, log_probs: NDArray[np.float32], attention: NDArray[np.float32]
    ) -> tuple[Sequence[int], Sequence[int]]:
        """Extend the live hypotheses by a word.

        Args:
            log_probs: float32 [live, V], -inf where a token may not be chosen. Sums of them are float64.
            attention: float32 [live, P].

        Returns:
            For each hypothesis that is live now: the row it came from, and its new token id.
        """

    def settled(self) -> Live:
        """The words with which all candidates for the best caption begin, as a hypothesis without a log-probability."""

    def ranked(self) -> list[Hypothesis]:
        """The hypotheses, best first, at most `DecodeOptions.n_best`; those that still live are cut."""


class _Photo:
    """What all strategies keep of a photo: the hypotheses that live and those that are finished."""

    def __init__(self, options: DecodeOptions, end_id: int, rows: int) -> None:
        self._options = options
        self._end_id = end_id
        self._finished: list[Hypothesis] = []
        self._places = 0
        self.live: list[Live] = [Live((), (), 0.0, ())] * rows

    def settled(self) -> Live:
        """The words with which all candidates for the best caption begin; see `PhotoSearch.settled`."""
        # A finished hypothesis that is not the best of the finished ones can no longer become the best of all.
        candidates: list[Live | Hypothesis] = [*self.live, *sorted(self._finished, key=_rank)[:1]]
        first = candidates[0]
        shared = min(_shared(first.tokens, other.tokens) for other in candidates)
        return Live(first.tokens[:shared], first.log_probs[:shared], math.nan, tuple(first.attention[:shared]))

    def ranked(self) -> list[Hypothesis]:
        """The hypotheses, best first; those that still live are cut."""
        for hypothesis in self.live:
            self._finish(hypothesis, "max_words")
        self.live = []
        return sorted(self._finished, key=_rank)[: self._options.n_best]

    def _finish(self, live: Live, ended: Ended) -> None:
        length = len(live.tokens) + (ended == "end")
        attention = np.stack(live.attention) if live.attention else np.zeros((0, self._places), np.float32)
        score = live.log_prob / self._penalty(length)
        self._finished.append(Hypothesis(live.tokens, live.log_probs, live.log_prob, attention, ended, score))

    def _penalty(self, length: int) -> float:
        """Wu et al. 2016, equation 14."""
        return float(((5 + length) / 6) ** self._options.length_penalty)


class Beam(_Photo):
    """Beam search as Sutskever et al. 2014 (https://arxiv.org/abs/1409.3215) and Wu et al. 2016 describe it.

    The `beam_size` most likely unfinished hypotheses are kept. A hypothesis is finished when its end token is among the
    `beam_size` most likely continuations. The search is done when there are `beam_size` finished ones and no unfinished
    one can still get a better score than the worst of them. What is unfinished at the longest length is ranked with the
    finished ones as it is. With a beam of 1 this is greedy search, which goes no further than its first end.

    Of equally likely continuations, that of the better hypothesis comes first, then the lower token id; equally good
    captions are ranked by their token ids: the result is the same on every run.
    """

    def __init__(self, options: DecodeOptions, end_id: int) -> None:
        """Begin with no words."""
        super().__init__(options, end_id, 1)

    def advance(
        self, log_probs: NDArray[np.float32], attention: NDArray[np.float32]
    ) -> tuple[Sequence[int], Sequence[int]]:
        """Extend the live hypotheses by a word; see `PhotoSearch.advance`."""
        size, self._places = self._options.beam_size, attention.shape[1]
        scores = np.array([live.log_prob for live in self.live])
        live: list[Live] = []
        parents: list[int] = []
        # At most one continuation of each of the `size` hypotheses is its end, so twice as many hold `size` that go on.
        # Greedy search goes no further than its first end.
        for rank, (row, token) in enumerate(_best(log_probs, scores, 2 * size if size > 1 else 1)):
            parent, word = self.live[row], float(log_probs[row, token])
            if token == self._end_id:
                if rank < size:
                    self._finish(parent._replace(log_prob=parent.log_prob + word), "end")
            elif len(live) < size:
                live.append(parent.extended(token, word, attention[row]))
                parents.append(row)
        if not live and not self._finished:
            for hypothesis in self.live:
                self._finish(hypothesis, "no_word")
        self.live = [] if self._is_done(live) else live
        return parents[: len(self.live)], [hypothesis.tokens[-1] for hypothesis in self.live]

    def _is_done(self, live: Sequence[Live]) -> bool:
        size = self._options.beam_size
        if len(self._finished) < size or not live:
            return not live
        # A log-probability only falls as words come, and is divided by at most the penalty of the longest caption.
        bound = live[0].log_prob / self._penalty(self._options.max_words)
        return bound < sorted(self._finished, key=_rank)[size - 1].score


class Samples(_Photo):
    """Captions whose words are drawn by their probability, `DecodeOptions.n_best` of them side by side.

    Each sample has a stream of random numbers of its own, told by the seed, the photo and the sample's number, and
    takes one of them a word: what is drawn does not depend on the other photos and samples of the batch.
    """

    def __init__(self, options: DecodeOptions, end_id: int, photo_seed: int) -> None:
        """Begin with no words.

        Args:
            options: how to decode.
            end_id: token id that ends a caption.
            photo_seed: 0 to 2**64 - 1, the same for the same photo.
        """
        super().__init__(options, end_id, options.n_best)
        # The raw stream of this generator is fixed by NumPy's compatibility policy; what its Generator makes of it is
        # not (NEP 19).
        self._streams = [
            np.random.PCG64(np.random.SeedSequence((options.seed, photo_seed, number)))
            for number in range(options.n_best)
        ]

    def advance(
        self, log_probs: NDArray[np.float32], attention: NDArray[np.float32]
    ) -> tuple[Sequence[int], Sequence[int]]:
        """Extend the live hypotheses by a word; see `PhotoSearch.advance`."""
        self._places = attention.shape[1]
        live, streams, parents = [], [], []
        for row, (parent, stream) in enumerate(zip(self.live, self._streams, strict=True)):
            if log_probs[row].max() == -np.inf:
                self._finish(parent, "no_word")
                continue
            token = self._draw(log_probs[row].astype(np.float64), stream)
            word = float(log_probs[row, token])
            if token == self._end_id:
                self._finish(parent._replace(log_prob=parent.log_prob + word), "end")
                continue
            live.append(parent.extended(token, word, attention[row]))
            streams.append(stream)
            parents.append(row)
        self.live, self._streams = live, streams
        return parents, [hypothesis.tokens[-1] for hypothesis in live]

    def ranked(self) -> list[Hypothesis]:
        """The different captions that were drawn, best first; those that still live are cut."""
        return list({hypothesis.tokens: hypothesis for hypothesis in super().ranked()}.values())

    def _draw(self, log_probs: NDArray[np.float64], stream: "np.random.PCG64") -> int:
        """A token id by the distribution that temperature, top_k and top_p leave."""
        scaled = log_probs / self._options.temperature
        # Relative to the likeliest, so that no temperature overflows.
        weights = np.exp(scaled - scaled.max())
        weights[~self._kept(weights)] = 0
        totals = weights.cumsum()
        # 53 bits, the precision of float64, make a number from 0 to below 1.
        share = (int(stream.random_raw()) >> 11) * 2.0**-53
        # "right" passes over tokens of probability 0.
        return int(np.searchsorted(totals, share * totals[-1], side="right"))

    def _kept(self, weights: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which tokens may be drawn, bool [V]."""
        kept = weights > 0
        order = np.argsort(-weights, kind="stable")
        if self._options.top_k:
            kept[order[self._options.top_k :]] = False
        if self._options.top_p < 1:
            share = np.where(kept, weights, 0)[order].cumsum()
            # The first token that reaches top_p is kept, those after it are not.
            reached = int(np.searchsorted(share, self._options.top_p * share[-1]))
            kept[order[reached + 1 :]] = False
        return kept


def _rank(hypothesis: Hypothesis) -> tuple[float, tuple[int, ...]]:
    return -hypothesis.score, hypothesis.tokens


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two captions begin with alike."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _best(log_probs: NDArray[np.float32], scores: NDArray[np.float64], count: int) -> list[tuple[int, int]]:
    """The best continuations of a photo's hypotheses.

    Args:
        log_probs: float32 [live, V].
        scores: float64 [live]: the log-probability of each hypothesis so far.
        count: how many to find.

    Returns:
        The (row, column) of the `count` highest sums of both, best first, equal ones in the order of their position;
        fewer where the others are minus infinity.
    """
    columns = log_probs.shape[1]
    if len(scores) == count == 1:
        column = int(log_probs.argmax())
        return [(0, column)] if log_probs[0, column] > -np.inf else []
    candidates = np.flatnonzero(log_probs >= _edges(log_probs, scores, count))
    totals = log_probs.ravel()[candidates] + scores[candidates // columns]
    order = np.argsort(-totals, kind="stable")[:count]
    return [divmod(position, columns) for position in candidates[order[totals[order] > -np.inf]].tolist()]


def _edges(log_probs: NDArray[np.float32], scores: NDArray[np.float64], count: int) -> NDArray[np.float32]:
    """A value for each row, float32 [live, 1], that all of the `count` best continuations reach, and few others.

    As many blocks as `count` have a continuation that is as good as the worst of these blocks' maxima, so the `count`
    best are: the sums of all rows, megabytes for a wide beam, need be neither made nor sorted.
    """
    blocks = np.arange(0, log_probs.shape[1], _BLOCK)
    highest = (np.maximum.reduceat(log_probs, blocks, axis=1) + scores[:, None]).ravel()
    if count > len(highest):
        return np.full((len(scores), 1), -np.inf, np.float32)
    edge = np.partition(highest, len(highest) - count)[len(highest) - count]
    # Far enough below that no rounding, here to float32 or in the sums, keeps one out.
    lowest = edge - scores - 1e-6 * (1 + abs(edge) + np.abs(scores))
    return np.asarray(lowest[:, None], dtype=np.float32)

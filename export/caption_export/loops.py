"""Search inside an ONNX graph: greedy and beam, around a decoder's step, in standard operators.

Both are `caption_rt.strategies.Beam` written down a second time, for runtimes that have nothing but the graph. That
they choose the same words is for tests to show. Sums of log-probabilities are float64 as there.

Shapes in comments: n photos, V words, U units, P places; B hypotheses of a beam, m = n * B rows, t words so far.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, ValueInfoProto

from caption_export.weaving import Axes, Weaver, tensor_info
from caption_rt.options import DecodeOptions
from caption_rt.vocabulary import Vocabulary

__all__ = ["Found", "Searching", "beam_search", "greedy_search"]


@dataclass(frozen=True)
class Searching:
    """What a search starts from: names of tensors in the outer graph, and facts."""

    decoder: ModelProto
    """The step: token, state, features, keys to log_probs, next_state, attention."""
    features: str
    """float32 [n, P, E]."""
    keys: str
    """float32 [n, P, A]."""
    state: str
    """float32 [n, U]."""
    max_words: str
    """int64 [], at least 1: a caption is cut after so many words."""
    places: int
    """P."""
    units: int
    """U."""
    vocabulary: Vocabulary
    """For the special ids: padding, start and unknown are never chosen."""


@dataclass(frozen=True)
class Found:
    """What a search gives: names of tensors in the outer graph, of T steps; words that are none are padding."""

    tokens: str
    """int64 [n, T]: token ids of the words, then the id of padding."""
    word_log_probs: str
    """float32 [n, T]: 0 where there is no word."""
    attention: str
    """float32 [n, T, P]: 0 where there is no word."""
    log_prob: str
    """float64 [n]: of the whole, the end token included where it ended by itself."""
    ended: str
    """bool [n]: whether it ended by itself."""


class _Body:
    """The body of a loop: a graph, and what it carries from turn to turn."""

    def __init__(self, outer: Weaver) -> None:
        self.outer = outer
        self.weaver = Weaver(outer, prefix="step/")
        self.turn = "step/turn"
        """int64 []: the number of the turn, from 0."""
        self._inputs = [tensor_info(self.turn, "int64", ()), tensor_info("step/before", "bool", ())]
        self._outputs: list[ValueInfoProto] = []
        self._starts: list[str] = []
        self._ends: list[str] = []
        self._carried: list[tuple[str, str, Axes]] = []

    def carry(self, name: str, dtype: str, axes: Axes, start: str) -> str:
        """A tensor that goes from turn to turn; gives its name inside."""
        self._carried.append((name, dtype, axes))
        self._inputs.append(tensor_info(f"step/{name}", dtype, axes))
        self._starts.append(start)
        return f"step/{name}"

    def step(self, searching: Searching, token: str, state: str, features: str, keys: str) -> dict[str, str]:
        """The decoder, one word further: log_probs without what may not be said, next_state, attention."""
        given = {"token": token, "state": state, "features": features, "keys": keys}
        said = self.weaver.inline(searching.decoder, "decoder/", given, before=self.outer, fixed=("features", "keys"))
        vocabulary = searching.vocabulary
        silence = np.zeros(len(vocabulary), np.float32)
        silence[sorted(vocabulary.unspoken_ids)] = -np.inf
        allowed = self.weaver.add("Add", said["log_probs"], self.weaver.constant(silence, "float32"))
        return {**said, "log_probs": allowed}

    def run(self, max_words: str, ended: str, carried: list[str], collected: list[tuple[str, str, Axes]]) -> list[str]:
        """Close the body and put the loop into the outer graph.

        Args:
            max_words: int64 []: the most turns.
            ended: bool, any shape: the loop stops when all are true.
            carried: What the next turn gets, in the order of `carry`.
            collected: Tensors of which one is kept from each turn, each with dtype and axes.

        Returns:
            The carried tensors after the last turn, and the collected ones with an axis of turns before the others.
        """
        weaver = self.weaver
        all_ended = weaver.cast(weaver.add("ReduceMin", weaver.cast(ended, "int64"), keepdims=0), "bool")
        weaver.name(weaver.add("Not", all_ended), "step/go_on")
        self._outputs.append(tensor_info("step/go_on", "bool", ()))
        for (name, dtype, axes), tensor in zip(self._carried, carried, strict=True):
            weaver.name(tensor, f"step/next_{name}")
            self._outputs.append(tensor_info(f"step/next_{name}", dtype, axes))
        for index, (tensor, dtype, axes) in enumerate(collected):
            weaver.name(tensor, f"step/collected_{index}")
            self._outputs.append(tensor_info(f"step/collected_{index}", dtype, axes))
        body = weaver.graph("step", self._inputs, self._outputs)
        go = self.outer.constant(True, "bool")
        return self.outer.add_several(len(carried) + len(collected), "Loop", max_words, go, *self._starts, body=body)


def greedy_search(outer: Weaver, searching: Searching) -> Found:
    """The most likely word each time, until the end token.

    Rows of photos that have ended go on with padding until all have.
    """
    vocabulary, body = searching.vocabulary, _Body(outer)
    count = outer.add("Shape", searching.state, end=1)
    token = body.carry("token", "int64", [None], outer.filled(count, vocabulary.start_id, "int64"))
    state = body.carry("state", "float32", [None, searching.units], searching.state)
    ended = body.carry("ended", "bool", [None], outer.filled(count, False, "bool"))
    said = body.step(searching, token, state, searching.features, searching.keys)
    add, weaver = body.weaver.add, body.weaver
    chosen = add("ArgMax", said["log_probs"], axis=1, keepdims=0)  # the first of equal ones
    value = add("ReduceMax", said["log_probs"], weaver.int64(1), keepdims=0)
    now_ended = add("Or", ended, add("Equal", chosen, weaver.constant(vocabulary.end_id, "int64")))
    word = add("Where", now_ended, weaver.constant(vocabulary.pad_id, "int64"), chosen)
    none = weaver.constant(0, "float32")
    attention = add("Where", add("Unsqueeze", now_ended, weaver.int64(1)), none, said["attention"])
    _, _, has_ended, words, values, looked = body.run(
        searching.max_words,
        now_ended,
        [word, said["next_state"], now_ended],
        [
            (word, "int64", [None]),
            (add("Where", ended, none, value), "float32", [None]),
            (attention, "float32", [None, searching.places]),
        ],
    )
    tokens = outer.add("Transpose", words, perm=[1, 0])
    log_probs = outer.add("Transpose", values, perm=[1, 0])  # the end token's too
    is_word = outer.add("Not", outer.add("Equal", tokens, outer.constant(vocabulary.pad_id, "int64")))
    return Found(
        tokens=tokens,
        word_log_probs=outer.add("Where", is_word, log_probs, outer.constant(0, "float32")),
        attention=outer.add("Transpose", looked, perm=[1, 0, 2]),
        log_prob=outer.add("ReduceSum", outer.cast(log_probs, "float64"), outer.int64(1), keepdims=0),
        ended=has_ended,
    )


def beam_search(outer: Weaver, searching: Searching, options: DecodeOptions) -> Found:
    """Beam search as `caption_rt.strategies.Beam` does it, with the best caption as the result.

    All photos have `beam_size` rows from the first step on, of which at first one lives; a log-probability of minus
    infinity marks those that do not. Of finished hypotheses only the best is kept whole, and of the others the scores,
    which say when the search is done.

    Args:
        outer: The graph.
        searching: What to start from.
        options: Beam size and length penalty.
    """
    return _BeamLoop(outer, searching, options).found()


class _BeamLoop:
    """The parts of `beam_search`, which share its sizes."""

    def __init__(self, outer: Weaver, searching: Searching, options: DecodeOptions) -> None:
        self.outer, self.searching, self.options = outer, searching, options
        self.size = options.beam_size
        self.body = _Body(outer)
        self.inside = self.body.weaver
        self.never = outer.constant(-np.inf, "float64")
        self.count = outer.add("Shape", searching.state, end=1)  # [1]: n
        self.rows = outer.add("Concat", self.count, outer.int64(self.size), axis=0)  # [2]: n, B
        photo = outer.add(
            "Range",
            outer.constant(0, "int64"),
            outer.add("Squeeze", self.count),
            outer.constant(1, "int64"),
        )
        column = outer.add("Unsqueeze", photo, outer.int64(1))
        self.photo_of_row = outer.add("Reshape", outer.add("Expand", column, self.rows), outer.int64(-1))  # [m]
        self.first_row = outer.add("Mul", column, outer.constant(self.size, "int64"))  # [n, 1]
        self.nothing = self._words(self.count, 1)

    def found(self) -> Found:
        """Put the loop in."""
        outer, carry, vocabulary = self.outer, self.body.carry, self.searching.vocabulary
        repeated = [
            outer.add("Gather", tensor, self.photo_of_row)
            for tensor in (self.searching.state, self.searching.features, self.searching.keys)
        ]
        all_rows = outer.add("Shape", self.photo_of_row)
        token = carry("token", "int64", [None], outer.filled(all_rows, vocabulary.start_id, "int64"))
        state = carry("state", "float32", [None, self.searching.units], repeated[0])
        first = np.full((1, self.size), -np.inf)
        first[0, 0] = 0
        start = outer.add("Expand", outer.constant(first, "float64"), self.rows)
        live = carry("live", "float64", [None, self.size], start)
        live_words = self._carry_words("live", all_rows)
        scores = carry("scores", "float64", [None, self.size], outer.filled(self.rows, -np.inf, "float64"))
        none = outer.filled(self.count, -np.inf, "float64")
        best = [carry(name, "float64", [None], none) for name in ("best_score", "best_log_prob")]
        best_words = self._carry_words("best", self.count)
        said = self.body.step(self.searching, token, state, *repeated[1:])
        continued = self._continuations(said["log_probs"], live)
        new_scores, new_best, new_best_words = self._finish(continued, live_words, scores, best, best_words)
        going, words, parents = self._go_on(continued, said["attention"], live_words)
        done, going = self._done(going, new_scores)
        next_state = self.inside.add("Gather", said["next_state"], parents)
        after = self.body.run(
            self.searching.max_words,
            done,
            [words[0], next_state, going, *words[1:], new_scores, *new_best, *new_best_words],
            [],
        )
        return self._result(after[2], after[3:6], after[7], after[8], after[9:12])

    def _words(self, rows: str, count: int) -> list[str]:
        """Token ids, log-probabilities and attention of so many words that are none: [rows, t], [rows, t, P]."""
        outer = self.outer
        shape = outer.add("Concat", rows, outer.int64(count), axis=0)
        places = outer.add("Concat", shape, outer.int64(self.searching.places), axis=0)
        return [
            outer.filled(shape, self.searching.vocabulary.pad_id, "int64"),
            outer.filled(shape, 0, "float32"),
            outer.filled(places, 0, "float32"),
        ]

    def _carry_words(self, name: str, rows: str) -> list[str]:
        """Words of which the body gets none at first."""
        tokens, log_probs, attention = self._words(rows, 0)
        return [
            self.body.carry(f"{name}_tokens", "int64", [None, None], tokens),
            self.body.carry(f"{name}_log_probs", "float32", [None, None], log_probs),
            self.body.carry(f"{name}_attention", "float32", [None, None, self.searching.places], attention),
        ]

    def _continuations(self, log_probs: str, live: str) -> dict[str, str]:
        """The 2 B best continuations of each photo, best first, [n, 2 B] each.

        At most one continuation of each of the B hypotheses is its end, so twice as many hold B that go on. The best of
        each row come first, so that only those are added up in float64.
        """
        add, inside = self.inside.add, self.inside
        words = min(2 * self.size, len(self.searching.vocabulary))  # of one row
        values, tokens = inside.add_several(2, "TopK", log_probs, inside.int64(words))  # [m, words]
        sums = add("Add", inside.cast(values, "float64"), add("Reshape", live, inside.int64(-1, 1)))
        side_by_side = inside.int64(-1, self.size * words)
        best, places = inside.add_several(2, "TopK", add("Reshape", sums, side_by_side), inside.int64(2 * self.size))
        token = add("GatherElements", add("Reshape", tokens, side_by_side), places, axis=1)
        return {
            "log_prob": best,
            "token": token,
            "word_log_prob": add("GatherElements", add("Reshape", values, side_by_side), places, axis=1),
            "slot": add("Div", places, inside.constant(words, "int64")),  # 0 to B - 1: whose continuation it is
            "is_end": add("Equal", token, inside.constant(self.searching.vocabulary.end_id, "int64")),
        }

    def _finish(
        self, continued: dict[str, str], live_words: list[str], scores: str, best: list[str], best_words: list[str]
    ) -> tuple[str, list[str], list[str]]:
        """Ends among the B best continuations finish their hypotheses: the new scores, the best one, its words."""
        add, inside = self.inside.add, self.inside
        among_best = inside.constant([[rank < self.size for rank in range(2 * self.size)]], "bool")
        length = add("Add", self.body.turn, inside.constant(1, "int64"))  # the words, and the end
        penalized = self._penalized(inside, continued["log_prob"], length)
        finished = add("Where", add("And", continued["is_end"], among_best), penalized, self.never)  # [n, 2 B]
        new_scores = inside.add_several(2, "TopK", add("Concat", scores, finished, axis=1), inside.int64(self.size))[0]
        which = add("ArgMax", finished, axis=1, keepdims=1)  # [n, 1]
        score = add("ReduceMax", finished, inside.int64(1), keepdims=0)
        better = add("Greater", score, best[0])
        log_prob, slot = (
            add("GatherElements", continued[name], which, axis=1) for name in ("log_prob", "slot")
        )  # [n, 1]
        log_prob, row = (
            add("Squeeze", tensor, inside.int64(1)) for tensor in (log_prob, add("Add", slot, self.first_row))
        )
        words = [
            add("Where", self._wider(better, rank), add("Gather", new, row), old)
            for new, old, rank in zip(live_words, best_words, (2, 2, 3), strict=True)
        ]
        padded = [add("Concat", word, fill, axis=1) for word, fill in zip(words, self.nothing, strict=True)]
        return (
            new_scores,
            [add("Where", better, score, best[0]), add("Where", better, log_prob, best[1])],
            padded,
        )

    def _go_on(self, continued: dict[str, str], attention: str, live_words: list[str]) -> tuple[str, list[str], str]:
        """The B best that do not end: their log-probabilities [n, B]; next token and words; the rows they come from."""
        add, inside = self.inside.add, self.inside
        unended = add("Where", continued["is_end"], self.never, continued["log_prob"])
        going, order = inside.add_several(2, "TopK", unended, inside.int64(self.size))
        slots = add("GatherElements", continued["slot"], order, axis=1)
        parents = add("Reshape", add("Add", slots, self.first_row), inside.int64(-1))  # [m]
        token = add("Reshape", add("GatherElements", continued["token"], order, axis=1), inside.int64(-1, 1))
        value = add("Reshape", add("GatherElements", continued["word_log_prob"], order, axis=1), inside.int64(-1, 1))
        looked = add("Unsqueeze", add("Gather", attention, parents), inside.int64(1))
        words = [
            add("Concat", add("Gather", word, parents), new, axis=1)
            for word, new in zip(live_words, (token, value, looked), strict=True)
        ]
        return going, [add("Squeeze", token, inside.int64(1)), *words], parents

    def _done(self, going: str, scores: str) -> tuple[str, str]:
        """Whether each photo is done, and the log-probabilities of what goes on in those that are not.

        A log-probability only falls as words come, and is divided by at most the penalty of the longest caption.
        """
        add, inside = self.inside.add, self.inside
        best, worst_finished = self._column(going, 0), self._column(scores, self.size - 1)
        bound = self._penalized(inside, best, self.searching.max_words)
        done = add("Or", add("Less", bound, worst_finished), add("Equal", best, self.never))
        return done, add("Where", self._wider(done, 2), self.never, going)

    def _result(self, live: str, live_words: list[str], score: str, log_prob: str, best_words: list[str]) -> Found:
        """The best finished hypothesis, or the best one that was cut, whichever has the higher score."""
        outer = self.outer
        cut = outer.add("Squeeze", outer.add("Gather", live, outer.int64(0), axis=1), outer.int64(1))  # [n]
        better = outer.add("Greater", self._penalized(outer, cut, self.searching.max_words), score)
        row = outer.add("Squeeze", self.first_row, outer.int64(1))
        tokens, word_log_probs, attention = (
            outer.add(
                "Where",
                outer.add("Unsqueeze", better, outer.int64(*range(1, rank))),
                outer.add("Gather", live_word, row),
                best_word,
            )
            for live_word, best_word, rank in zip(live_words, best_words, (2, 2, 3), strict=True)
        )
        return Found(
            tokens,
            word_log_probs,
            attention,
            outer.add("Where", better, cut, log_prob),
            outer.add("Not", better),
        )

    def _penalized(self, weaver: Weaver, log_prob: str, length: str) -> str:
        """A log-probability as hypotheses are ranked by it: Wu et al. 2016, equation 14."""
        if self.options.length_penalty == 0:
            return log_prob
        sixth = weaver.add(
            "Div",
            weaver.cast(weaver.add("Add", length, weaver.constant(5, "int64")), "float64"),
            weaver.constant(6, "float64"),
        )
        penalty = weaver.add("Pow", sixth, weaver.constant(self.options.length_penalty, "float64"))
        return weaver.add("Div", log_prob, penalty)

    def _column(self, tensor: str, number: int) -> str:
        """[n] of [n, columns]."""
        add, inside = self.inside.add, self.inside
        return add("Squeeze", add("Gather", tensor, inside.int64(number), axis=1), inside.int64(1))

    def _wider(self, flags: str, rank: int) -> str:
        """Bool [n] as [n, 1, ...] of so many axes."""
        return self.inside.add("Unsqueeze", flags, self.inside.int64(*range(1, rank)))

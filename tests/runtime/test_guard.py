"""The guard: what it takes for degenerate, and how such captions are decoded again."""

from dataclasses import replace

import numpy as np
import pytest

from caption_rt.guard import decode_guarded, faults_of, strategies_after
from caption_rt.options import DecodeOptions
from caption_rt.search import Step, decode
from caption_rt.strategies import Hypothesis
from steppers import END, SPECIAL, A, B, C, RandomStepper


def hypothesis(tokens, log_prob=-1.0, ended="end"):
    tokens = tuple(tokens)
    return Hypothesis(tokens, (0.0,) * len(tokens), log_prob, np.zeros((len(tokens), 2), np.float32), ended, log_prob)


@pytest.mark.parametrize(
    ("tokens", "repeats"),
    [
        ([], False),
        ([1], False),
        ([1, 2, 1], False),
        ([1, 1], True),
        ([1, 2, 1, 2], True),
        ([9, 1, 2, 3, 1, 2, 3, 8], True),
        ([1, 2, 3, 9, 1, 2, 3], True),
        ([1, 2, 9, 1, 2, 8, 1, 2], False),
        ([1, 2, 3, 4, 5, 6, 7], False),
    ],
)
def test_repetition(tokens, repeats):
    assert faults_of(hypothesis(tokens)) == (("repetition",) if repeats else ())


def test_no_end_is_a_fault_of_long_captions_alone():
    assert faults_of(hypothesis(range(20), ended="max_words")) == ("no_end",)
    assert faults_of(hypothesis(range(19), ended="max_words")) == ()
    assert faults_of(hypothesis(range(30))) == ()


def test_a_low_log_probability_is_one_a_word():
    assert faults_of(hypothesis([1, 2], -15.1)) == ("low_log_prob",)
    assert faults_of(hypothesis([1, 2], -14.9)) == ()
    assert faults_of(hypothesis([1, 2], -10.1, "max_words")) == ("low_log_prob",)
    assert faults_of(hypothesis([], -5.1)) == ("low_log_prob",)
    assert faults_of(hypothesis([1] * 20, -110.0, "max_words")) == ("repetition", "no_end", "low_log_prob")


def test_the_order_of_strategies():
    asked = DecodeOptions(max_words=9, min_words=2, banned_words=("cat",), seed=4)
    beam, sample = strategies_after(asked)
    assert (beam.strategy, beam.beam_size, beam.no_repeat_ngram) == ("beam", 5, 2)
    assert (sample.strategy, sample.n_best, sample.temperature, sample.no_repeat_ngram) == ("sample", 10, 0.7, 2)
    for options in (beam, sample):
        same = ("max_words", "min_words", "banned_words", "seed", "allow_unk")
        assert {name: getattr(options, name) for name in same} == {name: getattr(asked, name) for name in same}
    wide, sample = strategies_after(DecodeOptions(beam_size=8, n_best=8, no_repeat_ngram=1))
    assert (wide.beam_size, wide.n_best, wide.no_repeat_ngram) == (8, 8, 1)
    assert (sample.beam_size, sample.n_best) == (1, 10)
    again, _ = strategies_after(DecodeOptions(sample=True, n_best=20))
    assert (again.strategy, again.beam_size, again.n_best) == ("beam", 20, 20)


class Stutter(RandomStepper):
    """Photo i of seed 0 says A for ever if it may; that of seed 1 says A and ends."""

    def step(self, tokens, state, images):
        self.sizes.append(images.tolist())
        rows = np.full((len(tokens), 7), -8.0, np.float32)
        rows[:, A], rows[:, B], rows[:, C], rows[:, END] = -0.1, -3.0, -3.5, -4.0
        ends = (state[:, 0] == 1) & (tokens == A)
        rows[ends, END] = -0.01
        return Step(rows, state, np.zeros((len(tokens), 2), np.float32))


def test_only_degenerate_captions_are_decoded_again():
    stepper = Stutter([1, 0, 1])
    options = DecodeOptions(max_words=6)
    asked = decode(Stutter([1, 0, 1]), options, SPECIAL)
    assert asked[1][0].tokens == (A,) * 6
    found = decode_guarded(stepper, options, SPECIAL)
    assert [f.strategy for f in found] == ["greedy", "beam", "greedy"]
    assert [f.retried_for for f in found] == [(), ("repetition",), ()]
    assert [f.faults for f in found] == [(), (), ()]
    assert found[0].hypotheses[0].tokens == found[2].hypotheses[0].tokens == (A,)
    assert faults_of(found[1].hypotheses[0]) == ()
    assert len(found[1].hypotheses) == 1
    # After the first six steps the second photo alone is decoded.
    assert {tuple(set(images)) for images in stepper.sizes[6:]} == {(1,)}


def test_without_the_guard_the_caption_stays_and_says_what_is_wrong():
    (found,) = decode_guarded(Stutter([0]), DecodeOptions(max_words=6, guard=False), SPECIAL)
    assert found.hypotheses[0].tokens == (A,) * 6
    assert (found.strategy, found.retried_for, found.faults) == ("greedy", (), ("repetition",))


def test_where_nothing_helps_the_first_of_the_least_faulty_is_given():
    class Mumble(Stutter):
        """Knows one word and no end: even the beam and the samples have nothing else."""

        def step(self, tokens, state, images):
            step = super().step(tokens, state, images)
            rows = np.full_like(step.log_probs, -9.0)
            return step._replace(log_probs=rows)

    (found,) = decode_guarded(Mumble([0]), DecodeOptions(max_words=3), SPECIAL)
    assert found.retried_for == ("low_log_prob",)
    assert found.faults == ("low_log_prob",)
    assert found.strategy == "greedy"


def test_the_guard_leaves_as_many_captions_as_were_asked_for():
    options = DecodeOptions(max_words=6, beam_size=2, n_best=2)
    for found in decode_guarded(Stutter([0, 1]), options, SPECIAL):
        assert len(found.hypotheses) == 2


def test_samples_of_a_retry_depend_on_the_photo_and_not_on_its_place():
    class Endless(Stutter):
        """Degenerate for greedy and beam search alike: long, never ending, so that samples are drawn."""

    options = DecodeOptions(max_words=6)
    seeds = {0: 77, 1: 78}
    both = decode_guarded(Endless([0, 0]), options, SPECIAL, photo_seed=seeds.__getitem__)
    alone = decode_guarded(Endless([0]), options, SPECIAL, photo_seed=lambda _: 78)
    assert both[1].hypotheses[0].tokens == alone[0].hypotheses[0].tokens
    assert replace(both[1], hypotheses=[]) == replace(alone[0], hypotheses=[])

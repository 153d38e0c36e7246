"""Greedy and beam search, against enumeration of every caption and against a plain reference."""

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest

from caption_rt.errors import EngineError, OptionsError
from caption_rt.search import DecodeOptions, Step, decode

PAD, UNK, START, END, A, B, C = range(7)
BANNED = (PAD, UNK, START)
SPECIALS = {"start_id": START, "end_id": END, "banned": BANNED}


@dataclass
class RandomStepper:
    """Log-probabilities that depend on the photo and on every word before: the state is a hash of both.

    With `levels` they are rounded to so few values that ties are everywhere.
    """

    seeds: list[int]
    vocabulary: int = 7
    levels: int | None = None
    sizes: list[int] = field(default_factory=list)

    @property
    def batch_size(self):
        return len(self.seeds)

    def initial_state(self):
        return np.array([[seed] for seed in self.seeds], np.float32)

    def log_probs(self, token, state):
        random = np.random.default_rng([int(token), int(state)])
        if self.levels:
            return -np.log(2) * random.integers(1, self.levels + 1, self.vocabulary)
        logits = random.normal(0, 1.5, self.vocabulary)
        return logits - np.log(np.exp(logits).sum())

    def step(self, tokens, state, images):
        assert tokens.dtype == images.dtype == np.int64
        assert (np.diff(images) >= 0).all()
        self.sizes.append(len(tokens))
        rows = [self.log_probs(token, value) for token, value in zip(tokens, state[:, 0], strict=True)]
        following = (state * 31 + tokens[:, None] * 7 + 1) % 9973
        # The attention tells which photo and which token it was given for.
        attention = np.stack([images, tokens], axis=1)
        return Step(np.array(rows, np.float32), following.astype(np.float32), attention.astype(np.float32))


def score_of(log_prob, length, penalty):
    return log_prob / ((5 + length) / 6) ** penalty


def probability(stepper, photo, tokens):
    """The log-probabilities of each token of a sequence, float64."""
    state, last, result = stepper.initial_state()[photo : photo + 1], START, []
    for token in tokens:
        step = stepper.step(np.array([last]), state, np.array([photo]))
        result.append(float(step.log_probs[0, token]))
        state, last = step.state, token
    return result


def every_caption(stepper, photo, options):
    """(score, tokens, ended) of each caption there is, best first."""
    words = [token for token in range(stepper.vocabulary) if token not in (*BANNED, END)]
    found = []
    for length in range(options.max_words + 1):
        for tokens in itertools.product(words, repeat=length):
            whole = tokens if length == options.max_words else (*tokens, END)
            score = score_of(sum(probability(stepper, photo, whole)), len(whole), options.length_penalty)
            found.append((-score, tokens, "max_words" if length == options.max_words else "end"))
    return sorted(found)


def reference_beam(stepper, photo, options):
    """Beam search of one photo as one would write it down, without batches and without stopping early."""
    live, finished = [(0.0, (), stepper.initial_state()[photo : photo + 1])], []
    for _ in range(options.max_words):
        continuations = []
        for rank, (log_prob, tokens, state) in enumerate(live):
            last = tokens[-1] if tokens else START
            step = stepper.step(np.array([last]), state, np.array([photo]))
            for token in range(stepper.vocabulary):
                if token not in BANNED:
                    total = log_prob + float(step.log_probs[0, token])
                    continuations.append((-total, rank, token, tokens, step.state))
        continuations.sort(key=lambda item: item[:3])
        live = []
        for position, (negative, _, token, tokens, state) in enumerate(continuations):
            if token == END and position < options.beam_size:
                finished.append((-score_of(-negative, len(tokens) + 1, options.length_penalty), tokens, "end"))
            elif token != END and len(live) < options.beam_size:
                live.append((-negative, (*tokens, token), state))
        if options.beam_size == 1 and finished:
            live = []
            break
    cut = [(-score_of(total, len(tokens), options.length_penalty), tokens, "max_words") for total, tokens, _ in live]
    return sorted(finished + cut)[: options.beam_size]


def facts(hypotheses):
    return [(-h.score, h.tokens, h.ended) for h in hypotheses]


def assert_same(actual, expected):
    """Tokens and endings are equal, scores to rounding."""
    assert [item[1:] for item in actual] == [item[1:] for item in expected]
    np.testing.assert_allclose([item[0] for item in actual], [item[0] for item in expected], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("penalty", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("seed", range(6))
def test_a_beam_that_holds_everything_finds_the_best_captions_there_are(seed, penalty):
    stepper = RandomStepper([seed])
    options = DecodeOptions(beam_size=200, length_penalty=penalty, max_words=4)
    (found,) = decode(stepper, options, **SPECIALS)
    expected = every_caption(stepper, 0, options)
    assert len(expected) == len(found) == 1 + 3 + 9 + 27 + 81
    assert_same(facts(found), expected)


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("penalty", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("beam_size", [1, 2, 3, 5])
def test_beam_search_is_the_reference_of_each_photo(beam_size, penalty, levels):
    """Also: a photo's result does not depend on its neighbours, and stopping early changes nothing of the best."""
    stepper = RandomStepper(list(range(16)), vocabulary=9, levels=levels)
    options = DecodeOptions(beam_size=beam_size, length_penalty=penalty, max_words=9)
    together = decode(stepper, options, **SPECIALS)
    for photo, hypotheses in enumerate(together):
        assert_same(facts(hypotheses), reference_beam(stepper, photo, options))
        (alone,) = decode(RandomStepper([photo], vocabulary=9, levels=levels), options, **SPECIALS)
        assert facts(alone) == facts(hypotheses)


def test_greedy_takes_the_most_likely_word_each_time():
    stepper = RandomStepper(list(range(30)))
    for photo, (hypothesis,) in enumerate(decode(stepper, DecodeOptions(max_words=6), **SPECIALS)):
        tokens = []
        while len(tokens) < 6:
            allowed = stepper.initial_state()[photo : photo + 1]
            for last in (START, *tokens):
                step = stepper.step(np.array([last]), allowed, np.array([photo]))
                allowed = step.state
            choice = max((END, A, B, C), key=lambda token: step.log_probs[0, token])
            if choice == END:
                break
            tokens.append(choice)
        assert hypothesis.tokens == tuple(tokens)
        assert hypothesis.ended == ("max_words" if len(tokens) == 6 else "end")


def test_log_probabilities_and_attention_belong_to_the_words():
    stepper = RandomStepper([3, 4, 5, 6])
    for photo, hypotheses in enumerate(decode(stepper, DecodeOptions(beam_size=4, max_words=5), **SPECIALS)):
        for hypothesis in hypotheses:
            tokens = hypothesis.tokens
            whole = (*tokens, END) if hypothesis.ended == "end" else tokens
            expected = probability(stepper, photo, whole)
            assert hypothesis.log_probs == pytest.approx(expected[: len(tokens)])
            assert hypothesis.log_prob == pytest.approx(sum(expected))
            assert hypothesis.attention.dtype == np.float32
            assert hypothesis.attention.tolist() == [[photo, last] for last in (START, *tokens)][: len(tokens)]
            assert hypothesis.attention.shape == (len(tokens), 2)


def test_equal_words_go_to_the_lower_token_id():
    stepper = RandomStepper([0], levels=1)
    (greedy,) = decode(stepper, DecodeOptions(max_words=3), **SPECIALS)
    assert greedy[0].tokens == ()
    stepper.log_probs = lambda token, state: np.where(np.arange(7) == END, -9.0, -1.0)
    (beam,) = decode(stepper, DecodeOptions(beam_size=3, max_words=2), **SPECIALS)
    assert [h.tokens for h in beam] == [(A, A), (A, B), (A, C)]


def test_finished_photos_leave_the_batch():
    """Photo i says `i` words and ends."""
    stepper = RandomStepper([3, 0, 1])
    stepper.log_probs = lambda token, state: np.log(np.eye(7)[A if state > 0 else END] * 0.99 + 0.001)

    def step(tokens, state, images):
        stepper.sizes.append(images.tolist())
        rows = np.array([stepper.log_probs(0, value) for value in state[:, 0]], np.float32)
        return Step(rows, state - 1, np.zeros((len(tokens), 2), np.float32))

    stepper.step = step
    result = decode(stepper, DecodeOptions(max_words=10), **SPECIALS)
    assert [h[0].tokens for h in result] == [(A, A, A), (), (A,)]
    assert stepper.sizes == [[0, 1, 2], [0, 2], [0], [0]]
    assert [h[0].ended for h in result] == ["end"] * 3
    assert result[1][0].attention.shape == (0, 2)


def test_a_beam_stops_when_nothing_can_get_better():
    """The end is almost certain after two words: no further steps are made for the sake of hopeless hypotheses."""
    stepper = RandomStepper([1])
    sure = np.log(np.where(np.arange(7) == END, 0.97, 0.005))
    words = np.log(np.where(np.arange(7) == A, 0.9, 0.1 / 6))
    stepper.log_probs = lambda token, state: sure if state >= 3 else words

    def step(tokens, state, images):
        stepper.sizes.append(len(tokens))
        rows = np.array([stepper.log_probs(0, value) for value in state[:, 0]], np.float32)
        return Step(rows, state + 1, np.zeros((len(tokens), 2), np.float32))

    stepper.step = step
    (hypotheses,) = decode(stepper, DecodeOptions(beam_size=2, max_words=50), **SPECIALS)
    assert hypotheses[0].tokens == (A, A)
    assert stepper.sizes == [1, 2, 2]


def test_max_words_cuts():
    stepper = RandomStepper([0, 1])
    stepper.log_probs = lambda token, state: np.where(np.arange(7) == END, -50.0, -1.0 - np.arange(7))
    for beam_size in (1, 3):
        for hypotheses in decode(stepper, DecodeOptions(beam_size=beam_size, max_words=3), **SPECIALS):
            assert hypotheses[0].tokens == (A, A, A)
            assert hypotheses[0].ended == "max_words"
            assert hypotheses[0].log_prob == pytest.approx(-15)


def test_banned_tokens_are_never_chosen_however_likely():
    stepper = RandomStepper([0])
    stepper.log_probs = lambda token, state: np.array([-0.1, -0.1, -0.1, -5, -4, -3, -6])
    for beam_size in (1, 4):
        (hypotheses,) = decode(stepper, DecodeOptions(beam_size=beam_size, max_words=2), **SPECIALS)
        assert all(set(h.tokens) <= {A, B, C} for h in hypotheses)
    assert hypotheses[0].log_prob == pytest.approx(-5)


def test_no_photos_no_captions():
    assert decode(RandomStepper([]), DecodeOptions(), **SPECIALS) == []


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "not a number"), (-np.inf, "the decoder allows no word")], ids=["nan", "-inf"]
)
def test_a_broken_decoder_is_an_engine_error(value, message):
    stepper = RandomStepper([0])
    stepper.log_probs = lambda token, state: np.full(7, value)
    with pytest.raises(EngineError, match=message):
        decode(stepper, DecodeOptions(beam_size=2), **SPECIALS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam_size": 0}, "beam_size must be a whole number from 1 to 1000, not 0"),
        ({"beam_size": 1001}, "not 1001"),
        ({"beam_size": 2.0}, "not 2.0"),
        ({"beam_size": True}, "not True"),
        ({"max_words": -1}, "max_words must be a whole number from 1 to 1000, not -1"),
        ({"length_penalty": -0.1}, "length_penalty must be a number of at least 0, not -0.1"),
        ({"length_penalty": float("nan")}, "not nan"),
        ({"length_penalty": "1"}, "not '1'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(OptionsError) as caught:
        DecodeOptions(**options)
    assert message in str(caught.value)
    with pytest.raises(ValueError, match="must be"):
        DecodeOptions(**options)

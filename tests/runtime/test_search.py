"""Greedy and beam search, against enumeration of every caption and against a plain reference."""

import itertools

import numpy as np
import pytest

from caption_rt.errors import EngineError
from caption_rt.options import DecodeOptions
from caption_rt.search import Search, Step, decode
from steppers import BANNED, END, SPECIAL, START, A, B, C, RandomStepper


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
    options = DecodeOptions(beam_size=200, n_best=200, length_penalty=penalty, max_words=4)
    (found,) = decode(stepper, options, SPECIAL)
    expected = every_caption(stepper, 0, options)
    assert len(expected) == len(found) == 1 + 3 + 9 + 27 + 81
    assert_same(facts(found), expected)


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("penalty", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("beam_size", [1, 2, 3, 5])
def test_beam_search_is_the_reference_of_each_photo(beam_size, penalty, levels):
    """Also: a photo's result does not depend on its neighbours, and stopping early changes nothing of the best."""
    stepper = RandomStepper(list(range(16)), vocabulary=9, levels=levels)
    options = DecodeOptions(beam_size=beam_size, n_best=beam_size, length_penalty=penalty, max_words=9)
    together = decode(stepper, options, SPECIAL)
    for photo, hypotheses in enumerate(together):
        assert_same(facts(hypotheses), reference_beam(stepper, photo, options))
        (alone,) = decode(RandomStepper([photo], vocabulary=9, levels=levels), options, SPECIAL)
        assert facts(alone) == facts(hypotheses)


@pytest.mark.parametrize("levels", [None, 3, 40])
@pytest.mark.parametrize("beam_size", [1, 3, 40])
def test_a_beam_over_thousands_of_words_is_the_reference(beam_size, levels):
    """With so many words, few are looked at; with few levels, hundreds are as good as the last one that is kept."""
    options = DecodeOptions(beam_size=beam_size, n_best=beam_size, length_penalty=0.7, max_words=4)
    stepper = RandomStepper([3], vocabulary=2500, levels=levels)
    (found,) = decode(stepper, options, SPECIAL)
    assert_same(facts(found), reference_beam(stepper, 0, options))


def test_a_beam_takes_the_words_that_are_left():
    """All but four words are forbidden, in a vocabulary of thousands."""
    stepper = RandomStepper([1], vocabulary=2500)
    left = frozenset({END, 100, 1000, 2000})
    special = SPECIAL._replace(banned=frozenset(range(2500)) - left)
    (found,) = decode(stepper, DecodeOptions(beam_size=40, n_best=40, max_words=2), special)
    assert {hypothesis.tokens[:1] for hypothesis in found} == {(), (100,), (1000,), (2000,)}
    assert len(found) == 1 + 3 + 9


def test_greedy_takes_the_most_likely_word_each_time():
    stepper = RandomStepper(list(range(30)))
    for photo, (hypothesis,) in enumerate(decode(stepper, DecodeOptions(max_words=6), SPECIAL)):
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
    for photo, hypotheses in enumerate(decode(stepper, DecodeOptions(beam_size=4, n_best=4, max_words=5), SPECIAL)):
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
    (greedy,) = decode(stepper, DecodeOptions(max_words=3), SPECIAL)
    assert greedy[0].tokens == ()
    stepper.log_probs = lambda token, state: np.where(np.arange(7) == END, -9.0, -1.0)
    (beam,) = decode(stepper, DecodeOptions(beam_size=3, n_best=3, max_words=2), SPECIAL)
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
    result = decode(stepper, DecodeOptions(max_words=10), SPECIAL)
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
    (hypotheses,) = decode(stepper, DecodeOptions(beam_size=2, max_words=50), SPECIAL)
    assert hypotheses[0].tokens == (A, A)
    assert stepper.sizes == [1, 2, 2]


def test_max_words_cuts():
    stepper = RandomStepper([0, 1])
    stepper.log_probs = lambda token, state: np.where(np.arange(7) == END, -50.0, -1.0 - np.arange(7))
    for beam_size in (1, 3):
        for hypotheses in decode(stepper, DecodeOptions(beam_size=beam_size, max_words=3), SPECIAL):
            assert hypotheses[0].tokens == (A, A, A)
            assert hypotheses[0].ended == "max_words"
            assert hypotheses[0].log_prob == pytest.approx(-15)


def test_banned_tokens_are_never_chosen_however_likely():
    stepper = RandomStepper([0])
    stepper.log_probs = lambda token, state: np.array([-0.1, -0.1, -0.1, -5, -4, -3, -6])
    for beam_size in (1, 4):
        (hypotheses,) = decode(stepper, DecodeOptions(beam_size=beam_size, max_words=2), SPECIAL)
        assert all(set(h.tokens) <= {A, B, C} for h in hypotheses)
    assert hypotheses[0].log_prob == pytest.approx(-5)


def test_no_photos_no_captions():
    assert decode(RandomStepper([]), DecodeOptions(), SPECIAL) == []


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "not a number"), (-np.inf, "the decoder allows no word")], ids=["nan", "-inf"]
)
def test_a_broken_decoder_is_an_engine_error(value, message):
    stepper = RandomStepper([0])
    stepper.log_probs = lambda token, state: np.full(7, value)
    with pytest.raises(EngineError, match=message):
        decode(stepper, DecodeOptions(beam_size=2), SPECIAL)


def plain(stepper, **limits):
    """What greedy search says of photo 0."""
    return decode(stepper, DecodeOptions(max_words=6, **limits), SPECIAL)[0][0]


def test_no_end_before_min_words():
    stepper = RandomStepper(list(range(40)))
    shortest = min(len(h.tokens) for (h,) in decode(stepper, DecodeOptions(max_words=6), SPECIAL))
    assert shortest == 0
    for beam_size in (1, 3):
        options = DecodeOptions(beam_size=beam_size, n_best=beam_size, min_words=4, max_words=6)
        for hypotheses in decode(stepper, options, SPECIAL):
            assert all(len(h.tokens) >= 4 for h in hypotheses)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("sample", [False, True])
def test_no_sequence_of_words_comes_twice(size, sample):
    stepper = RandomStepper(list(range(20)))

    def repeats(hypothesis):
        parts = [hypothesis.tokens[i : i + size] for i in range(len(hypothesis.tokens) - size + 1)]
        return len(set(parts)) < len(parts)

    free = decode(stepper, DecodeOptions(sample=sample, min_words=8, max_words=8), SPECIAL)
    assert any(repeats(hypotheses[0]) for hypotheses in free)
    options = DecodeOptions(sample=sample, min_words=8, max_words=8, no_repeat_ngram=size)
    for (hypothesis,) in decode(stepper, options, SPECIAL):
        assert not repeats(hypothesis)


@pytest.mark.parametrize("sample", [False, True])
def test_a_caption_that_the_options_leave_no_word_ends_there(sample):
    """Three words, none twice, and no end before the fifth: the caption is cut after three."""
    options = DecodeOptions(sample=sample, min_words=5, max_words=6, no_repeat_ngram=1)
    (hypotheses,) = decode(RandomStepper([3]), options, SPECIAL)
    assert sorted(hypotheses[0].tokens) == [A, B, C]
    assert hypotheses[0].ended == "no_word"


def test_n_best_are_the_best_of_the_beam():
    stepper = RandomStepper([5])
    (all_four,) = decode(stepper, DecodeOptions(beam_size=4, n_best=4, max_words=5), SPECIAL)
    (two,) = decode(stepper, DecodeOptions(beam_size=4, n_best=2, max_words=5), SPECIAL)
    assert facts(two) == facts(all_four)[:2]
    assert [h.score for h in all_four] == sorted((h.score for h in all_four), reverse=True)


def sampled(stepper, **options):
    return decode(stepper, DecodeOptions(sample=True, **options), SPECIAL)


def test_samples_follow_the_models_distribution():
    """One word and its end, 4,000 times: shares within four standard deviations of the probabilities."""
    stepper = RandomStepper([0])
    probabilities = np.array([1e-30, 1e-30, 1e-30, 0.1, 0.5, 0.3, 0.1])
    stepper.log_probs = lambda token, state: np.log(probabilities)
    counts = dict.fromkeys((END, A, B, C), 0)
    for seed in range(4000):
        ((hypothesis,),) = sampled(stepper, seed=seed, max_words=1)
        counts[hypothesis.tokens[0] if hypothesis.tokens else END] += 1
    for token, count in counts.items():
        p = probabilities[token]
        assert abs(count / 4000 - p) < 4 * np.sqrt(p * (1 - p) / 4000)


def drawn(probabilities, **options):
    """The words that 400 seeds draw."""
    stepper = RandomStepper([0])
    stepper.log_probs = lambda token, state: np.log(probabilities)
    captions = [sampled(stepper, seed=seed, max_words=1, **options)[0][0] for seed in range(400)]
    return [h.tokens[0] if h.tokens else END for h in captions]


def test_top_k_top_p_and_temperature():
    probabilities = np.array([1e-9, 1e-9, 1e-9, 0.1, 0.45, 0.3, 0.15])
    assert set(drawn(probabilities)) == {END, A, B, C}
    assert set(drawn(probabilities, top_k=1)) == {A}
    assert set(drawn(probabilities, top_k=3)) == {A, B, C}
    assert set(drawn(probabilities, top_p=0.45)) == {A}
    assert set(drawn(probabilities, top_p=0.46)) == {A, B}
    assert set(drawn(probabilities, top_p=0.75)) == {A, B}
    assert set(drawn(probabilities, top_p=0.76, top_k=2)) == {A, B}
    assert set(drawn(probabilities, temperature=0.01)) == {A}
    hot = drawn(probabilities, temperature=1000.0)
    assert min(hot.count(token) for token in (END, A, B, C)) > 70


def test_the_log_probabilities_of_a_sample_are_the_models_own():
    stepper = RandomStepper([4])
    ((hypothesis,),) = sampled(stepper, temperature=3.0, min_words=2, max_words=5, seed=9)
    whole = (*hypothesis.tokens, END) if hypothesis.ended == "end" else hypothesis.tokens
    expected = probability(stepper, 0, whole)
    assert len(hypothesis.tokens) >= 2
    assert hypothesis.log_probs == pytest.approx(expected[: len(hypothesis.tokens)])
    assert hypothesis.log_prob == pytest.approx(sum(expected))


def test_a_seed_gives_the_same_sample_whatever_is_in_the_batch():
    seeds = list(range(12))
    together = sampled(RandomStepper(seeds), max_words=6, n_best=3, seed=5)
    for photo in seeds:
        (alone,) = decode(
            RandomStepper([photo]),
            DecodeOptions(sample=True, max_words=6, n_best=3, seed=5),
            SPECIAL,
            photo_seed=lambda _, photo=photo: photo,
        )
        assert facts(alone) == facts(together[photo])
    other = sampled(RandomStepper(seeds), max_words=6, seed=6)
    assert [h[0].tokens for h in other] != [h[0].tokens for h in together]


def test_a_sample_is_the_same_on_every_machine():
    """The very words of one seed: they change only if the generator or its use does, which would break a promise."""
    stepper = RandomStepper([1, 2, 3])
    stepper.log_probs = lambda token, state: -0.25 * ((np.arange(50) * 7 + token * 3 + state) % 13)
    found = sampled(stepper, max_words=6, seed=2026)
    assert [h[0].tokens for h in found] == [(12, 33, 23, 21, 19, 39), (25, 47, 38, 36, 42, 23), ()]


def test_several_samples_are_ranked_and_each_is_given_once():
    stepper = RandomStepper([0])
    (hypotheses,) = sampled(stepper, n_best=50, max_words=2)
    assert 2 < len(hypotheses) < 50
    assert len({h.tokens for h in hypotheses}) == len(hypotheses)
    assert [h.score for h in hypotheses] == sorted((h.score for h in hypotheses), reverse=True)


@pytest.mark.parametrize("beam_size", [1, 4])
def test_what_is_settled_is_never_taken_back(beam_size):
    stepper = RandomStepper(list(range(30)))
    search = Search(stepper, DecodeOptions(beam_size=beam_size, max_words=7), SPECIAL)
    seen = [[] for _ in range(30)]
    while search.advance():
        for photo in range(30):
            seen[photo].append(search.settled(photo))
    early = 0
    for photo, (best, *_) in enumerate(search.results()):
        for live in seen[photo]:
            count = len(live.tokens)
            assert best.tokens[:count] == live.tokens
            assert best.log_probs[:count] == live.log_probs
            np.testing.assert_array_equal(best.attention[:count], np.array(live.attention).reshape(count, 2))
            early += count
    assert early > 30

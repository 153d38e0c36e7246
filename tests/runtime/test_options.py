"""DecodeOptions: what can be meant, and what cannot."""

import json

import numpy as np
import pytest

from caption_rt.errors import OptionsError
from caption_rt.options import DecodeOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam_size": 0}, "beam_size must be a whole number from 1 to 1000, not 0"),
        ({"beam_size": 1001}, "not 1001"),
        ({"beam_size": 2.0}, "not 2.0"),
        ({"beam_size": True}, "not True"),
        ({"max_words": -1}, "max_words must be a whole number from 1 to 1000, not -1"),
        ({"min_words": 1001}, "min_words must be a whole number from 0 to 1000, not 1001"),
        (
            {"min_words": 21},
            "a caption of at least 21 words cannot have at most 20: lower min_words or raise max_words",
        ),
        ({"n_best": 0, "beam_size": 3}, "n_best must be a whole number from 1 to 1000, not 0"),
        ({"n_best": 4, "beam_size": 3}, "a beam of 3 has no 4 best captions: raise beam_size"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram must be a whole number from 0 to 1000, not -1"),
        ({"length_penalty": -0.1}, "length_penalty must be a number of at least 0, not -0.1"),
        ({"length_penalty": float("nan")}, "not nan"),
        ({"length_penalty": "1"}, "not '1'"),
        ({"temperature": 0}, "temperature must be a number above 0, not 0"),
        ({"temperature": float("inf")}, "not inf"),
        ({"top_k": -1}, "top_k must be a whole number from 0 to"),
        ({"top_p": 0.0}, "top_p must be a number above 0 and at most 1, not 0.0"),
        ({"top_p": 1.1}, "not 1.1"),
        ({"seed": -1}, "seed must be a whole number from 0 to 9223372036854775807, not -1"),
        ({"sample": 1}, "sample must be True or False, not 1"),
        ({"guard": None}, "guard must be True or False, not None"),
        ({"sample": True, "beam_size": 3}, "sampling keeps no beam: beam_size must be 1, not 3"),
        ({"banned_words": "cat"}, "banned_words takes several words: give a list, not 'cat'"),
        ({"banned_words": ["a cat"]}, "banned_words takes words, and 'a cat' is not one word"),
        ({"banned_words": [""]}, "'' is not one word"),
        ({"banned_words": None}, "banned_words takes several words: give a list, not None"),
        ({"beam_size": None}, "beam_size must be a whole number from 1 to 1000, not None"),
        ({"beam_size": np.float64(3)}, "1000, not np.float64(3.0)"),
        ({"length_penalty": None}, "length_penalty must be a number of at least 0, not None"),
        ({"banned_words": [7]}, "banned_words takes words, and 7 is not one word"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    with pytest.raises(OptionsError) as caught:
        DecodeOptions(**options)
    assert message in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_the_strategy_follows_from_the_options():
    assert DecodeOptions().strategy == "greedy"
    assert DecodeOptions(beam_size=2).strategy == "beam"
    assert DecodeOptions(sample=True).strategy == "sample"


def test_numbers_of_numpy_are_pythons_own():
    given = DecodeOptions(beam_size=np.int64(3), length_penalty=np.float32(0.5), n_best=np.uint8(2), seed=np.int16(7))
    assert given == DecodeOptions(beam_size=3, length_penalty=0.5, n_best=2, seed=7)
    assert json.dumps(vars(given)) == json.dumps(vars(DecodeOptions(beam_size=3, length_penalty=0.5, n_best=2, seed=7)))
    # As a number that is written without a point: the ledger of a folder takes both for the same options.
    assert repr(DecodeOptions(length_penalty=1).length_penalty) == "1.0"


def test_equal_options_are_equal_values():
    first = DecodeOptions(banned_words=["Cat", "dog", "cat"])
    assert first == DecodeOptions(banned_words=("dog", "cat"))
    assert first.banned_words == ("cat", "dog")
    assert hash(first) == hash(DecodeOptions(banned_words=("dog", "cat")))

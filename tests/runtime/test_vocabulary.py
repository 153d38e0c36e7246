"""Words and token ids."""

import pytest

from caption_rt.errors import BundleError, OptionsError
from caption_rt.vocabulary import END, PAD, START, UNK, Vocabulary, normalize_caption

CAPTIONS = ["A dog, a cat!", "The dog runs.", "a <end> of the dog's day"]


def test_normalisation_is_the_tutorials():
    assert normalize_caption("A man's T-shirt (red/blue) -- 100%!\n") == [
        "a",
        "man's",
        "t",
        "shirt",
        "red",
        "blue",
        "100",
    ]
    assert normalize_caption("!?.") == []


def test_build_ranks_by_frequency_then_alphabet():
    vocabulary = Vocabulary.build(CAPTIONS)
    # a 3, dog 2, the 2, then once each in alphabetical order; "<end>" in a caption is no word of its own.
    assert vocabulary.words == (PAD, UNK, START, END, "a", "dog", "the", "cat", "day", "dog's", "of", "runs")
    assert vocabulary.special_ids == {"pad": 0, "unk": 1, "start": 2, "end": 3}
    assert Vocabulary.build(reversed(CAPTIONS)) == vocabulary


def test_max_words_counts_ordinary_words():
    assert Vocabulary.build(CAPTIONS, max_words=2).words == (PAD, UNK, START, END, "a", "dog")
    with pytest.raises(OptionsError, match="at least 1 word"):
        Vocabulary.build(CAPTIONS, max_words=0)


def test_encode_and_decode():
    vocabulary = Vocabulary.build(CAPTIONS)
    assert vocabulary.encode("The DOG barks <end>") == [6, 5, 1, 1]
    assert vocabulary.decode([2, 4, 5, 1, 11, 3, 0, 7]) == "a dog runs cat"


def test_special_ids_may_stand_anywhere():
    vocabulary = Vocabulary(("cat", END, PAD, "dog", START, UNK))
    assert (vocabulary.pad_id, vocabulary.unk_id, vocabulary.start_id, vocabulary.end_id) == (2, 5, 4, 1)
    assert vocabulary.unspoken_ids == {2, 5, 4}
    assert vocabulary.encode("dog bird") == [3, 5]
    assert vocabulary.decode([4, 0, 3, 1]) == "cat dog"
    data = vocabulary.to_json()
    assert data == {"words": ["cat", END, PAD, "dog", START, UNK], "pad": 2, "unk": 5, "start": 4, "end": 1}
    assert Vocabulary.from_json(data) == vocabulary


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((PAD, UNK, START), "the vocabulary has no <end>"),
        ((PAD, UNK, START, END, "cat", "cat"), "the word 'cat' twice, as 4 and 5"),
        ((PAD, UNK, START, END, ""), "word 4 ('') is not a printable word"),
        ((PAD, UNK, START, END, "two words"), "is not a printable word"),
        ((PAD, UNK, START, END, "\x1b[2J"), "word 4 ('\\x1b[2J') is not a printable word"),
    ],
)
def test_impossible_words_are_refused(words, message):
    with pytest.raises(BundleError) as caught:
        Vocabulary(words)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"end": 2}, "vocabulary.json: end is not 3"),
        ({"end": None}, "vocabulary.json: end is not a whole number"),
        ({"end": True}, "vocabulary.json: end is not a whole number"),
        ({"words": "cat"}, "vocabulary.json: words is not a list"),
        ({"words": [1]}, "vocabulary.json: words is not a list of strings"),
    ],
)
def test_wrong_json_names_the_key(change, message):
    data = Vocabulary.build(["cat"]).to_json() | change
    with pytest.raises(BundleError, match=message):
        Vocabulary.from_json(data)
    with pytest.raises(BundleError, match="not a JSON object"):
        Vocabulary.from_json([data])


@pytest.mark.parametrize("key", ["words", "pad", "unk", "start", "end"])
def test_a_missing_key_is_named(key):
    data = Vocabulary.build(["cat"]).to_json()
    del data[key]
    with pytest.raises(BundleError, match=f"the key {key} is missing"):
        Vocabulary.from_json(data)

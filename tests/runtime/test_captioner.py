"""Captioner on the tiny bundle, against the same network in NumPy."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from caption_rt import DecodeOptions
from caption_rt.image import read_photo

UNGUARDED = DecodeOptions(max_words=8, guard=False)


@pytest.mark.parametrize("max_words", [1, 3, 8, 12])
def test_greedy_captions_are_those_of_the_network_in_numpy(captioner, tiny, photos, max_words):
    network = tiny.Network()
    for path in photos:
        caption = captioner.caption(path, DecodeOptions(max_words=max_words, guard=False))
        expected = network.greedy(read_photo(path, tiny.SIZE), max_words)
        assert caption.tokens == tuple(expected["token_ids"])
        assert caption.words == tuple(tiny.WORDS[token] for token in caption.tokens)
        assert caption.text == " ".join(caption.words)
        assert caption.log_prob == pytest.approx(expected["log_prob"], abs=1e-4)
        assert caption.word_log_probs == pytest.approx(expected["word_log_probs"], abs=1e-4)
        assert caption.ended == ("end" if expected["ended"] else "max_words")
        assert caption.attention.dtype == np.float32
        np.testing.assert_allclose(
            caption.attention, expected["attention"].reshape(-1, tiny.ROWS, tiny.COLUMNS), atol=1e-5
        )
        np.testing.assert_allclose(caption.attention.sum(axis=(1, 2)), 1, atol=1e-5)
        assert caption.provider == captioner.provider == "CPUExecutionProvider"


def test_some_captions_end_and_some_are_cut(captioner, photos):
    """The test above would show little if all ended the same way."""
    assert {captioner.caption(path, UNGUARDED).ended for path in photos} == {"end", "max_words"}


def test_the_bundles_own_options_hold_unless_others_are_given(captioner, photos):
    assert captioner.default_options == DecodeOptions(beam_size=1, length_penalty=0.0, max_words=8)
    assert len(captioner.caption(photos[1], replace(captioner.default_options, guard=False)).words) == 8
    assert len(captioner.caption(photos[0], DecodeOptions(max_words=2)).words) == 2


def test_path_bytes_image_and_array_give_the_same_caption(captioner, photos, tmp_path):
    for photo in photos:
        # So small that the JPEG is decoded whole, as a PIL image or an array always is.
        path = tmp_path / photo.name
        Image.open(photo).resize((120, 90)).save(path)
        sources = [path, str(path), path.read_bytes(), Image.open(path), np.asarray(Image.open(path))]
        captions = [captioner.caption(source) for source in sources]
        assert [caption.tokens for caption in captions] == [captions[0].tokens] * 5
        assert len({caption.log_prob for caption in captions}) == 1


def test_a_beam_finds_captions_at_least_as_likely(captioner, photos):
    better = 0
    for path in photos:
        greedy = captioner.caption(path, DecodeOptions(max_words=12))
        beam = captioner.caption(path, DecodeOptions(beam_size=8, max_words=12))
        assert beam.log_prob >= greedy.log_prob
        better += beam.log_prob > greedy.log_prob + 0.1
    assert better > 0


def test_unknown_and_other_special_words_are_never_said(captioner, photos):
    for path in photos:
        words = captioner.caption(path, DecodeOptions(beam_size=5, max_words=30)).words
        assert not {"<pad>", "<unk>", "<start>", "<end>"} & set(words)


def test_a_caption_is_a_value(captioner, photos):
    first, second = captioner.caption(photos[0]), captioner.caption(photos[0])
    assert first == second
    assert len({first, second}) == 1
    with pytest.raises(ValueError, match="read-only"):
        first.attention[0, 0, 0] = 1
    assert "attention" not in repr(first)


def test_a_caption_as_json(captioner, photos):
    caption = captioner.caption(photos[2])
    values = json.loads(json.dumps(caption.to_dict()))
    assert values == {
        "caption": "in dog cat ball cat",
        "log_prob": caption.log_prob,
        "words": ["in", "dog", "cat", "ball", "cat"],
        "word_log_probs": list(caption.word_log_probs),
        "tokens": [15, 3, 2, 14, 2],
        "ended": "end",
        "strategy": "greedy",
        "retried_for": [],
        "faults": [],
        "provider": "CPUExecutionProvider",
        "precision": "fp32",
    }
    with_timing = caption.to_dict(timing=True)
    assert set(with_timing.pop("timing")) == {"read_s", "extract_s", "encode_s", "decode_s"}
    assert with_timing == values
    with_attention = json.loads(json.dumps(caption.to_dict(attention=True)))
    np.testing.assert_array_equal(np.array(with_attention.pop("attention"), np.float32), caption.attention)
    assert with_attention == values


def test_the_guard_says_that_it_decoded_again(captioner, photos):
    asked = captioner.caption(photos[0], DecodeOptions(max_words=8, guard=False))
    assert asked.text == "grass runs grass ball cat runs cat cat"
    assert (asked.strategy, asked.retried_for, asked.faults) == ("greedy", (), ("repetition",))
    better = captioner.caption(photos[0], DecodeOptions(max_words=8))
    # A beam says "cat cat" still, so the best of ten samples is taken.
    beam = captioner.caption(photos[0], DecodeOptions(max_words=8, beam_size=5, no_repeat_ngram=2, guard=False))
    assert beam.faults == ("repetition",)
    assert (better.strategy, better.retried_for, better.faults) == ("sample", ("repetition",), ())
    samples = DecodeOptions(max_words=8, sample=True, n_best=10, temperature=0.7, no_repeat_ngram=2, guard=False)
    assert better.text == captioner.caption(photos[0], samples).text
    assert better.alternatives == ()


def test_words_may_be_banned_and_unk_asked_for(captioner, photos):
    free = captioner.caption(photos[2], DecodeOptions(guard=False))
    assert "dog" in free.words
    banned = captioner.caption(photos[2], DecodeOptions(banned_words=["DOG", "whisky"], max_words=30, guard=False))
    assert "dog" not in banned.words
    said = {
        word
        for photo in photos
        for seed in range(20)
        for word in captioner.caption(
            photo, DecodeOptions(sample=True, seed=seed, allow_unk=True, temperature=3.0, guard=False)
        ).words
    }
    assert "<unk>" in said
    assert not {"<pad>", "<start>", "<end>"} & said


def test_n_best_are_alternatives(captioner, photos):
    options = DecodeOptions(beam_size=4, n_best=3, max_words=12, guard=False)
    for photo in photos:
        caption = captioner.caption(photo, options)
        found = [caption, *caption.alternatives]
        assert len(found) == 3
        assert len({c.tokens for c in found}) == 3
        assert [c.log_prob for c in found] == sorted((c.log_prob for c in found), reverse=True)
        assert all(c.alternatives == () for c in caption.alternatives)
        listed = json.loads(json.dumps(caption.to_dict()))["alternatives"]
        assert [other["caption"] for other in listed] == [c.text for c in caption.alternatives]


def test_timing_adds_up(captioner, photos):
    start = time.perf_counter()
    captions = list(captioner.caption_many(photos * 4, batch_size=4))
    seconds = time.perf_counter() - start
    for caption in captions:
        assert min(vars(caption.timing).values()) > 0
    network = sum(c.timing.extract_s + c.timing.encode_s + c.timing.decode_s for c in captions)
    assert 0 < network < seconds
    assert captioner.caption_pixels([np.zeros((32, 32, 3), np.uint8)])[0].timing.read_s == 0

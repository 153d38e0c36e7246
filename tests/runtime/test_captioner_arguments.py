"""What a captioner cannot be asked: said at once, in a sentence."""

import numpy as np
import pytest

from caption_rt import Captioner, CaptionError, DecodeOptions, EngineError, ImageError, OptionsError, PhotoLimits


def refused(message, call, *arguments, error=OptionsError, **keywords):
    """A call raises an error with this text."""
    with pytest.raises(error) as caught:
        call(*arguments, **keywords)
    assert message in str(caught.value)


def test_wrong_arguments_of_caption_many(captioner):
    refused("batch_size must be a whole number from 1 to 65536, not 0", captioner.caption_many, [], batch_size=0)
    refused("65536, not True", captioner.caption_many, [], batch_size=True)
    refused("65536, not None", captioner.caption_many, [], batch_size=None)
    refused("65536, not '4'", captioner.caption_many, [], batch_size="4")
    refused('on_error is "raise" or "return", not ', captioner.caption_many, [], on_error="ignore")
    for one in ("photo.jpg", b"data", np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8)):
        refused("give a list, or use caption for one", captioner.caption_many, one)
    refused("caption_many takes several photos, not the NoneType None", captioner.caption_many, None)
    assert list(captioner.caption_many([])) == []


def test_several_photos_may_be_one_array(captioner, photos):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), np.uint8)
    texts = [caption.text for caption in captioner.caption_many(pixels, batch_size=np.int64(2))]
    assert texts == [captioner.caption(photo).text for photo in pixels]


@pytest.mark.parametrize("options", [{"beam_size": 3}, "greedy", 3, False, DecodeOptions])
def test_options_are_decode_options(captioner, photos, options):
    message = "options are a DecodeOptions, as in DecodeOptions(beam_size=3), not the "
    for call in (captioner.caption, captioner.stream):
        refused(message, call, photos[0], options)
    refused(message, captioner.caption_many, photos, options)
    refused(message, captioner.caption_pixels, [], options)


def test_a_stream_reads_its_photo_when_the_first_word_is_asked_for(captioner):
    words = captioner.stream("missing.jpg")
    refused("missing.jpg does not exist", next, words, error=ImageError)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"intra_op_threads": "2"}, "intra_op_threads must be a whole number from 1 to 1024, not '2'"),
        ({"intra_op_threads": 2.0}, "1024, not 2.0"),
        ({"intra_op_threads": True}, "1024, not True"),
        ({"limits": 5}, "limits are a PhotoLimits, as in PhotoLimits(max_bytes=20_000_000), not the int 5"),
        ({"limits": {"max_bytes": 5}}, "not the dict {'max_bytes': 5}"),
        ({"device": None}, "the device is one of auto, cpu, cuda, cuda:N, not None"),
        ({"device": 0}, "cuda:N, not 0"),
    ],
)
def test_what_cannot_be_loaded(tiny_bundle, keywords, message):
    refused(message, Captioner.load, tiny_bundle, **keywords)


def test_a_bundle_is_a_path_or_open(tiny_bundle):
    refused("for Captioner.load, a path, not the int 5", Captioner.load, 5)
    refused("for Captioner.load, a path, not the ", Captioner, tiny_bundle)


def test_numbers_of_numpy_are_numbers(tiny_bundle, photos):
    limits = PhotoLimits(max_pixels=np.int64(10**6), max_bytes=np.uint32(10**6))
    assert (limits, type(limits.max_pixels)) == (PhotoLimits(max_pixels=10**6, max_bytes=10**6), int)
    loaded = Captioner.load(tiny_bundle, "cpu", intra_op_threads=np.int32(2), limits=limits)
    assert (loaded.intra_op_threads, type(loaded.intra_op_threads)) == (2, int)
    # The same sessions as those of a captioner that was asked for with Python's own number.
    assert loaded._use_engine() is Captioner.load(tiny_bundle, "cpu", intra_op_threads=2)._use_engine()


def test_all_of_these_are_errors_of_ours(captioner):
    for call in (lambda: captioner.caption(None), lambda: captioner.caption(5)):
        refused("a photo is a path, bytes, a PIL image or a uint8 array", call, error=CaptionError)


def test_a_captioner_says_what_it_is(tiny_bundle):
    captioner = Captioner.load(tiny_bundle, "cpu")
    assert repr(captioner) == f"<Captioner 'tiny' from {tiny_bundle} on cpu>"
    captioner.close()
    assert repr(captioner) == f"<Captioner 'tiny' from {tiny_bundle} on cpu, closed>"


def test_a_closed_captioner_is_not_entered(tiny_bundle):
    captioner = Captioner.load(tiny_bundle, "cpu")
    with captioner:
        assert captioner.device == "cpu"
    refused("the captioner is closed: load another one", captioner.__enter__, error=EngineError)

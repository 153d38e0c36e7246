"""Many photos: read as they are needed, a bad one costs its own place."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from caption_rt import Caption, Captioner, DecodeOptions, ImageError
from caption_rt.threads import usable_cpus

UNGUARDED = DecodeOptions(max_words=8, guard=False)


@pytest.mark.parametrize("beam_size", [1, 4])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_a_caption_does_not_depend_on_its_batch(captioner, photos, batch_size, beam_size):
    options = DecodeOptions(beam_size=beam_size, max_words=10)
    many = list(captioner.caption_many(photos * 3, options, batch_size))
    assert len(many) == 9
    for path, caption in zip(photos * 3, many, strict=True):
        alone = captioner.caption(path, options)
        assert caption.tokens == alone.tokens
        assert caption.log_prob == pytest.approx(alone.log_prob, abs=1e-5)
        np.testing.assert_allclose(caption.attention, alone.attention, atol=1e-6)


def test_photos_are_read_as_they_are_needed(captioner, photos):
    taken = []

    def endless():
        while True:
            taken.append(photos[1])
            yield photos[1]

    captions = captioner.caption_many(endless(), UNGUARDED, batch_size=3)
    assert taken == []
    for count in range(1, 10):
        assert next(captions).words[0] == "dog"
        # The batch that is being given, and at most one more ahead with a photo a reader.
        assert len(taken) <= 3 * ((count + 2) // 3) + 3 + usable_cpus()
    captions.close()


def test_a_bad_photo_raises_after_the_captions_before_it(captioner, photos, tmp_path):
    missing = tmp_path / "missing.jpg"
    results = captioner.caption_many([photos[0], photos[1], missing, photos[2]], UNGUARDED, batch_size=2)
    assert [next(results).words[0], next(results).words[0]] == ["grass", "dog"]
    with pytest.raises(ImageError, match="does not exist"):
        next(results)
    alone = captioner.caption_many([photos[0], missing], UNGUARDED, batch_size=16)
    assert next(alone).words[0] == "grass"
    with pytest.raises(ImageError, match="does not exist"):
        next(alone)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_a_bad_photo_may_cost_its_own_place_alone(captioner, photos, tmp_path, batch_size):
    (tmp_path / "text.jpg").write_text("not a photo")
    images = [tmp_path / "missing", photos[0], tmp_path / "text.jpg", tmp_path, photos[1]]
    results = list(captioner.caption_many(images, UNGUARDED, batch_size, on_error="return"))
    assert [type(result) for result in results] == [ImageError, Caption, ImageError, ImageError, Caption]
    assert [str(results[i]).split(": ")[-1].split(" ")[0] for i in (0, 3)] == ["check", "name"]
    assert (results[1].words[0], results[4].words[0]) == ("grass", "dog")


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_same_seed_gives_the_same_samples_at_every_batch_size(captioner, photos, batch_size):
    options = DecodeOptions(sample=True, seed=11, max_words=12)
    alone = {photo: captioner.caption(photo, options).tokens for photo in photos}
    shuffled = [photos[2], photos[0], photos[1], photos[0], photos[2]]
    for photo, caption in zip(shuffled, captioner.caption_many(shuffled, options, batch_size), strict=True):
        assert caption.tokens == alone[photo]
    assert len(set(alone.values())) == 3
    others = [captioner.caption(photo, replace(options, seed=12)).tokens for photo in photos]
    assert others != list(alone.values())


def test_open_images_may_be_closed_by_their_generator(captioner, photos):
    """Photos are read ahead by threads, but an open image only as long as it is surely open."""

    def opened():
        for photo in photos * 3:
            with Image.open(photo) as image:
                yield image

    texts = [caption.text for caption in captioner.caption_many(opened(), batch_size=4)]
    assert texts == [captioner.caption(Image.open(photo)).text for photo in photos] * 3


@pytest.mark.data
@pytest.mark.parametrize(
    "options",
    [
        DecodeOptions(max_words=30),
        DecodeOptions(max_words=30, beam_size=3),
        DecodeOptions(max_words=30, sample=True, seed=1),
    ],
    ids=lambda options: options.strategy,
)
def test_real_photos_get_the_same_captions_in_any_batch(shared, options):
    """What docs/embedding.md guarantees: the same tokens, and log-probabilities within 1e-4."""
    photos = sorted((shared / "photos" / "images").iterdir()) + sorted((shared / "flickr8k" / "images").iterdir())[:70]
    with Captioner.load(device="cpu") as captioner:
        alone = list(captioner.caption_many(photos, options, 1))
        for batch_size, order in ((16, 1), (7, -1), (100, 1)):
            together = list(captioner.caption_many(photos[::order], options, batch_size))[::order]
            for one, other in zip(alone, together, strict=True):
                assert one.tokens == other.tokens
                assert one.log_prob == pytest.approx(other.log_prob, abs=1e-4)
                assert one.word_log_probs == pytest.approx(other.word_log_probs, abs=1e-4)
                np.testing.assert_allclose(one.attention, other.attention, atol=1e-4)
    assert len({caption.text for caption in alone}) > 50

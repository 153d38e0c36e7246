"""Words as they come."""

from dataclasses import replace

import numpy as np
import pytest

from caption_rt import DecodeOptions, ImageError, sessions


def run_out(words):
    """The words of a generator, and the value that it returns."""
    given = []
    while True:
        try:
            given.append(next(words))
        except StopIteration as stop:
            return given, stop.value


@pytest.mark.parametrize(
    "options",
    [
        DecodeOptions(max_words=12),
        DecodeOptions(max_words=12, beam_size=4, n_best=2),
        DecodeOptions(max_words=12, sample=True, seed=3),
    ],
    ids=lambda options: options.strategy,
)
def test_streamed_words_are_those_of_the_caption(captioner, photos, options):
    for photo in photos:
        words, caption = run_out(captioner.stream(photo, options))
        unguarded = replace(options, guard=False)
        assert caption == captioner.caption(photo, unguarded)
        assert caption.alternatives == captioner.caption(photo, unguarded).alternatives
        assert tuple(word.text for word in words) == caption.words
        assert tuple(word.token for word in words) == caption.tokens
        assert tuple(word.log_prob for word in words) == caption.word_log_probs
        for word, attention in zip(words, caption.attention, strict=True):
            np.testing.assert_array_equal(word.attention, attention)
            assert not word.attention.flags.writeable


def test_words_come_before_the_caption_is_finished(captioner, photos, monkeypatch):
    steps = []
    step = sessions.EngineStepper.step
    monkeypatch.setattr(sessions.EngineStepper, "step", lambda self, *a: steps.append(1) or step(self, *a))
    for count, word in enumerate(captioner.stream(photos[0], DecodeOptions(max_words=8)), start=1):
        assert len(steps) == count
        assert word.text
    with pytest.raises(ImageError, match="does not exist"):
        next(captioner.stream("missing.jpg"))

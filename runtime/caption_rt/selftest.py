"""The self-test of a bundle: does this machine give what the model's makers got in training?"""

import base64
import binascii
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from caption_rt._fields import Fields
from caption_rt.bundle import SELFTEST_FILE, Bundle
from caption_rt.caption import Caption
from caption_rt.errors import BundleError, EngineError, ImageError, OptionsError
from caption_rt.image import read_photo
from caption_rt.options import DecodeOptions

__all__ = ["CaptionPixels", "SelfTest", "run_self_test"]

CaptionPixels = Callable[[Sequence[NDArray[np.uint8]], DecodeOptions], list[Caption]]
"""Captions photos, uint8 [S, S, 3] each."""


@dataclass(frozen=True)
class SelfTest:
    """The result of a self-test that was passed."""

    photos: int
    """How many photos were captioned."""
    provider: str
    """The execution provider that was used."""
    max_difference: float
    """The largest difference of a log-probability from the one that the bundle states."""
    tolerance: float
    """The largest difference that passes."""

    def to_dict(self) -> dict[str, Any]:
        """The result as values that `json.dumps` takes."""
        return vars(self).copy()


def run_self_test(bundle: Bundle, caption: CaptionPixels) -> SelfTest:
    """Caption the bundle's own test photos and compare with what the training side got.

    Args:
        bundle: the bundle.
        caption: captions photos with the model of the bundle.

    Raises:
        BundleError: the bundle's self-test cannot be read.
        EngineError: other words came, or log-probabilities further off than the bundle allows.
    """
    fields = Fields(bundle.selftest(), SELFTEST_FILE)
    options, tolerance = _options(fields.inner("options")), fields.inner("tolerance").number("log_prob")
    inputs, expected = fields.inners("inputs"), fields.inners("expected")
    if not inputs or len(inputs) != len(expected):
        raise BundleError(f"{SELFTEST_FILE}: {len(inputs)} inputs and {len(expected)} expected results")
    largest, provider = 0.0, ""
    for photo, wanted in zip(inputs, expected, strict=True):
        found = caption([_pixels(photo, bundle.manifest.image.size)], options)[0]
        provider = found.provider
        difference = _difference(found, photo.text("name"), wanted)
        # Written so that a difference that is not a number fails as well.
        if not difference <= tolerance:
            raise EngineError(
                f"the self-test failed: a log-probability of {photo.text('name')} is {difference:.2g} off, and "
                f"{tolerance:.2g} is allowed ({provider})"
            )
        largest = max(largest, difference)
    return SelfTest(len(inputs), provider, largest, tolerance)


def _options(settings: Fields) -> DecodeOptions:
    try:
        return DecodeOptions(
            beam_size=settings.integer("beam_size", 1),
            length_penalty=settings.number("length_penalty"),
            max_words=settings.integer("max_words", 1),
            guard=False,
        )
    except OptionsError as exc:
        raise BundleError(f"{SELFTEST_FILE}: options: {exc}") from exc


def _pixels(photo: Fields, size: int) -> NDArray[np.uint8]:
    try:
        return read_photo(base64.b64decode(photo.text("png_base64"), validate=True), size)
    except binascii.Error as exc:
        raise photo.error("png_base64", f"is not base64: {exc}") from exc
    except ImageError as exc:
        raise photo.error("png_base64", f"is not a photo: {exc}") from exc


def _difference(caption: Caption, name: str, wanted: Fields) -> float:
    """The largest difference of a log-probability.

    Raises:
        EngineError: the words differ.
    """
    tokens, words = wanted.integers("token_ids"), wanted.numbers("word_log_probs")
    if list(caption.tokens) != tokens:
        raise EngineError(
            f"the self-test failed: for {name} the token ids {list(caption.tokens)} came instead of {tokens} "
            f"({caption.provider})"
        )
    if len(words) != len(tokens):
        raise wanted.error("word_log_probs", f"has {len(words)} numbers for {len(tokens)} token ids")
    return max(
        abs(actual - number)
        for actual, number in zip(
            (caption.log_prob, *caption.word_log_probs), (wanted.number("log_prob"), *words), strict=True
        )
    )

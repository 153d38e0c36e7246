"""The self-test of a bundle: does this machine give what the model's makers got in training?"""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from caption_rt import engine
from caption_rt._fields import Fields
from caption_rt.bundle import PRECISIONS, SELFTEST_FILE, Bundle
from caption_rt.caption import Caption
from caption_rt.errors import BundleError, EngineError, ImageError, OptionsError, Parameter
from caption_rt.image import read_photo
from caption_rt.options import DecodeOptions
from caption_rt.search import Stepper
from caption_rt.vocabulary import Vocabulary

__all__ = ["CaptionPixels", "SelfTest", "forced_log_probs", "run_self_test"]

CaptionPixels = Callable[[Sequence[NDArray[np.uint8]], DecodeOptions], list[Caption]]
"""Captions photos, uint8 [S, S, 3] each."""


@dataclass(frozen=True)
class SelfTest:
    """The result of a self-test that was passed."""

    photos: int
    """How many photos were captioned."""
    provider: str
    """The execution provider that was used."""
    precision: str
    """What the networks were computed in."""
    max_difference: float
    """The largest difference of a log-probability from the one that the bundle states."""
    tolerance: float
    """The largest difference that passes."""

    def to_dict(self) -> dict[str, Any]:
        """The result as values that `json.dumps` takes."""
        return vars(self).copy()


def run_self_test(
    bundle: Bundle, precision: str, caption: CaptionPixels, on: Callable[[NDArray[np.uint8]], Stepper]
) -> SelfTest:
    """Caption the bundle's own test photos and compare with what the training side got.

    In fp32 the words are searched and must be the same. In fewer bits another word may be as likely, and on another
    processor another one still: there the words of the training side are put to the model one by one, and their
    log-probabilities compared.

    Args:
        bundle: the bundle.
        precision: what the networks are computed in.
        caption: captions photos with the model of the bundle.
        on: the model bound to one photo, uint8 [S, S, 3].

    Raises:
        BundleError: the bundle's self-test cannot be read.
        EngineError: other words came, or log-probabilities further off than the bundle allows.
    """
    data = bundle.selftest()
    try:
        return _run(Fields(data, SELFTEST_FILE), bundle, precision, caption, on)
    except BundleError as exc:
        raise bundle.spoilt(exc) from exc


def _run(
    fields: Fields, bundle: Bundle, precision: str, caption: CaptionPixels, on: Callable[[NDArray[np.uint8]], Stepper]
) -> SelfTest:
    searched = precision == "fp32"
    options, tolerances = _options(fields.inner("options")), fields.inner("tolerance")
    tolerance = tolerances.number("log_prob" if searched else f"{precision}_word_log_prob")
    inputs, expected = fields.inners("inputs"), fields.inners("expected")
    if not inputs or len(inputs) != len(expected):
        raise BundleError(f"{SELFTEST_FILE}: {len(inputs)} inputs and {len(expected)} expected results")
    largest, provider = 0.0, ""
    for photo, wanted in zip(inputs, expected, strict=True):
        name, pixels = photo.text("name"), _pixels(photo, bundle.manifest.image.size)
        found = caption([pixels], options)[0]
        provider = found.provider
        difference = (
            _difference(bundle, found, name, wanted)
            if searched
            else _forced_difference(on(pixels), bundle.vocabulary, wanted)
        )
        # Written so that a difference that is not a number fails as well.
        if not difference <= tolerance:
            off = f"a log-probability of {name} is {difference:.2g} off, and {tolerance:.2g} is allowed"
            raise _failed(bundle, found, off)
        largest = max(largest, difference)
    return SelfTest(len(inputs), provider, precision, largest, tolerance)


def forced_log_probs(stepper: Stepper, tokens: Sequence[int], start_id: int) -> list[float]:
    """The log-probability of each word of a caption, which is put to the model word by word.

    Args:
        stepper: the model, bound to one photo.
        tokens: the caption's token ids.
        start_id: that of the word before the first.

    Returns:
        Natural logarithms, one a word.

    Raises:
        EngineError: ONNX Runtime fails.
    """
    photo, state, log_probs = np.zeros(1, np.int64), stepper.initial_state(), []
    for before, token in zip((start_id, *tokens), tokens, strict=False):
        step = stepper.step(np.array([before], np.int64), state, photo)
        state = step.state
        log_probs.append(float(step.log_probs[0, token]))
    return log_probs


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
        data = base64.b64decode(photo.text("png_base64"), validate=True)
    except ValueError as exc:
        raise photo.error("png_base64", f"is not base64: {exc}") from exc
    try:
        return read_photo(data, size)
    except ImageError as exc:
        raise photo.error("png_base64", f"is not a photo: {exc}") from exc


def _failed(bundle: Bundle, caption: Caption, what: str) -> EngineError:
    """The error of a test that failed, with what to do about it on such a device and in such a precision."""
    others = [name for name in PRECISIONS if name in bundle.manifest.precisions and name != caption.precision]
    another = f"install another version of ONNX Runtime (here is {engine.version()})"
    remedy: tuple[str, ...] = (f"{another}, or export the model again",)
    if caption.provider == "CUDAExecutionProvider":
        remedy = "try ", Parameter("device"), " cpu; if that passes, update NVIDIA's driver and onnxruntime-gpu"
    elif caption.precision == "int8" and not engine.multiplies_exactly():
        remedy = (
            "this processor does not sum products of 8 bits exactly, so choose another ",
            *(Parameter("precision"), ", or a bundle exported with --reduce-range"),
        )
    elif others:
        remedy = (
            "try ",
            *(Parameter("precision"), f" {others[0]}; if that fails too, {another} or export the model again"),
        )
    return EngineError(f"the self-test failed: {what} ({caption.provider}, {caption.precision}): ", *remedy)


def _difference(bundle: Bundle, caption: Caption, name: str, wanted: Fields) -> float:
    """The largest difference of a log-probability.

    Raises:
        EngineError: the words differ.
    """
    tokens, words = _expected(wanted, bundle.vocabulary)
    if list(caption.tokens) != tokens:
        raise _failed(bundle, caption, f"for {name} the token ids {list(caption.tokens)} came instead of {tokens}")
    return _largest((caption.log_prob, *caption.word_log_probs), (wanted.number("log_prob"), *words))


def _forced_difference(stepper: Stepper, vocabulary: Vocabulary, wanted: Fields) -> float:
    """The largest difference of a word's log-probability, the words given."""
    tokens, words = _expected(wanted, vocabulary)
    return _largest(forced_log_probs(stepper, tokens, vocabulary.start_id), words)


def _largest(found: Sequence[float], wanted: Sequence[float]) -> float:
    """The largest difference; one that is not a number is the largest, which Python's own maximum would pass over."""
    return float(np.max(np.abs(np.subtract(found, wanted)), initial=0))


def _expected(wanted: Fields, vocabulary: Vocabulary) -> tuple[list[int], list[float]]:
    """A caption's token ids and their log-probabilities."""
    tokens, words = wanted.integers("token_ids"), wanted.numbers("word_log_probs")
    if not all(0 <= token < len(vocabulary) for token in tokens):
        raise wanted.error("token_ids", f"has others than those of the vocabulary, 0 to {len(vocabulary) - 1}")
    if len(words) != len(tokens):
        raise wanted.error("word_log_probs", f"has {len(words)} numbers for {len(tokens)} token ids")
    return tokens, words

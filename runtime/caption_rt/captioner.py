"""Captioner: the class that other programs embed."""

import base64
import binascii
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from caption_rt._fields import Fields
from caption_rt.bundle import SELFTEST_FILE, Bundle, default_bundle_path
from caption_rt.engine import Encoded, Engine
from caption_rt.errors import BundleError, EngineError, ImageError, OptionsError
from caption_rt.image import ImageSource, read_photo
from caption_rt.search import DecodeOptions, Ended, Hypothesis, Step, decode

__all__ = ["Caption", "Captioner", "SelfTest"]


@dataclass(frozen=True)
class Caption:
    """A caption, and how sure the model was of it."""

    text: str
    """The words, joined by spaces, as the model says them: lower case, no punctuation."""
    tokens: tuple[int, ...]
    """The token id of each word."""
    words: tuple[str, ...]
    """The words."""
    log_prob: float
    """Natural logarithm of the sentence's probability, its end included where the model ended it."""
    word_log_probs: tuple[float, ...]
    """Natural logarithm of each word's probability, given the photo and the words before it."""
    attention: NDArray[np.float32] = field(repr=False, compare=False)
    """float32 [words, grid rows, grid columns], read-only: where in the photo the model looked for each word. The grid
    lies over the whole photo, upright and stretched to it; each word's numbers sum to 1."""
    ended: Ended
    """"end": the model ended it; "max_words": it was cut."""
    provider: str
    """The execution provider of ONNX Runtime that was used, such as "CPUExecutionProvider"."""

    def to_dict(self, *, attention: bool = False) -> dict[str, Any]:
        """The caption as values that `json.dumps` takes.

        Args:
            attention: put the attention in as nested lists.
        """
        values: dict[str, Any] = {
            "caption": self.text,
            "log_prob": self.log_prob,
            "words": list(self.words),
            "word_log_probs": list(self.word_log_probs),
            "tokens": list(self.tokens),
            "ended": self.ended,
            "provider": self.provider,
        }
        if attention:
            values["attention"] = self.attention.tolist()
        return values

    def plot(self, image: ImageSource, path: str | os.PathLike[str]) -> None:
        """Write a picture of the photo, once a word, with that word's attention over it.

        Args:
            image: the photo that was captioned.
            path: where to write; PNG, SVG or PDF by its ending. A file that is there is replaced.

        Raises:
            OptionsError: another ending, or matplotlib (the extra `plot`) is not installed.
            ImageError: the photo cannot be read.
            CaptionError: the file cannot be written.
        """
        from caption_rt.attention import save_plot  # matplotlib is an extra

        save_plot(image, self, path)


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


class Captioner:
    """Captions photos with the model of a bundle. Safe to use from several threads.

    Made by `Captioner.load`.
    """

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        """Put a bundle and an engine of it together; `Captioner.load` does so from a path."""
        self._bundle = bundle
        self._engine = engine
        defaults = bundle.manifest.decoding
        try:
            self._options = DecodeOptions(defaults.beam_size, defaults.length_penalty, defaults.max_words)
        except OptionsError as exc:
            raise BundleError(f"the bundle {bundle.path}: manifest.json: decoding: {exc}") from exc

    @classmethod
    def load(
        cls,
        bundle: str | os.PathLike[str] | Bundle | None = None,
        device: str = "auto",
        *,
        intra_op_threads: int | None = None,
    ) -> "Captioner":
        """Load a model.

        Args:
            bundle: a folder or zip file, or an open bundle; None for the one that travels with the package.
            device: "cpu"; "cuda", which is CUDA or an error; "auto", which is CUDA where it works and else the CPU.
            intra_op_threads: threads that share the work of one operator; None leaves it to ONNX Runtime.

        Raises:
            OptionsError: an unknown device, or fewer than 1 thread.
            BundleError: the bundle is not there, damaged, or of another format.
            EngineError: ONNX Runtime cannot load it, or the device cannot be used.
        """
        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(default_bundle_path() if bundle is None else bundle)
        return cls(bundle, Engine(bundle, device, intra_op_threads))

    @property
    def bundle(self) -> Bundle:
        """The bundle."""
        return self._bundle

    @property
    def provider(self) -> str:
        """The execution provider that ONNX Runtime really uses."""
        return self._engine.provider

    @property
    def default_options(self) -> DecodeOptions:
        """How this model decodes when nothing else is asked for: the bundle's own choice."""
        return self._options

    def caption(self, image: ImageSource, options: DecodeOptions | None = None) -> Caption:
        """Caption a photo.

        Args:
            image: a path, the bytes of an image file, a PIL image, or a uint8 array [height, width, 3].
            options: how to decode; None for `default_options`.

        Raises:
            ImageError: the photo cannot be read.
            EngineError: ONNX Runtime fails.
        """
        return self._caption_batch([read_photo(image, self._bundle.manifest.image.size)], options or self._options)[0]

    @overload
    def caption_many(
        self,
        images: Iterable[ImageSource],
        options: DecodeOptions | None = None,
        batch_size: int = 16,
        *,
        on_error: Literal["raise"] = "raise",
    ) -> Iterator[Caption]: ...

    @overload
    def caption_many(
        self,
        images: Iterable[ImageSource],
        options: DecodeOptions | None = None,
        batch_size: int = 16,
        *,
        on_error: Literal["return"],
    ) -> Iterator[Caption | ImageError]: ...

    def caption_many(
        self,
        images: Iterable[ImageSource],
        options: DecodeOptions | None = None,
        batch_size: int = 16,
        *,
        on_error: Literal["raise", "return"] = "raise",
    ) -> Iterator[Caption | ImageError]:
        """Caption photos, in order, a batch at a time.

        A photo's words do not depend on the photos that share its batch, but for rounding: log-probabilities may differ
        in the last digits, and words only where two are as likely to that precision.

        Args:
            images: the photos; read as they are needed, so that there may be any number of them.
            options: how to decode; None for `default_options`.
            batch_size: photos that go through the network together, at least 1.
            on_error: at a photo that cannot be read, "raise" its `ImageError`, after the captions of the photos before
                it; or "return" the error in the caption's place and go on.

        Raises:
            OptionsError: an impossible `batch_size` or `on_error`, or one path or file in place of several.
            ImageError: a photo cannot be read, with `on_error="raise"`.
            EngineError: ONNX Runtime fails.
        """
        if batch_size < 1:
            raise OptionsError(f"batch_size must be at least 1, not {batch_size}")
        if on_error not in ("raise", "return"):
            raise OptionsError(f'on_error is "raise" or "return", not {on_error!r}')
        if isinstance(images, str | bytes):  # whose characters would be taken as photos
            raise OptionsError("caption_many takes several photos: give a list, or use caption for one")
        # Apart, because a generator would report a wrong argument only when its first caption is asked for.
        return self._caption_many(images, options or self._options, batch_size, on_error == "raise")

    def self_test(self) -> SelfTest:
        """Caption the bundle's own test photos and compare with the results that its makers got in training.

        Raises:
            BundleError: the bundle's self-test cannot be read.
            EngineError: this machine gives other words, or log-probabilities further off than the bundle allows.
        """
        fields = Fields(self._bundle.selftest(), SELFTEST_FILE)
        options, tolerance = _options(fields.inner("options")), fields.inner("tolerance").number("log_prob")
        inputs, expected = fields.inners("inputs"), fields.inners("expected")
        if not inputs or len(inputs) != len(expected):
            raise BundleError(f"{SELFTEST_FILE}: {len(inputs)} inputs and {len(expected)} expected results")
        largest = 0.0
        for photo, wanted in zip(inputs, expected, strict=True):
            caption = self._caption_batch([_pixels(photo, self._bundle.manifest.image.size)], options)[0]
            difference = _difference(caption, photo.text("name"), wanted)
            # Written so that a difference that is not a number fails as well.
            if not difference <= tolerance:
                raise EngineError(
                    f"the self-test failed: a log-probability of {photo.text('name')} is {difference:.2g} off, and "
                    f"{tolerance:.2g} is allowed ({self.provider})"
                )
            largest = max(largest, difference)
        return SelfTest(len(inputs), self.provider, largest, tolerance)

    def _caption_many(
        self, images: Iterable[ImageSource], options: DecodeOptions, batch_size: int, raising: bool
    ) -> Iterator[Caption | ImageError]:
        size = self._bundle.manifest.image.size
        batch: list[NDArray[np.uint8] | ImageError] = []
        for image in images:
            try:
                batch.append(read_photo(image, size))
            except ImageError as exc:
                batch.append(exc)
            if len(batch) == batch_size or (raising and isinstance(batch[-1], ImageError)):
                yield from self._results(batch, options, raising)
                batch = []
        yield from self._results(batch, options, raising)

    def _results(
        self, batch: Sequence[NDArray[np.uint8] | ImageError], options: DecodeOptions, raising: bool
    ) -> Iterator[Caption | ImageError]:
        photos = [photo for photo in batch if not isinstance(photo, ImageError)]
        captions = iter(self._caption_batch(photos, options))
        for photo in batch:
            if not isinstance(photo, ImageError):
                yield next(captions)
            elif raising:
                raise photo
            else:
                yield photo

    def _caption_batch(self, photos: Sequence[NDArray[np.uint8]], options: DecodeOptions) -> list[Caption]:
        if not photos:
            return []
        encoded = self._engine.encode(self._engine.extract(np.stack(photos)))
        vocabulary = self._bundle.vocabulary
        found = decode(
            _EngineStepper(self._engine, encoded),
            options,
            start_id=vocabulary.start_id,
            end_id=vocabulary.end_id,
            banned=vocabulary.unspoken_ids,
        )
        return [self._to_caption(hypotheses[0]) for hypotheses in found]

    def _to_caption(self, best: Hypothesis) -> Caption:
        grid = self._bundle.manifest.grid
        words = tuple(self._bundle.vocabulary.words[token] for token in best.tokens)
        attention = best.attention.reshape(len(words), grid.rows, grid.columns)
        attention.setflags(write=False)
        return Caption(
            text=" ".join(words),
            tokens=best.tokens,
            words=words,
            log_prob=best.log_prob,
            word_log_probs=best.log_probs,
            attention=attention,
            ended=best.ended,
            provider=self.provider,
        )


class _EngineStepper:
    """The decoder graph as a `caption_rt.search.Stepper`."""

    def __init__(self, engine: Engine, encoded: Encoded) -> None:
        self._engine = engine
        self._encoded = encoded
        self._images = np.arange(len(encoded.features))
        self._rows = encoded.features, encoded.keys

    @property
    def batch_size(self) -> int:
        return len(self._encoded.features)

    def initial_state(self) -> NDArray[np.float32]:
        return self._encoded.initial_state

    def step(self, tokens: NDArray[np.int64], state: NDArray[np.float32], images: NDArray[np.int64]) -> Step:
        # Megabytes a batch: copied when a photo leaves or a beam widens, not at every word.
        if not np.array_equal(images, self._images):
            self._images = images
            self._rows = self._encoded.features[images], self._encoded.keys[images]
        return Step(*self._engine.decode(tokens, state, *self._rows))


def _options(settings: Fields) -> DecodeOptions:
    try:
        return DecodeOptions(
            settings.integer("beam_size", 1), settings.number("length_penalty"), settings.integer("max_words", 1)
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

"""Captioner: the class that other programs embed."""

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Literal, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from caption_rt._arguments import described, whole_number
from caption_rt.bundle import Bundle, default_bundle_path
from caption_rt.caption import Caption, Timing, Word
from caption_rt.captioning import caption_of, frozen, photo_seeds, special_tokens
from caption_rt.devices import parse_device
from caption_rt.engine import Engine, check_precision
from caption_rt.errors import BundleError, EngineError, ImageError, OptionsError, printable
from caption_rt.guard import Guarded, decode_guarded, faults_of
from caption_rt.image import ImageSource, PhotoLimits, read_photo
from caption_rt.options import DecodeOptions
from caption_rt.pipeline import ahead
from caption_rt.search import Search
from caption_rt.sessions import EngineStepper, shared_engine
from caption_rt.threads import thread_count, usable_cpus

if TYPE_CHECKING:
    from caption_rt.selftest import SelfTest

__all__ = ["Captioner"]

_LARGEST_BATCH = 65536

_Read: TypeAlias = tuple[NDArray[np.uint8], float] | ImageError
"""A photo as the extractor takes it, and the seconds that this took; or why it cannot be read."""


class Captioner:
    """Captions photos with the model of a bundle. Safe to use from several threads.

    Made by `Captioner.load`. Captioners of the same bundle, device, threads and precision in one process share their
    sessions, so a second one costs neither memory nor the time to build them. A captioner that is pickled (for a
    process pool, say) takes its configuration along and builds its sessions where it is used, when it is first used; so
    does one that is used after a fork. It is a context manager that closes itself.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: str = "auto",
        *,
        intra_op_threads: int | None = None,
        limits: PhotoLimits | None = None,
        precision: str | None = None,
    ) -> None:
        """Take an open bundle; the sessions are built when they are first needed. See `Captioner.load`."""
        parse_device(device)
        if not isinstance(bundle, Bundle):
            raise OptionsError(f"a bundle is an open Bundle or, for Captioner.load, a path, not {described(bundle)}")
        if limits is not None and not isinstance(limits, PhotoLimits):
            raise OptionsError(
                f"limits are a PhotoLimits, as in PhotoLimits(max_bytes=20_000_000), not {described(limits)}"
            )
        check_precision(bundle, precision)
        self._bundle = bundle
        self._device = device
        self._intra_op_threads = None if intra_op_threads is None else thread_count(intra_op_threads)
        self._limits = limits or PhotoLimits()
        self._precision = precision
        self._engine: tuple[int, Engine] | None = None
        self._closed = False
        defaults = bundle.manifest.decoding
        try:
            self._options = DecodeOptions(
                beam_size=defaults.beam_size, length_penalty=defaults.length_penalty, max_words=defaults.max_words
            )
        except OptionsError as exc:
            raise bundle.spoilt(BundleError(f"manifest.json: decoding: {exc}")) from exc

    @classmethod
    def load(
        cls,
        bundle: str | os.PathLike[str] | Bundle | None = None,
        device: str = "auto",
        *,
        intra_op_threads: int | None = None,
        limits: PhotoLimits | None = None,
        precision: str | None = None,
    ) -> "Captioner":
        """Load a model.

        Args:
            bundle: a folder or zip file, or an open bundle; None for the one that travels with the package.
            device: "cpu"; "cuda" or "cuda:1", which is CUDA on the first or another GPU, or an error; "auto", which is
                CUDA where it works and else the CPU.
            intra_op_threads: threads that share the work of one operator; None for as many as there are physical cores
                that the process may use.
            limits: the largest photos that are read; None for the defaults of `PhotoLimits`.
            precision: "fp32", "fp16" or "int8", where the bundle has it; None for the best that it has for the device:
                on CUDA the first of fp16, fp32 and int8, on a CPU the first of int8, fp32 and fp16.

        Raises:
            OptionsError: an unknown device, fewer than 1 thread, a precision that the bundle does not have, or a value
                of another type.
            BundleError: the bundle is not there, damaged, or of another format.
            EngineError: ONNX Runtime cannot load it, or the device cannot be used.
        """
        if bundle is None:
            bundle = default_bundle_path()
        if isinstance(bundle, str | os.PathLike):
            bundle = Bundle.open(bundle)
        captioner = cls(bundle, device, intra_op_threads=intra_op_threads, limits=limits, precision=precision)
        captioner._use_engine()
        return captioner

    def __repr__(self) -> str:
        """The model, where it runs (or shall, until its sessions are there), and whether it is closed."""
        held = self._engine
        device = self._device if held is None else held[1].device
        name, path = self._bundle.manifest.name, printable(self._bundle.path)
        return f"<Captioner {name!r} from {path} on {device}{', closed' if self._closed else ''}>"

    def __enter__(self) -> "Captioner":
        """The captioner itself.

        Raises:
            EngineError: it is closed.
        """
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Give the sessions back; calls that are under way in other threads end as usual. May be called again."""
        self._closed = True
        self._engine = None

    def __reduce__(self) -> tuple[object, ...]:
        """The configuration; see the class."""
        path = str(self._bundle.location)
        # The default bundle is found again wherever the package is installed.
        stated = None if path == _default_path() else path
        return _revived, (stated, self.key, self._device, self._intra_op_threads, self._limits, self._precision)

    @property
    def bundle(self) -> Bundle:
        """The bundle."""
        return self._bundle

    @property
    def key(self) -> str:
        """SHA-256 of the bundle's manifest, 64 hexadecimal digits: the same model, wherever its bundle lies."""
        return self._bundle.sha256

    @property
    def limits(self) -> PhotoLimits:
        """The largest photos that are read."""
        return self._limits

    @property
    def provider(self) -> str:
        """The execution provider that ONNX Runtime really uses."""
        return self._use_engine().provider

    @property
    def precision(self) -> str:
        """What the networks are computed in: "fp32", "fp16" or "int8"."""
        return self._use_engine().precision

    @property
    def device(self) -> str:
        """Where it runs: "cpu", or "cuda:0" for the first GPU."""
        return self._use_engine().device

    @property
    def intra_op_threads(self) -> int:
        """How many threads share the work of one operator on the CPU."""
        return self._use_engine().intra_op_threads

    @property
    def fallback(self) -> str | None:
        """Why "auto" runs on the CPU although an NVIDIA driver is there; None where it is not so."""
        return self._use_engine().fallback

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
            OptionsError: `options` are no `DecodeOptions`.
            ImageError: the photo cannot be read.
            EngineError: ONNX Runtime fails, or the captioner is closed.
        """
        options = self._given(options)
        pixels, seconds = self._read(image)
        return self.caption_pixels([pixels], options, read_s=[seconds])[0]

    def stream(self, image: ImageSource, options: DecodeOptions | None = None) -> Generator[Word, None, Caption]:
        """Caption a photo, and give each word as soon as it is certain.

        Greedy search and sampling make a word certain with every step, a beam when all its hypotheses agree on it.
        Words that were given cannot be taken back, so the guard does not decode again; the caption's `faults` tell what
        it would have found.

        Args:
            image: see `caption`.
            options: see `caption`.

        Yields:
            The words, in order.

        Returns:
            The caption (``caption = yield from captioner.stream(photo)``, or the value of `StopIteration`).

        Raises:
            OptionsError: `options` are no `DecodeOptions`. This is said at once; the photo is read when the first
                word is asked for.
            ImageError: the photo cannot be read.
            EngineError: ONNX Runtime fails, or the captioner is closed.
        """
        # Apart, because a generator would report it only when its first word is asked for.
        return self._stream(image, self._given(options))

    def _stream(self, image: ImageSource, options: DecodeOptions) -> Generator[Word, None, Caption]:
        pixels, read_s = self._read(image)
        stepper = EngineStepper(self._use_engine(), [pixels])
        special = special_tokens(self._bundle.vocabulary, options)
        search = Search(stepper, options, special, photo_seed=photo_seeds([pixels]))
        given, decode_s, going_on = 0, 0.0, True
        while going_on:
            start = time.perf_counter()
            going_on = search.advance()
            decode_s += time.perf_counter() - start
            if going_on:
                settled = search.settled(0)
                for i in range(given, len(settled.tokens)):
                    yield self._word(settled.tokens[i], settled.log_probs[i], settled.attention[i])
                given = len(settled.tokens)
        hypotheses = search.results()[0]
        best = hypotheses[0]
        for i in range(given, len(best.tokens)):
            yield self._word(best.tokens[i], best.log_probs[i], best.attention[i])
        found = Guarded(hypotheses, options.strategy, (), faults_of(best))
        return self._caption_of(found, stepper, Timing(read_s, stepper.extract_s, stepper.encode_s, decode_s))

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

        The next photos are read by threads while a batch is in the network. A photo's words do not depend on the photos
        that share its batch, but for rounding: log-probabilities may differ by 1e-4, and words only where two are as
        likely to that precision.

        Args:
            images: the photos; taken as they are needed, up to a batch ahead, so that there may be any number of them.
            options: how to decode; None for `default_options`.
            batch_size: photos that go through the network together, 1 to 65536.
            on_error: at a photo that cannot be read, "raise" its `ImageError`, after the captions of the photos before
                it; or "return" the error in the caption's place and go on.

        Raises:
            OptionsError: an impossible argument, or one photo in place of several. This is said at once; photos are
                read when the first caption is asked for.
            ImageError: a photo cannot be read, with `on_error="raise"`.
            EngineError: ONNX Runtime fails, or the captioner is closed.
        """
        batch_size = whole_number("batch_size", batch_size, 1, _LARGEST_BATCH)
        if on_error not in ("raise", "return"):
            raise OptionsError(f'on_error is "raise" or "return", not {on_error!r}')
        # The characters of a path, and the rows of an array, would be taken as photos.
        one = isinstance(images, str | bytes) or (isinstance(images, np.ndarray) and images.ndim < 4)
        if one or not isinstance(images, Iterable):
            raise OptionsError(
                f"caption_many takes several photos, not {described(images)}: give a list, or use caption for one"
            )
        # Apart, because a generator would report a wrong argument only when its first caption is asked for.
        return self._caption_many(images, self._given(options), batch_size, on_error == "raise")

    def caption_pixels(
        self,
        pixels: Sequence[NDArray[np.uint8]],
        options: DecodeOptions | None = None,
        *,
        read_s: Sequence[float] | None = None,
    ) -> list[Caption]:
        """Caption photos that have been read already, all in one batch.

        Args:
            pixels: uint8 [S, S, 3] each, as `caption_rt.image.read_photo` gives for the bundle's image size S.
            options: how to decode; None for `default_options`.
            read_s: how long the reading of each photo took, for its caption's `timing`.

        Raises:
            OptionsError: `options` are no `DecodeOptions`.
            EngineError: ONNX Runtime fails, or the captioner is closed.
        """
        options = self._given(options)
        if not len(pixels):
            return []
        stepper = EngineStepper(self._use_engine(), pixels)
        start = time.perf_counter()
        special = special_tokens(self._bundle.vocabulary, options)
        found = decode_guarded(stepper, options, special, photo_seed=photo_seeds(pixels))
        decode_s = time.perf_counter() - start
        share = [seconds / len(pixels) for seconds in (stepper.extract_s, stepper.encode_s, decode_s)]
        return [
            self._caption_of(guarded, stepper, Timing(seconds, *share))
            for guarded, seconds in zip(found, read_s or [0.0] * len(pixels), strict=True)
        ]

    def self_test(self) -> "SelfTest":
        """Caption the bundle's own test photos and compare with the results that its makers got in training.

        In fp32 the words must be the same; in fewer bits, where another word may be as likely, the log-probabilities
        of the makers' words.

        Raises:
            BundleError: the bundle's self-test cannot be read.
            EngineError: this machine gives other words, or log-probabilities further off than the bundle allows.
        """
        from caption_rt.selftest import run_self_test  # rarely asked for

        engine = self._use_engine()
        return run_self_test(
            self._bundle, engine.precision, self.caption_pixels, lambda pixels: EngineStepper(engine, [pixels])
        )

    def _given(self, options: DecodeOptions | None) -> DecodeOptions:
        """The options of a call.

        Raises:
            OptionsError: they are something else.
        """
        if options is None:
            return self._options
        if not isinstance(options, DecodeOptions):
            raise OptionsError(
                f"options are a DecodeOptions, as in DecodeOptions(beam_size=3), not {described(options)}"
            )
        return options

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the captioner is closed: load another one")

    def _use_engine(self) -> Engine:
        """The engine of this process, built if it is not there yet."""
        self._check_open()
        process = os.getpid()
        held = self._engine
        if held is None or held[0] != process:  # sessions do not outlive a fork
            engine = shared_engine(self._bundle, self._device, self._intra_op_threads, self._precision)
            held = self._engine = process, engine
        if self._closed:  # meanwhile, by another thread
            self._engine = None
        return held[1]

    def _read(self, image: ImageSource) -> tuple[NDArray[np.uint8], float]:
        start = time.perf_counter()
        pixels = read_photo(image, self._bundle.manifest.image.size, limits=self._limits)
        return pixels, time.perf_counter() - start

    def _caption_many(
        self, images: Iterable[ImageSource], options: DecodeOptions, batch_size: int, raising: bool
    ) -> Iterator[Caption | ImageError]:
        def read(image: ImageSource) -> _Read:
            try:
                return self._read(image)
            except ImageError as exc:
                return exc

        def task(image: ImageSource) -> Callable[[], _Read]:
            # An open image may be closed, and an array changed, once the next one is asked for: these are read at once.
            if isinstance(image, Image.Image | np.ndarray):
                result = read(image)
                return lambda: result
            return partial(read, image)

        batch: list[_Read] = []
        readers = usable_cpus()
        for result in ahead(lambda job: job(), map(task, images), threads=readers, window=batch_size + readers):
            batch.append(result)
            if len(batch) == batch_size or (raising and isinstance(result, ImageError)):
                yield from self._results(batch, options, raising)
                batch = []
        yield from self._results(batch, options, raising)

    def _results(self, batch: Sequence[_Read], options: DecodeOptions, raising: bool) -> Iterator[Caption | ImageError]:
        photos = [photo for photo in batch if not isinstance(photo, ImageError)]
        captions = iter(
            self.caption_pixels([pixels for pixels, _ in photos], options, read_s=[seconds for _, seconds in photos])
        )
        for photo in batch:
            if not isinstance(photo, ImageError):
                yield next(captions)
            elif raising:
                raise photo
            else:
                yield photo

    def _word(self, token: int, log_prob: float, attention: NDArray[np.float32]) -> Word:
        grid = self._bundle.manifest.grid
        return Word(self._bundle.vocabulary.words[token], token, log_prob, frozen(attention, grid.rows, grid.columns))

    def _caption_of(self, found: Guarded, stepper: EngineStepper, timing: Timing) -> Caption:
        grid, vocabulary = self._bundle.manifest.grid, self._bundle.vocabulary
        return caption_of(found, vocabulary, (grid.rows, grid.columns), stepper.provider, stepper.precision, timing)


def _default_path() -> str | None:
    try:
        return str(default_bundle_path())
    except BundleError:
        return None


def _revived(
    path: str | None,
    key: str,
    device: str,
    intra_op_threads: int | None,
    limits: PhotoLimits,
    precision: str | None,
) -> Captioner:
    """A captioner that was pickled; see `Captioner`.

    Raises:
        BundleError: the bundle is not there, or is not the one that the captioner had.
    """
    bundle = Bundle.open(default_bundle_path() if path is None else path)
    if bundle.sha256 != key:
        raise BundleError(
            f"the bundle {printable(bundle.path)} has changed since the captioner was pickled: load it again"
        )
    return Captioner(bundle, device, intra_op_threads=intra_op_threads, limits=limits, precision=precision)

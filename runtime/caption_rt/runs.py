"""One call of the command line, carried out: from the photos that are found to the summary."""

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caption_rt import ctrl_c
from caption_rt.command_options import OPTION_NAMES, decode_options
from caption_rt.console import complain, echo, say
from caption_rt.errors import CaptionError, ImageError, OptionsError, printable
from caption_rt.interrupts import Interrupts
from caption_rt.options import DecodeOptions
from caption_rt.outputs import Entry, Output, StreamOutput
from caption_rt.progress import Bar, ErrorsFile, Tally
from caption_rt.records import Record
from caption_rt.request import Request
from caption_rt.sources import Source, distinct, find_sources
from caption_rt.writers import line_writer

if TYPE_CHECKING:
    from concurrent.futures import Future

    from caption_rt.batch import Finished
    from caption_rt.bundle import Bundle
    from caption_rt.captioner import Captioner
    from caption_rt.image import PhotoLimits

__all__ = ["load_captioner", "opened_bundle", "run"]

_NAME = "caption-rt"


def opened_bundle(given: Mapping[str, Any]) -> "Future[Bundle]":
    """The bundle that was asked for, opened in a thread: its files are read and hashed while modules are imported."""
    from concurrent.futures import ThreadPoolExecutor

    from caption_rt.bundle import Bundle, default_bundle_path

    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(lambda: Bundle.open(default_bundle_path() if given["model"] is None else given["model"]))
    finally:
        pool.shutdown(wait=False)


def load_captioner(given: Mapping[str, Any], bundle: "Future[Bundle]") -> "Captioner":
    """The model that was asked for; says on standard error if it runs elsewhere than it could.

    Args:
        given: the command's options by name.
        bundle: what `opened_bundle` gave for them.

    Raises:
        CaptionError: it cannot be loaded.
    """
    # Imported late: --help and --version need neither NumPy nor ONNX Runtime.
    from caption_rt.captioner import Captioner

    captioner = Captioner.load(
        bundle.result(),
        given["device"],
        intra_op_threads=given["threads"],
        limits=_limits(given),
        precision=given["precision"],
    )
    if captioner.fallback is not None:
        say(_NAME, f"note: {captioner.fallback}; the CPU is used")
    return captioner


def run(request: Request) -> int:
    """Caption what was asked for.

    Returns:
        The exit code.

    Raises:
        CaptionError: the model cannot be loaded, or the output not be written.
    """
    bundle = opened_bundle(request.given)
    limits = _limits(request.given)
    interrupts = Interrupts(_NAME, "all that was captioned is written" if request.kept else "")
    first, sources = _found(request, limits, interrupts)
    for note in request.notes(found=first is not None):
        say(_NAME, f"note: {note}")
    # A few photos that were named need neither a bar nor a summary.
    many = request.kept or request.output is not None or first is None or not first.named
    with load_captioner(request.given, bundle) as captioner:
        return _Run(request, captioner, limits, interrupts, many).carry_out(sources)


class _Run:
    """A run, from the open output to the summary."""

    def __init__(
        self, request: Request, captioner: "Captioner", limits: "PhotoLimits", interrupts: Interrupts, many: bool
    ) -> None:
        self._request = request
        self._many = many or any(map(os.path.isdir, request.arguments))
        self._captioner = captioner
        self._limits = limits
        self._interrupts = interrupts
        self._options = decode_options(captioner.default_options, request.given)
        for note in _notes(captioner, self._options, request.given):
            say(_NAME, f"note: {note}")
        self._tally = Tally()
        self._errors: ErrorsFile | None = None
        self._last: Entry | None = None

    def carry_out(self, sources: Iterator[Source]) -> int:
        request = self._request
        if request.plotted:
            sources = (_fetched(source, self._limits) for source in sources)
        with contextlib.closing(self._open_output()) as output:
            if request.given["errors"] is not None:
                self._errors = ErrorsFile(Path(request.given["errors"]))
            try:
                self._go_through(sources, output)
                if not self._interrupts.stopped:
                    output.finish()
            finally:
                if self._errors is not None:
                    self._errors.close()
        return self._end()

    def _go_through(self, sources: Iterator[Source], output: Output) -> None:
        from caption_rt.batch import BatchSettings, caption_sources

        request = self._request
        settings = BatchSettings(
            batch_size=request.given["batch_size"] or BatchSettings.batch_size,
            thumbnails=not request.sidecars and line_writer(request.format_name).needs_thumbnail,
        )
        shown = self._many and sys.stderr.isatty() and not (request.output is None and sys.stdout.isatty())
        total = self._count() if shown else None
        stopped = self._interrupts.is_stopped
        ctrl_c.check()  # all that begins a run is imported now
        with self._interrupts, Bar(total, shown=shown) as bar:
            for finished in caption_sources(
                sources, self._captioner, self._options, output, settings, names=OPTION_NAMES, stopped=stopped
            ):
                self._count_in(finished)
                bar.advance(1)

    def _count(self) -> int | None:
        """How many photos there are; a list on standard input can be read only once."""
        request = self._request
        if "-" in request.arguments:
            return None
        return sum(1 for _ in _each_once(request, find_sources(request.arguments, request.selection)))

    def _count_in(self, finished: "Finished") -> None:
        if isinstance(finished, Entry):
            self._last = finished
            result, error = finished.record.result, finished.error
            if isinstance(result, CaptionError) and not self._request.kept:
                complain(_NAME, str(result))
        else:
            error = finished.error
        if error is not None:
            self._tally.fail(finished.source.path, json.loads(error).get("reason", "is not captioned"))
            if self._errors is not None:
                self._errors.add(finished.source.path, error)
        elif isinstance(finished, Entry):
            self._tally.captioned += 1
        elif finished.left:
            self._tally.left += 1
        else:
            self._tally.done += 1

    def _open_output(self) -> Output:
        request = self._request
        if not request.kept:
            return self._open_stream()
        from caption_rt.batch import run_key

        key = run_key(self._captioner.key, self._captioner.precision, self._options, self._limits)
        if request.output is None:
            from caption_rt.output_sidecars import SidecarOutput, sidecar_ledger

            ledger = request.ledger or sidecar_ledger(request.arguments, request.selection.shard)
            return SidecarOutput(ledger, request.format_name, request.existing, key)
        from caption_rt.output_file import FileOutput

        writer = line_writer(request.format_name)
        return FileOutput(request.output, request.format_name, writer, request.existing, key, request.ledger)

    def _open_stream(self) -> Output:
        request = self._request
        writer = line_writer(request.format_name)

        def line(entry: Entry) -> bytes:
            bare = request.format_name == "text" and len(request.arguments) == 1 and entry.source.named
            return _bare(entry.record) if bare else writer.line(entry.record)

        if request.output is not None:
            file = request.output.open("ab")

            def put(data: bytes) -> None:
                file.write(data)
                file.flush()

            return StreamOutput(writer.header, line, put, file.close)
        if request.format_name != "text":
            return StreamOutput(writer.header, line, echo)
        # Through the terminal's encoding, as text.
        return StreamOutput(writer.header, line, lambda data: echo(data.decode("utf-8").removesuffix("\n")))

    def _end(self) -> int:
        request, tally = self._request, self._tally
        if self._many:
            for line in tally.lines():
                say(_NAME, line)
        if self._interrupts.stopped:
            complain(_NAME, _interrupted(request))
            return self._interrupts.exit_code
        if request.plotted:
            if tally.total != 1:
                raise OptionsError(f"--plot and --show take one photo, and there were {tally.total}")
            self._plot()
        return tally.exit_code

    def _plot(self) -> None:
        assert self._last is not None
        source, caption = self._last.source, self._last.record.result
        if isinstance(caption, CaptionError):
            return
        assert source.data is not None
        if self._request.given["plot"] is not None:
            caption.plot(source.data, self._request.given["plot"], limits=self._limits, name=source.name)
        if self._request.given["show"]:
            from caption_rt.attention import show_plot

            show_plot(source.data, caption, limits=self._limits, name=source.name)


def _bare(record: Record) -> bytes:
    """The line of a photo that is captioned alone: no name."""
    if isinstance(record.result, CaptionError):
        return b""
    return f"{printable(record.result.text)}\n".encode()


def _limits(given: Mapping[str, Any]) -> "PhotoLimits":
    from caption_rt.image import PhotoLimits

    named = {"max_pixels": given["max_pixels"], "max_bytes": given["max_bytes"]}
    return PhotoLimits(**{name: value for name, value in named.items() if value is not None})


def _found(request: Request, limits: "PhotoLimits", interrupts: Interrupts) -> tuple[Source | None, Iterator[Source]]:
    """The first photo, None if there is none, and all of them."""
    found = find_sources(
        request.arguments,
        request.selection,
        stdin=getattr(sys.stdin, "buffer", None),
        null=request.given["null"],
        max_bytes=limits.max_bytes,
        may_be_empty=request.kept or request.output is not None,
        stopped=interrupts.is_stopped,
    )
    sources = _each_once(request, found)
    first = next(sources, None)
    return first, iter(()) if first is None else itertools.chain((first,), sources)


def _each_once(request: Request, sources: Iterator[Source]) -> Iterator[Source]:
    """What is written to a file is written once a photo; lines go to standard output as often as it was named."""
    # Of one folder each photo is found once, and nothing need be remembered.
    alone = len(request.arguments) == 1 and "-" not in request.arguments
    return distinct(sources) if request.kept and not alone else sources


def _notes(captioner: "Captioner", options: DecodeOptions, given: Mapping[str, Any]) -> Iterator[str]:
    """What of the options of decoding changes nothing, with this model."""
    if given["length_penalty"] is not None and options.strategy != "beam":
        why = "sampling keeps no beam" if options.sample else "a beam of 1 has one"
        yield f"--length-penalty chooses among a beam's captions, and {why}"
    if options.no_repeat_ngram >= options.max_words:
        most = options.max_words
        yield f"--no-repeat-ngram {options.no_repeat_ngram} forbids nothing: captions have at most {most} words"
    vocabulary = captioner.bundle.vocabulary
    unknown = [word for word in options.banned_words if set(vocabulary.encode(word)) == {vocabulary.unk_id}]
    if unknown:
        yield f"--ban names what the model does not know, and would never say: {', '.join(map(printable, unknown))}"


def _fetched(source: Source, limits: "PhotoLimits") -> Source:
    """A photo with its bytes, which are needed a second time."""
    from caption_rt.reading import read_bytes

    try:
        return replace(source, data=read_bytes(source, limits))
    except ImageError as exc:
        return replace(source, error=exc)


def _interrupted(request: Request) -> str:
    if not request.kept:
        return "interrupted"
    again = "the same command"
    if request.existing == "overwrite" and not request.sidecars:
        again = "the same command without --existing overwrite"
    return f"interrupted; all that was captioned is written, and {again} goes on from there"

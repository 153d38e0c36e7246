"""One call of the command line: what was asked for, checked, and carried out."""

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from caption_rt.command_options import decode_options
from caption_rt.console import complain, echo, say
from caption_rt.devices import parse_device
from caption_rt.errors import CaptionError, ImageError, OptionsError, printable
from caption_rt.interrupts import Interrupts
from caption_rt.options import DecodeOptions
from caption_rt.outputs import Entry, Output, StreamOutput
from caption_rt.progress import Bar, ErrorsFile, Tally
from caption_rt.records import Record
from caption_rt.sources import Selection, Source, find_sources, parse_shard
from caption_rt.writers import SIDECAR_FORMATS, format_of, line_writer

if TYPE_CHECKING:
    from caption_rt.batch import Finished
    from caption_rt.captioner import Captioner
    from caption_rt.image import PhotoLimits

__all__ = ["Request", "load_captioner", "run"]

_NAME = "caption-rt"


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Made by `Request.of`, which checks it.
    """

    arguments: tuple[str, ...]
    """Files, folders, addresses and "-"."""
    given: Mapping[str, Any]
    """The command's options by name."""
    selection: Selection
    """Which photos of folders."""
    format_name: str
    """One of `caption_rt.writers.FORMATS`."""
    output: Path | None
    """The output file; None for standard output and sidecars."""
    existing: str
    """One of `caption_rt.outputs.EXISTING`."""

    @classmethod
    def of(cls, arguments: Sequence[str], given: Mapping[str, Any]) -> "Request":
        """Check what was asked for, before a model is loaded or a file changed.

        Raises:
            OptionsError: a value that cannot be meant.
            click.UsageError: options that contradict each other.
        """
        decode_options(DecodeOptions(), given)
        parse_device(given["device"])
        sampling = [name for name in ("temperature", "top_k", "top_p", "seed") if given[name] is not None]
        if sampling and not given["sample"]:
            raise click.UsageError(f"--{sampling[0].replace('_', '-')} needs --sample")
        shard = None if given["shard"] is None else parse_shard(given["shard"])
        selection = Selection(given["include"], given["exclude"], shard)
        output = None if given["output"] in (None, "-") else Path(given["output"])
        request = cls(tuple(arguments), given, selection, _format(given, output), output, given["existing"] or "resume")
        request._check()
        return request

    @property
    def sidecars(self) -> bool:
        """Whether there is a file beside each photo."""
        return self.format_name in SIDECAR_FORMATS

    @property
    def kept(self) -> bool:
        """Whether a ledger is kept, so that the run can be taken up."""
        return self.sidecars or (self.output is not None and not _is_stream(self.output))

    @property
    def plotted(self) -> bool:
        """Whether where the model looked is to be seen, which one photo alone can have."""
        return self.given["plot"] is not None or self.given["show"]

    def _check(self) -> None:
        if self.sidecars and self.given["output"] is not None:
            raise click.UsageError(f"--format {self.format_name} writes a file beside each photo: leave out --output")
        if self.given["existing"] is not None and not self.kept:
            raise click.UsageError("--existing is about a file that is written: name it with --output")
        if self.plotted:
            self._check_plot()
        if self.sidecars:
            for source in (Source(argument, argument) for argument in self.arguments):
                if source.is_address:
                    raise OptionsError(f"{source.name} has no place for a sidecar: save it as a file first")
        if self.given["errors"] is not None:
            ErrorsFile.check(Path(self.given["errors"]), replace=self.existing == "overwrite")
        if self.output is not None and self.kept:
            from caption_rt.output_file import check_output

            check_output(self.output, self.existing)

    def _check_plot(self) -> None:
        from caption_rt.attention import check_plot_path, check_screen

        option = "--plot" if self.given["plot"] is not None else "--show"
        alone = len(self.arguments) == 1 and not os.path.isdir(self.arguments[0])
        if not alone or self.kept or self.output is not None:
            raise click.UsageError(f"{option} takes one photo, and its caption goes to standard output")
        if self.given["plot"] is not None:
            folder = check_plot_path(self.given["plot"]).parent
            if not folder.is_dir():
                raise OptionsError(f"the folder {printable(folder)} of the plot does not exist: make it first")
        if self.given["show"]:
            check_screen()


def load_captioner(given: Mapping[str, Any]) -> "Captioner":
    """The model that was asked for; says on standard error if it runs elsewhere than it could.

    Raises:
        CaptionError: it cannot be loaded.
    """
    from concurrent.futures import ThreadPoolExecutor

    from caption_rt.bundle import Bundle, default_bundle_path

    with ThreadPoolExecutor(1) as pool:
        # The bundle's files are read and hashed while ONNX Runtime is loaded.
        bundle = pool.submit(lambda: Bundle.open(default_bundle_path() if given["model"] is None else given["model"]))
        # Imported late: --help and --version need neither NumPy nor ONNX Runtime.
        from caption_rt.captioner import Captioner
    captioner = Captioner.load(
        bundle.result(), given["device"], intra_op_threads=given["threads"], limits=_limits(given)
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
    limits = _limits(request.given)
    interrupts = Interrupts(_NAME, "all that was captioned is written" if request.kept else "")
    first, sources = _found(request, limits, interrupts)
    # A few photos that were named need neither a bar nor a summary.
    many = request.kept or request.output is not None or first is None or not first.named
    with load_captioner(request.given) as captioner:
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
        with self._interrupts, Bar(total, shown=shown) as bar:
            for finished in caption_sources(sources, self._captioner, self._options, output, settings, stopped=stopped):
                self._count_in(finished)
                bar.advance(1)

    def _count(self) -> int | None:
        """How many photos there are; a list on standard input can be read only once."""
        request = self._request
        if "-" in request.arguments:
            return None
        return sum(1 for _ in find_sources(request.arguments, request.selection))

    def _count_in(self, finished: "Finished") -> None:
        if isinstance(finished, Entry):
            self._last = finished
            result, error = finished.record.result, finished.error
            if isinstance(result, CaptionError) and not self._request.kept:
                complain(_NAME, str(result))
        else:
            error = finished.error
        if error is not None:
            self._tally.fail(finished.source.path, json.loads(error)["message"])
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

        key = run_key(self._captioner.key, self._options, self._limits)
        if request.output is None:
            from caption_rt.output_sidecars import SidecarOutput, sidecar_ledger

            ledger = sidecar_ledger(request.arguments, request.selection.shard)
            return SidecarOutput(ledger, request.format_name, request.existing, key)
        from caption_rt.output_file import FileOutput

        writer = line_writer(request.format_name)
        return FileOutput(request.output, request.format_name, writer, request.existing, key)

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
                click.echo(f"{_NAME}: {line}", err=True)
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
            caption.plot(source.data, self._request.given["plot"])
        if self._request.given["show"]:
            from caption_rt.attention import show_plot

            show_plot(source.data, caption)


def _bare(record: Record) -> bytes:
    """The line of a photo that is captioned alone: no name."""
    if isinstance(record.result, CaptionError):
        return b""
    return f"{printable(record.result.text)}\n".encode()


def _format(given: Mapping[str, Any], output: Path | None) -> str:
    chosen: str | None = given["format_name"]
    if given["as_json"]:
        if chosen not in (None, "jsonl"):
            raise click.UsageError(f"--json is --format jsonl: leave out one of --json and --format {chosen}")
        return "jsonl"
    if chosen is not None:
        return chosen
    return "text" if output is None else format_of(output)


def _limits(given: Mapping[str, Any]) -> "PhotoLimits":
    from caption_rt.image import PhotoLimits

    named = {"max_pixels": given["max_pixels"], "max_bytes": given["max_bytes"]}
    return PhotoLimits(**{name: value for name, value in named.items() if value is not None})


def _found(request: Request, limits: "PhotoLimits", interrupts: Interrupts) -> tuple[Source | None, Iterator[Source]]:
    """The first photo, and all of them.

    Raises:
        OptionsError: there is nothing.
    """
    sources = find_sources(
        request.arguments,
        request.selection,
        stdin=getattr(sys.stdin, "buffer", None),
        null=request.given["null"],
        max_bytes=limits.max_bytes,
        stopped=interrupts.is_stopped,
    )
    first = next(sources, None)
    if first is not None:
        return first, itertools.chain((first,), sources)
    everything = replace(request.selection, shard=None)
    if request.selection.shard and (
        "-" in request.arguments or next(find_sources(request.arguments, everything), None) is not None
    ):
        return None, iter(())  # a part without photos is no mistake
    raise OptionsError(
        "there is no photo: of a folder, files are taken that end as photos do (.jpg, .png) and that --include and "
        "--exclude let pass"
    )


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


def _is_stream(path: Path) -> bool:
    """Whether it is a pipe or device, to which a ledger means nothing."""
    return path.exists() and not path.is_file() and not path.is_dir()

"""What was asked for on the command line, checked before a model is loaded or a file changed."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from caption_rt._sniff import PHOTO_SUFFIXES
from caption_rt.command_options import check_sampling, decode_options
from caption_rt.devices import parse_device
from caption_rt.errors import OptionsError, printable, shown
from caption_rt.options import DecodeOptions
from caption_rt.progress import ErrorsFile
from caption_rt.sources import Selection, Source, parse_shard
from caption_rt.writers import SIDECAR_FORMATS, ending_of, format_of

__all__ = ["Request"]


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
        check_sampling(given)
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

    @property
    def ledger(self) -> Path | None:
        """Where the ledger is to be; None for where it belongs."""
        return None if self.given["ledger"] is None else Path(self.given["ledger"])

    def notes(self, *, found: bool) -> list[str]:
        """What is no mistake, and perhaps not what was meant.

        Args:
            found: whether there is any photo.
        """
        folders = any(map(os.path.isdir, self.arguments))
        patterns = self.selection.include + self.selection.exclude
        if found and patterns and not folders and "-" not in self.arguments:
            return ["--include and --exclude choose among what folders hold, and no folder is named"]
        # A folder, a list, or a part of a folder may be empty today.
        return [] if found or self.selection.shard else [self._nothing()]

    def _nothing(self) -> str:
        if self.arguments == ("-",):
            return "no path came on standard input, or none that leads to a photo"
        names = ", ".join(shown(argument) for argument in self.arguments[:3])
        more = ", ..." if len(self.arguments) > 3 else ""
        chosen = " and that --include and --exclude let pass" if self.selection.include + self.selection.exclude else ""
        return f"there is no photo in {names}{more}: files are taken that end as photos do (.jpg, .png){chosen}"

    def _check(self) -> None:
        self._check_usage()
        if self.plotted:
            self._check_plot()
        if self.sidecars:
            for source in (Source(argument, argument) for argument in self.arguments):
                if source.is_address:
                    raise OptionsError(f"{source.name} has no place for a sidecar: save it as a file first")
            from caption_rt.ledger import check_ledger
            from caption_rt.output_sidecars import sidecar_ledger

            check_ledger(self.ledger or sidecar_ledger(self.arguments, self.selection.shard))
        if self.given["errors"] is not None:
            ErrorsFile.check(Path(self.given["errors"]), replace=self.existing == "overwrite")
        if self.output is not None and self.kept:
            from caption_rt.output_place import check_output

            check_output(self.output, self.existing, self.ledger)

    def _check_usage(self) -> None:
        """Refuse what is asked for and would come to nothing, or that two things be written to one file."""
        given = self.given
        if self.sidecars and self.given["output"] is not None:
            raise click.UsageError(f"--format {self.format_name} writes a file beside each photo: leave out --output")
        if self.given["existing"] is not None and not self.kept:
            raise click.UsageError("--existing is about a file that is written: name it with --output")
        if given["ledger"] is not None and not self.kept:
            raise click.UsageError("--ledger is about a run that writes files: name one with --output")
        if given["null"] and "-" not in self.arguments:
            raise click.UsageError("-0 is about the list on standard input: name that with -")
        if (given["n_best"] or 1) > 1 and self.format_name != "jsonl":
            raise click.UsageError("the format jsonl alone has more than one caption a photo: add --json to --n-best")
        if given["errors"] == "-":
            raise click.UsageError("--errors writes a file: on standard error the errors are anyway")
        if self.output is not None and ending_of(self.output) not in (None, self.format_name):
            raise click.UsageError(
                f"the name {shown(self.output)} says {ending_of(self.output)}, and the format is to be "
                f"{self.format_name}: choose one of them"
            )
        for name in filter(None, (given["output"], given["ledger"], given["errors"])):
            if os.path.splitext(name)[1].lower() in PHOTO_SUFFIXES:
                raise click.UsageError(f"{shown(name)} is named like a photo: name another file to write to")
        written = [name for name in (given["output"], given["ledger"], given["errors"], given["plot"]) if name]
        for place, name in enumerate(written):
            if os.path.isfile(name) or not os.path.exists(name):  # /dev/null may be named twice
                others = [*written[:place], *self.arguments]
                if os.path.realpath(name) in map(os.path.realpath, others) and name != "-":
                    raise click.UsageError(f"{shown(name)} is named twice, and would be written over")

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


def _format(given: Mapping[str, Any], output: Path | None) -> str:
    chosen: str | None = given["format_name"]
    if given["as_json"]:
        if chosen not in (None, "jsonl"):
            raise click.UsageError(f"--json is --format jsonl: leave out one of --json and --format {chosen}")
        return "jsonl"
    if chosen is not None:
        return chosen
    return "text" if output is None else format_of(output)


def _is_stream(path: Path) -> bool:
    """Whether it is a pipe or device, to which a ledger means nothing."""
    return path.exists() and not path.is_file() and not path.is_dir()

"""The options of the command `caption-rt`, in groups, and what they mean together."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import click

from caption_rt.errors import printable, shown
from caption_rt.manifest import PRECISIONS
from caption_rt.options import DecodeOptions
from caption_rt.outputs import EXISTING
from caption_rt.writers import FORMATS

__all__ = [
    "OPTION_NAMES",
    "Amount",
    "BundleName",
    "GroupedCommand",
    "GroupedOption",
    "Name",
    "check_sampling",
    "decode_options",
    "is_given",
    "options",
    "word_options",
]

F = TypeVar("F", bound=Callable[..., Any])

_UNITS = {"": 0, "k": 1, "m": 2, "g": 3}


class GroupedOption(click.Option):
    """An option that stands under a heading in the help."""

    def __init__(self, *arguments: Any, group: str, **keywords: Any) -> None:
        """Take a heading beside what click takes."""
        super().__init__(*arguments, **keywords)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose help has a heading for each group of options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, in groups, in the order in which they are declared."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and not isinstance(parameter, click.Argument):
                groups.setdefault(getattr(parameter, "group", "Other"), []).append(record)
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records, col_max=26)


class Amount(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3 only
    """A count that may be written with k, M or G."""

    name = "amount"

    def __init__(self, base: int) -> None:
        """Take what k stands for: 1000 or 1024."""
        self._base = base

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The count."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([kmg]?)(?:i?b)?", value.strip().lower())
        if found is None:
            self.fail(f"{printable(repr(value))} is not a number such as 300M", param, ctx)
        return int(float(found[1]) * self._base ** _UNITS[found[2]])


class Name(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3 only
    """The name of a file: anything but nothing, which is what a variable gives that was never set."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name."""
        if not value:
            self.fail("the name is empty", param, ctx)
        return str(value)


class BundleName(Name):
    """The name of a bundle, which is never fetched."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name."""
        name = super().convert(value, param, ctx)
        if name.lower().startswith(("http://", "https://")):
            self.fail(f"{shown(name)} is an address: fetch the bundle, and name its folder or zip file", param, ctx)
        return name


def decode_options(defaults: DecodeOptions, given: Mapping[str, Any]) -> DecodeOptions:
    """How to decode, by a model's own choice and what was given on the command line.

    Args:
        defaults: the model's choice; `DecodeOptions()` where the options are only to be checked.
        given: the command's options by name.

    Raises:
        OptionsError: a value that cannot be meant.
    """
    values = {name: given[option] for option, name in _DECODING.items() if is_given(given[option])}
    if given["guard"] is not None:
        values["guard"] = given["guard"]
    if given["sample"]:
        values.setdefault("beam_size", 1)
    elif given["n_best"] is not None:
        values.setdefault("beam_size", max(defaults.beam_size, given["n_best"]))
    if given["min_words"] is not None:
        values.setdefault("max_words", max(defaults.max_words, given["min_words"]))
    return replace(defaults, **values)


def check_sampling(given: Mapping[str, Any]) -> None:
    """See that options of sampling come with --sample.

    Args:
        given: the command's options by name.

    Raises:
        click.UsageError: one does not.
    """
    sampling = [name for name in ("temperature", "top_k", "top_p", "seed") if given[name] is not None]
    if sampling and not given["sample"]:
        raise click.UsageError(f"--{sampling[0].replace('_', '-')} needs --sample")


def is_given(value: object) -> bool:
    """Whether an option without a default was named on the command line; 0 was, although it equals False."""
    return value is not None and value is not False and value != ()


_DECODING = {
    "beam": "beam_size",
    "length_penalty": "length_penalty",
    "n_best": "n_best",
    "sample": "sample",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "seed": "seed",
    "min_words": "min_words",
    "max_words": "max_words",
    "no_repeat_ngram": "no_repeat_ngram",
    "ban": "banned_words",
    "allow_unk": "allow_unk",
}


_OURS = ("max_pixels", "max_bytes", "batch_size", "ledger", "device", "precision")

OPTION_NAMES: Mapping[str, str] = {
    **{name: f"--{option.replace('_', '-')}" for option, name in _DECODING.items()},
    **{name: f"--{name.replace('_', '-')}" for name in _OURS},
    **{"intra_op_threads": "--threads", "include": "--include", "exclude": "--exclude", "null": "-0"},
}
"""The options that stand for our parameters; see `caption_rt.errors.Parameter`."""


def _group(heading: str, *declared: tuple[Sequence[str], dict[str, Any]]) -> list[Callable[[F], F]]:
    return [click.option(*names, cls=GroupedOption, group=heading, **keywords) for names, keywords in declared]


_PHOTOS: list[Callable[[Any], Any]] = _group(
    "Photos",
    (
        ("--include",),
        {
            "multiple": True,
            "metavar": "PATTERN",
            "help": "Of folders, only photos whose name, or the name of a folder on the way, matches; with a slash in "
            "PATTERN, whose path within the folder does. May be repeated.",
        },
    ),
    (
        ("--exclude",),
        {"multiple": True, "metavar": "PATTERN", "help": "Of folders, nothing that matches. May be repeated."},
    ),
    (
        ("--shard",),
        {
            "metavar": "I/N",
            "help": "Only part I of N, such as 2/8: each photo is in exactly one part. Every part wants a file of its "
            "own for -o.",
        },
    ),
    (
        ("-0", "--null"),
        {"is_flag": True, "help": "Names on standard input end in a zero byte (find -print0), not a line break."},
    ),
    (
        ("--max-pixels",),
        {"type": Amount(1000), "metavar": "COUNT", "help": "Largest photo, such as 300M. Default: 178.9M."},
    ),
    (
        ("--max-bytes",),
        {"type": Amount(1024), "metavar": "SIZE", "help": "Largest file, such as 1G. Default: 256M."},
    ),
)

_OUTPUT: list[Callable[[Any], Any]] = _group(
    "Output",
    (
        ("-o", "--output"),
        {
            "type": Name(),
            "metavar": "FILE",
            "help": "Write to FILE (.jsonl, .csv, .tsv, .html) rather than standard output, which is -.",
        },
    ),
    (
        ("--format", "format_name"),
        {
            "type": click.Choice(FORMATS),
            "help": "txt and xmp write a file beside each photo. Default: by the ending of FILE, else text.",
        },
    ),
    (("--json", "as_json"), {"is_flag": True, "help": "Short for --format jsonl."}),
    (
        ("--existing",),
        {
            "type": click.Choice(EXISTING),
            "help": "What to do with output that is there. resume (the default) goes on where a run stopped, captions "
            "what is new or changed, and touches nothing of others; skip captions only photos that have nothing yet; "
            "append adds; overwrite begins anew.",
        },
    ),
    (
        ("--ledger",),
        {
            "type": Name(),
            "metavar": "FILE",
            "help": "Where to remember what is done. Default: FILE.ledger beside the output; for txt and xmp "
            ".caption-rt.ledger in the first folder that is named.",
        },
    ),
    (
        ("--errors",),
        {
            "type": Name(),
            "metavar": "FILE",
            "help": "Write photos that cannot be captioned, and why, to FILE as JSON lines.",
        },
    ),
    (
        ("--plot",),
        {
            "type": Name(),
            "metavar": "FILE",
            "help": "Write where the model looked for each word (PNG, SVG, PDF); one photo only.",
        },
    ),
    (("--show",), {"is_flag": True, "help": "Show the same in a window; one photo only."}),
)

_DECODE: list[Callable[[Any], Any]] = _group(
    "Words (defaults are the model's)",
    (("--beam",), {"type": int, "metavar": "N", "help": "Captions searched side by side; 1 is greedy."}),
    (("--length-penalty",), {"type": float, "metavar": "A", "help": "Above 0, a beam favours longer captions."}),
    (
        ("--n-best",),
        {"type": int, "metavar": "N", "help": "Give the N best captions; with --json alone. Widens the beam to N."},
    ),
    (("--sample",), {"is_flag": True, "help": "Draw words by their probability rather than search."}),
    (("--temperature",), {"type": float, "metavar": "T", "help": "With --sample: below 1 keeps to likely words."}),
    (("--top-k",), {"type": int, "metavar": "K", "help": "With --sample: draw from the K likeliest words."}),
    (
        ("--top-p",),
        {"type": float, "metavar": "P", "help": "With --sample: from the likeliest words that reach P together."},
    ),
    (("--seed",), {"type": int, "metavar": "N", "help": "With --sample: the same N gives the same captions."}),
    (("--min-words",), {"type": int, "metavar": "N", "help": "Do not end captions before N words."}),
    (("--max-words",), {"type": int, "metavar": "N", "help": "Cut captions after N words."}),
    (
        ("--no-repeat-ngram",),
        {"type": int, "metavar": "N", "help": "No N words come twice in the same order; 0 allows it."},
    ),
    (("--ban",), {"multiple": True, "metavar": "WORD", "help": "Never say WORD. May be repeated."}),
    (("--allow-unk",), {"is_flag": True, "help": "Allow <unk>, which stands for every word that is not known."}),
    (
        ("--guard/--no-guard",),
        {"default": None, "help": "Decode degenerate captions again with another strategy; by default so."},
    ),
)

_MACHINE: list[Callable[[Any], Any]] = _group(
    "Model and machine",
    (
        ("--model",),
        {
            "type": BundleName(),
            "metavar": "BUNDLE",
            "help": "Folder or zip file of the model; the one that came along by default.",
        },
    ),
    (
        ("--device",),
        {
            "default": "auto",
            "metavar": "DEVICE",
            "help": "auto (CUDA if it works), cpu, cuda, or cuda:1 for the second GPU.",
        },
    ),
    (
        ("--precision",),
        {
            "type": click.Choice(PRECISIONS),
            "help": "What the networks are computed in. Default: the best that the model has for the device; on CUDA "
            "fp16, on a CPU int8, else fp32.",
        },
    ),
    (
        ("--threads",),
        {"type": click.IntRange(1, 1024), "metavar": "N", "help": "Threads of the network. Default: all it may use."},
    ),
    (
        ("--batch-size",),
        {"type": click.IntRange(1, 4096), "metavar": "N", "help": "Photos in the network at once. Default: 16."},
    ),
    (
        ("--self-test",),
        {"is_flag": True, "help": "Check that the model gives on this machine what its makers got."},
    ),
    (
        ("--doctor",),
        {"is_flag": True, "help": "Examine the installation, and say how to mend what does not work."},
    ),
)


def options(command: F) -> F:
    """Add all options to a command."""
    return _with(command, [*_PHOTOS, *_OUTPUT, *_DECODE, *_MACHINE])


def word_options(command: F) -> F:
    """Add the options that `decode_options` reads to a command."""
    return _with(command, _DECODE)


def _with(command: F, added: Sequence[Callable[[Any], Any]]) -> F:
    for option in reversed(added):
        command = option(command)
    return command

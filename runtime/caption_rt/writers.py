"""Output formats of one line a record: JSON lines, CSV, TSV, text for a terminal, and the HTML gallery.

Every record is exactly one line, and nothing has to follow the last one: a file may be appended to, and one that was
cut at the end of a line is whole. Formats of one file a photo stand in `caption_rt.sidecars`.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from caption_rt.errors import CaptionError, OptionsError, printable
from caption_rt.records import Record

__all__ = ["FORMATS", "LINE_FORMATS", "SIDECAR_FORMATS", "LineWriter", "ending_of", "format_of", "line_writer"]

LINE_FORMATS = ("jsonl", "csv", "tsv", "text", "html")
"""Formats that go into one file or to standard output; see `line_writer`. "text" is what a terminal gets."""

SIDECAR_FORMATS = ("txt", "xmp")
"""Formats that go into a file beside each photo; see `caption_rt.sidecars`."""

FORMATS = (*LINE_FORMATS, *SIDECAR_FORMATS)
"""The names of all formats."""

_ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".html": "html",
    ".htm": "html",
}

_COLUMNS = (
    "path",
    "status",
    "caption",
    "log_prob",
    "ended",
    "strategy",
    "provider",
    "precision",
    "error_class",
    "error",
)


@dataclass(frozen=True)
class LineWriter:
    """How a format turns records into bytes."""

    header: bytes
    """What stands before the first record: nothing, or whole lines."""
    line: Callable[[Record], bytes]
    """One record as exactly one line that ends in a line feed; empty where the format has nothing to say of it."""
    needs_thumbnail: bool = False
    """Whether it shows `Record.thumbnail`."""


def ending_of(path: str | os.PathLike[str]) -> str | None:
    """The format that the ending of an output file's name stands for, in capitals or not; None if for none."""
    return _ENDINGS.get(Path(path).suffix.lower())


def format_of(path: str | os.PathLike[str]) -> str:
    """The format that an output file's name stands for.

    Raises:
        OptionsError: the ending stands for none.
    """
    name = ending_of(path)
    if name is None:
        endings = ", ".join(_ENDINGS)
        raise OptionsError(
            f"the ending of {printable(os.fspath(path))} names no format: end it in one of {endings}, or say --format"
        )
    return name


def line_writer(name: str) -> LineWriter:
    """The writer of one of `LINE_FORMATS`.

    Raises:
        OptionsError: there is no such format, or it is one of a file a photo.
    """
    if name == "html":
        from caption_rt import gallery  # a page of text that the other formats do not need

        return LineWriter(gallery.HEADER, gallery.figure, needs_thumbnail=True)
    if name in _WRITERS:
        return _WRITERS[name]
    if name in SIDECAR_FORMATS:
        raise OptionsError(f"the format {name} is a file beside each photo, not one output")
    raise OptionsError(f"there is no format {printable(name)!r}: it is one of {', '.join(FORMATS)}")


def _json_line(record: Record) -> bytes:
    # Escaped to ASCII, so that every name, decodable or not, survives every terminal and pipe.
    return json.dumps(record.to_dict()).encode("ascii") + b"\n"


def _text_line(record: Record) -> bytes:
    if isinstance(record.result, CaptionError):
        return b""
    return f"{_name(record.path)}\t{printable(record.result.text)}\n".encode()


def _csv_line(record: Record) -> bytes:
    return _csv_row(_row(record))


def _csv_row(values: tuple[str, ...]) -> bytes:
    # Quoted as RFC 4180 says. Its line ends, CR LF, would leave a CR in the last column of every other tool.
    import csv
    import io

    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue().encode()


def _tsv_line(record: Record) -> bytes:
    return _tsv_row(_row(record))


def _tsv_row(values: tuple[str, ...]) -> bytes:
    return ("\t".join(values) + "\n").encode()


def _row(record: Record) -> tuple[str, ...]:
    """The values of `_COLUMNS`, without line breaks, tabs and what UTF-8 lacks."""
    result = record.result
    if isinstance(result, CaptionError):
        values = "error", "", "", "", "", "", "", type(result).__name__, _no_formula(str(result))
    else:
        values = (
            "ok",
            result.text,
            repr(result.log_prob),
            result.ended,
            result.strategy,
            result.provider,
            result.precision,
            "",
            "",
        )
    return _no_formula(_name(record.path)), *map(printable, values)


def _name(path: str) -> str:
    """A path as it is, or as a JSON string where it could not stand in a line, or begins as such a string does.

    What begins with a quotation mark is therefore always JSON, and every path can be turned back.
    """
    return json.dumps(path) if path.startswith('"') or printable(path) != path else path


def _no_formula(text: str) -> str:
    """A text that begins with a path, not as a spreadsheet's formula does: `./=1+1.jpg` is the same file.

    Which texts these are: https://owasp.org/www-community/attacks/CSV_Injection. Standard input is called "-".
    """
    return f"./{text}" if text[:1] in ("=", "+", "-", "@") and text != "-" else text


_WRITERS = {
    "jsonl": LineWriter(b"", _json_line),
    "csv": LineWriter((",".join(_COLUMNS) + "\n").encode(), _csv_line),
    "tsv": LineWriter(_tsv_row(_COLUMNS), _tsv_line),
    "text": LineWriter(b"", _text_line),
}

"""Captions of one's own: CSV (also with tabs or semicolons) and JSON lines.

A row has a photo's path within the folder of photos, one caption or several, and perhaps the part that it belongs to.
The columns, or keys, are known by their names; see `docs/data.md`.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from caption_train.caption_text import parse_json, part_name, photo_name, read_text, records_of, text_lines
from caption_train.captioned import CaptionFile, Part
from caption_train.errors import DatasetError

TABLES = ("captions.csv", "captions.tsv", "captions.txt", "captions.jsonl", "metadata.csv", "metadata.jsonl")
"""Names of such files that are found in a folder."""

_IMAGE = ("image", "photo", "image_name", "file_name", "filename", "path", "filepath")
_CAPTION = re.compile(r"captions?(?:_?\d+)?|comment|text|sentence")
_SPLIT = ("split", "part")
_FOLDERS = (".", "images", "Images")
_DELIMITERS = ",\t;"
_LIST_BEGINS = re.compile(r"""\s*\[\s*["']""")
_PYTHON_TEXT = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
# With the commas, which NumPy leaves out: Python would join such texts to one.
_PYTHON_LIST = re.compile(rf"\s*\[\s*{_PYTHON_TEXT}(?:\s*,\s*{_PYTHON_TEXT})*\s*\]\s*", re.DOTALL)
_PHOTO = re.compile(r".+\.\w{3,5}")

_Row = tuple[str, str, list[str], str | None]
"""Where it stands, path, captions, split."""


def read_table(path: Path) -> CaptionFile:
    """Read CSV or JSON lines, one row a caption or one row a photo.

    Args:
        path: The file; the ending ``.jsonl`` or ``.ndjson`` makes it JSON lines.

    Returns:
        What it says.

    Raises:
        DatasetError: A row is malformed, with its line; a photo is put into two parts.
    """
    text = read_text(path)
    rows = _json_rows(path, text) if path.suffix.lower() in (".jsonl", ".ndjson") else _csv_rows(path, text)
    captions: dict[str, list[str]] = {}
    parts: dict[str, Part] = {}
    for where, given, texts, split in rows:
        name = photo_name(given, where)
        if split is not None:
            part = part_name(split, where)
            if parts.setdefault(name, part) != part:
                raise DatasetError(f"{where}: {name} is put into {part}, and was in {parts[name]} before")
        captions.setdefault(name, []).extend(texts)
    stem = path.stem if path.stem not in ("captions", "metadata") else path.resolve().parent.name
    return CaptionFile(stem, path, records_of(captions, parts), (path.parent,), _FOLDERS)


def _csv_rows(path: Path, text: str) -> Iterator[_Row]:
    first = next((line for _, line in text_lines(text)), "")
    delimiter = next((mark for mark in _DELIMITERS if _columns(_cells(first, mark)) is not None), None)
    columns = _columns(_cells(first, delimiter)) if delimiter else None
    headed = columns is not None
    if columns is None:
        # Without a header: a photo and a caption.
        delimiter = next((m for m in _DELIMITERS if len(c := _cells(first, m)) == 2 and _PHOTO.fullmatch(c[0])), None)
        columns = 0, [1], None
    if delimiter is None:
        raise DatasetError(
            f"{path}, line 1: expected a header such as image,caption or image,caption,split, found {first[:60]!r}"
        )
    image, wordings, split = columns
    width = len(_cells(first, delimiter))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    start = 1
    try:
        for cells in reader:
            where, start = f"{path}, line {start}", reader.line_num + 1
            blank = not any(cell.strip() for cell in cells)
            if blank or headed:
                headed = headed and blank
                continue
            if len(cells) != width:
                raise DatasetError(
                    f"{where}: expected {width} columns, found {len(cells)}; put captions that hold "
                    f"{delimiter!r} between double quotes"
                )
            texts = [caption for index in wordings for caption in _captions_of(cells[index], where)]
            yield where, cells[image], texts, None if split is None else cells[split]
    except csv.Error as exc:
        raise DatasetError(f"{path}, line {start}: this is not CSV: {exc}") from exc


def _cells(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True), [])
    except csv.Error:
        return []


def _columns(cells: Sequence[str]) -> tuple[int, list[int], int | None] | None:
    """The columns of photo, captions and split by their names; None where this is no header."""
    names = [cell.strip().lower() for cell in cells]
    image = next((names.index(name) for name in _IMAGE if name in names), None)
    wordings = [index for index, name in enumerate(names) if _CAPTION.fullmatch(name)]
    if image is None or not wordings:
        return None
    return image, wordings, next((names.index(name) for name in _SPLIT if name in names), None)


def _captions_of(cell: str, where: str) -> list[str]:
    """A cell of captions: one, or a list of several as JSON or, which is what pandas writes, as Python has it."""
    if not _LIST_BEGINS.match(cell):
        return [cell]
    try:
        captions = json.loads(cell)
    except (ValueError, RecursionError):
        captions = _python_list(cell)
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise DatasetError(
            f'{where}: expected a list of captions such as ["A dog.", "A dog runs."], found {cell[:60]!r}'
        )
    return captions


def _python_list(cell: str) -> list[str] | None:
    try:
        return list(ast.literal_eval(cell.strip())) if _PYTHON_LIST.fullmatch(cell) else None
    except (ValueError, SyntaxError):  # an escape that there is not
        return None


def _json_rows(path: Path, text: str) -> Iterator[_Row]:
    for number, line in text_lines(text):
        where = f"{path}, line {number}"
        record = parse_json(line, where)
        columns = _columns(list(record)) if isinstance(record, dict) else None
        if columns is None:
            raise DatasetError(
                f'{where}: expected an object such as {{"image": "a.jpg", "caption": "A dog."}}, found {line[:60]!r}'
            )
        image, wordings, split = columns
        values = list(record.values())
        texts: list[str] = []
        for value in (values[index] for index in wordings):
            texts += value if isinstance(value, list) else [value]
        given = [values[image], *texts, *([] if split is None else [values[split]])]
        if not all(isinstance(value, str) for value in given):
            raise DatasetError(f"{where}: photo, captions and split have to be texts, found {line[:60]!r}")
        yield where, values[image], texts, None if split is None else values[split]

"""What all readers of caption files share: text with line numbers, JSON with checked fields, names of photos."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

from caption_train.captioned import Part, Record
from caption_train.errors import DatasetError

T = TypeVar("T")

_PARTS: dict[str, Part] = {
    "train": "train",
    "training": "train",
    # Karpathy's split of MS-COCO: what is left of the validation photos, which everybody trains on.
    "restval": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


_BARE_NAME = re.compile(r"\w[\w.\- ]*")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises:
        DatasetError: The file cannot be read, or is not UTF-8 text; with the line.
    """
    try:
        content = path.read_bytes()
    except OSError as exc:
        raise DatasetError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = content.count(b"\n", 0, exc.start) + 1
        raise DatasetError(f"{path}, line {line}: this is not UTF-8 text") from exc


def text_lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines of a text that are not blank, without their ends, with their numbers from 1."""
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also split within captions
        if line.strip():
            yield number, line.rstrip("\r")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DatasetError: The file cannot be read, or is not JSON; with the line.
    """
    return parse_json(read_text(path), str(path))


def parse_json(text: str, where: str) -> Any:
    """The content of a JSON text; `where` is what the error names.

    Raises:
        DatasetError: It is not JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as exc:
        line = f", line {exc.lineno}" if exc.lineno > 1 or ", line" not in where else ""
        raise DatasetError(f"{where}{line}: this is not JSON: {exc.msg}") from exc
    except (RecursionError, ValueError) as exc:  # thousands of brackets, or of digits
        raise DatasetError(f"{where}: this is no JSON of captions: {exc}") from exc


def field(record: object, name: str, kind: type[T], where: str) -> T:
    """A field of a JSON object that has to be there, of a kind.

    Raises:
        DatasetError: It is not.
    """
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise DatasetError(f"{where}: {name!r} is missing or not of type {kind.__name__}")
    return value


def photo_name(name: str, where: str) -> str:
    """A photo's path within its folder, checked: a caption file has no say over what lies elsewhere.

    Args:
        name: As the caption file has it.
        where: What the error names.

    Returns:
        The path, with "/" between folders.

    Raises:
        DatasetError: It is empty, absolute, or leads out of the folder.
    """
    if _BARE_NAME.fullmatch(name):  # nearly all are; the rest of this takes as long as reading the file
        return name
    path, windows = PurePosixPath(name), PureWindowsPath(name)
    if not name.strip() or "\0" in name or not path.name:
        raise DatasetError(f"{where}: {name!r} is no file name of a photo")
    if path.is_absolute() or windows.anchor or ".." in (*path.parts, *windows.parts):
        raise DatasetError(
            f"{where}: {name!r} leads out of the folder of photos; give a path within it, and the folder with --images"
        )
    return path.as_posix()


def part_name(name: str, where: str) -> Part:
    """The part that a data set's own word for it means.

    Raises:
        DatasetError: The word is not known.
    """
    part = _PARTS.get(name.strip().lower())
    if part is None:
        raise DatasetError(f"{where}: the split {name[:40]!r} is not known; the words are {', '.join(_PARTS)}")
    return part


def records_of(captions: Mapping[str, Iterable[str]], parts: Mapping[str, Part] | None = None) -> tuple[Record, ...]:
    """Records of captions by photo, each with its part where `parts` has one."""
    known = parts or {}
    return tuple(
        Record(name, tuple(text.strip() for text in texts), known.get(name)) for name, texts in captions.items()
    )

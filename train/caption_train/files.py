"""Small files that a training run leaves: logs that survive a kill, and JSON written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from caption_rt.errors import CaptionError
from caption_train.errors import TrainingError

if sys.platform != "win32":
    import fcntl


def append_json_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one record to a JSON-lines file and wait until the disk has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file; a torn last line, which a kill leaves, is left out. A missing file has no records.

    Raises:
        TrainingError: The file cannot be read, or a whole line is not a JSON object.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as exc:
        raise TrainingError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    records = []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
        except ValueError as exc:
            raise TrainingError(f"{path}, line {number}: this is not JSON: {exc}") from exc
        if not isinstance(record, dict):
            raise TrainingError(f"{path}, line {number}: this is not a JSON object")
        records.append(record)
    return records


def rewrite_json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replace a JSON-lines file by these records, whole or not at all."""
    _replace(path, "".join(json.dumps(record) + "\n" for record in records))


def write_json(path: Path, content: Any) -> None:
    """Write JSON to a temporary name in the same folder, then put it in place."""
    _replace(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text to a temporary name in the same folder, then put it in place."""
    _replace(path, text)


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote: a JSON object.

    Raises:
        TrainingError: The file is not there, or is not one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise TrainingError(f"{path.parent} is no run folder: it has no {path.name}") from exc
    except (OSError, ValueError) as exc:
        raise TrainingError(f"{path} cannot be read: {exc}") from exc
    if not isinstance(content, dict):
        raise TrainingError(f"{path} cannot be read: it is not a JSON object")
    return content


@contextlib.contextmanager
def one_process(lock: Path, busy: CaptionError) -> Iterator[None]:
    """Hold the right to write, which ends with the process; on Windows nothing is held.

    Args:
        lock: A file, made where there is none, which stays.
        busy: What is raised where another process holds it.

    Raises:
        CaptionError: `busy`.
        OSError: The file cannot be made.
    """
    with lock.open("wb") as file:
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as exc:
                raise busy from exc
        yield


def refuse_other_options(
    folder: Path, before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]
) -> None:
    """See that a run goes on as it was begun.

    Args:
        folder: The run's, for the sentence.
        before: Parts (such as "training") to options by name, as they were written down when the run began.
        now: Those of this call; what is not in it is not compared.

    Raises:
        TrainingError: An option has another value now.
    """
    for part, options in now.items():
        begun = before.get(part, {})
        for name, value in options.items():
            if begun.get(name) != value:
                raise TrainingError(
                    f"{folder} was begun with another {part}: {name} was {begun.get(name)!r} and is now {value!r}; "
                    "give the same options to go on, or another folder to begin anew"
                )


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise

"""Zip archives of unknown origin, unpacked file by file so that it can be interrupted, and into their folder only.

Every file is written under another name and put in place once its CRC-32 has been found right, so that a file under its
own name is whole. What a killed process has unpacked is looked at by size and CRC-32 and kept.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from caption_train.caption_text import photo_name
from caption_train.errors import DatasetError

_CHUNK = 2**20
_MOST_FILES = 1_000_000
_LARGEST_RATIO = 100  # captions as JSON shrink to a fifth, photos hardly; a bomb to a thousandth


def contents(archive: Path, pattern: str) -> list[zipfile.ZipInfo]:
    """What of an archive is to be unpacked, after a look at all that is in it.

    Args:
        archive: A zip file.
        pattern: Of the names that are wanted, such as ``train2014/*.jpg``; what else is in it is left out.

    Returns:
        The files' entries.

    Raises:
        DatasetError: It is no zip file or is damaged, has none of these files, an entry leads out of the folder, is a
            link or encrypted, two have one name, or it would grow beyond all measure.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            entries = file.infolist()
    # RuntimeError: packed in a way that it does not know.
    except (zipfile.BadZipFile, EOFError, ValueError, RuntimeError) as exc:
        raise DatasetError(f"{archive} is no zip file, or damaged ({exc}): delete it to have it fetched again") from exc
    except OSError as exc:
        raise DatasetError(f"{archive} cannot be read ({exc.strerror or exc}): check its permissions") from exc
    if len(entries) > _MOST_FILES:
        raise DatasetError(f"{archive} has {len(entries):,} entries, and at most {_MOST_FILES:,} are unpacked")
    for entry in entries:
        _check(archive, entry)
    wanted = [entry for entry in entries if not entry.is_dir() and _matches(entry.filename, pattern)]
    if not wanted:
        raise DatasetError(f"{archive} holds no files of the name {pattern}: look whether the address is right")
    if len({entry.filename.lower() for entry in wanted}) < len(wanted):
        raise DatasetError(f"{archive} holds two files of one name")
    unpacked = sum(entry.file_size for entry in wanted)
    if unpacked > _LARGEST_RATIO * archive.stat().st_size:
        raise DatasetError(
            f"{archive} would grow from {archive.stat().st_size:,} to {unpacked:,} bytes: it is a decompression bomb"
        )
    return wanted


def unpack(
    archive: Path, folder: Path, pattern: str, on_bytes: Callable[[int], None] = lambda count: None
) -> tuple[int, int]:
    """Unpack what of an archive is wanted; what is there already, and whole, is kept.

    Args:
        archive: A zip file.
        folder: Where its paths begin.
        pattern: As in `contents`.
        on_bytes: Called with the number of bytes that have just been unpacked or found.

    Returns:
        The number of files, and their bytes.

    Raises:
        DatasetError: As in `contents`; or an entry is damaged, or the disk full.
    """
    entries = contents(archive, pattern)
    with zipfile.ZipFile(archive) as file:
        for entry in entries:
            target = folder / entry.filename
            if not _is_whole(target, entry):
                _unpack_one(archive, file, entry, target)
            on_bytes(entry.file_size)
    if hasattr(os, "sync"):
        os.sync()  # before anybody deletes the archive
    return len(entries), sum(entry.file_size for entry in entries)


def _matches(name: str, pattern: str) -> bool:
    """Whether a path is of a pattern, part by part as in `Path.glob`, which counts what was unpacked."""
    parts, patterns = PurePosixPath(name).parts, PurePosixPath(pattern).parts
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def _check(archive: Path, entry: zipfile.ZipInfo) -> None:
    where = f"{archive}, entry {entry.orig_filename!r}"
    if entry.orig_filename != entry.filename or "\\" in entry.filename:  # zipfile cuts names at a zero byte
        raise DatasetError(f"{where}: this is no file name")
    try:
        photo_name(entry.filename, where)
    except DatasetError as exc:
        raise DatasetError(f"{where}: it leads out of the folder; the archive is not to be trusted") from exc
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise DatasetError(f"{where}: it is a link or a device, and only files are unpacked")
    if entry.flag_bits & 1:
        raise DatasetError(f"{where}: it is encrypted")


def _unpack_one(archive: Path, file: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as written:
            for chunk in _content(archive, file, entry):
                written.write(chunk)
        os.replace(temporary, target)
    except DatasetError:
        _drop(temporary)
        raise
    except OSError as exc:
        _drop(temporary)
        raise DatasetError(
            f"{target} cannot be written ({exc.strerror or exc}): make room, and give the same command again to go on"
        ) from exc


def _content(archive: Path, file: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[bytes]:
    """A file of an archive, in pieces."""
    size = 0
    try:
        with file.open(entry) as source:
            while chunk := source.read(_CHUNK):
                size += len(chunk)
                yield chunk
        if size != entry.file_size:
            raise zipfile.BadZipFile("it is shorter than the archive says")
    except Exception as exc:  # every compression has its own for damage, bzip2 even an OSError
        raise DatasetError(
            f"{archive}: {entry.filename} is damaged ({exc}): delete the archive to have it fetched again"
        ) from exc


def _drop(temporary: Path) -> None:
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)


def _is_whole(target: Path, entry: zipfile.ZipInfo) -> bool:
    try:
        if target.stat().st_size != entry.file_size:
            return False
        crc = 0
        with target.open("rb") as file:
            while chunk := file.read(_CHUNK):
                crc = zlib.crc32(chunk, crc)
        return crc == entry.CRC
    except OSError:
        return False

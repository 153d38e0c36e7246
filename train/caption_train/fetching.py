"""Published data sets, fetched: which archives, what is there already, and one after the other to their files.

For each archive: download (`caption_train.download`), SHA-256 and size, unpacking (`caption_train.unpacking`), and then
the archive is deleted. ``fetched.json`` in the folder says what is done, and the SHA-256 of what was fetched.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tomllib
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from caption_train.caption_text import photo_name, read_json, read_text
from caption_train.download import arrived, download, size_at
from caption_train.errors import DatasetError
from caption_train.files import one_process, write_json
from caption_train.unpacking import contents, unpack

logger = logging.getLogger(__name__)

LEDGER = "fetched.json"

Progress = Callable[[str, int, int], AbstractContextManager[Callable[[int], None]]]
"""A label, the bytes in all and those done to a bar; yields what moves it on by a number of bytes."""


@dataclass(frozen=True)
class Archive:
    """One archive of a data set."""

    address: str
    """Where it is, http or https."""
    files: str
    """Pattern of the files in it that are wanted, such as ``train2014/*.jpg``."""
    bytes: int | None = None
    """Its size; None where nobody knows it beforehand."""
    sha256: str | None = None
    """Of the archive, hexadecimal; None where nobody published it."""

    @property
    def name(self) -> str:
        """Its file name."""
        return Path(urllib.parse.urlsplit(self.address).path).name


@dataclass(frozen=True)
class Job:
    """What is to be done about one archive."""

    archive: Archive
    size: int | None
    """Bytes of the archive, as far as known."""
    held: int
    """Bytes of it that are here."""
    unpacked: int
    """Bytes of its files that are here."""


def read_archives(
    name: str, edition: str, parts: Sequence[str], *, addresses: Path | None = None, mirror: str | None = None
) -> list[Archive]:
    """Read which archives make a data set.

    Args:
        name: The set, such as "coco".
        edition: Which of it, such as "2014".
        parts: Which archives, such as "train".
        addresses: A TOML file like the package's ``archives/coco.toml``; None for that one.
        mirror: An address to take the place of the file's ``base``.

    Returns:
        The archives, in the order of `parts`.

    Raises:
        DatasetError: The file cannot be read, or says nothing of such an edition or part, or is malformed.
    """
    if addresses is None:
        where, text = (
            f"{name}.toml",
            (resources.files("caption_train") / "archives" / f"{name}.toml").read_text("utf-8"),
        )
    else:
        where, text = str(addresses), read_text(addresses)
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise DatasetError(f"{where}: this is not TOML: {exc}") from exc
    base = mirror or content.get("base", "")
    tables = content.get(edition)
    archives = []
    for part in parts:
        table = tables.get(part) if isinstance(tables, dict) else None
        if not isinstance(table, dict):
            raise DatasetError(f"{where} says nothing of [{edition}.{part}]")
        archives.append(_archive(table, str(base), f"{where}, [{edition}.{part}]"))
    return archives


def _archive(table: Mapping[str, Any], base: str, where: str) -> Archive:
    kinds: dict[str, type] = {"address": str, "files": str, "bytes": int, "sha256": str}
    for key, value in table.items():
        if key not in kinds or not isinstance(value, kinds[key]):
            raise DatasetError(f"{where}: {key} = {value!r} is not understood")
    for key in ("address", "files"):
        if key not in table:
            raise DatasetError(f"{where}: {key} is missing")
    photo_name(table["files"], where)
    # Like a folder, whether or not it ends with a slash.
    try:
        address = urllib.parse.urljoin(f"{base.rstrip('/')}/", table["address"])
        parts = urllib.parse.urlsplit(address)
    except ValueError as exc:
        raise DatasetError(f"{where}: {table['address']} at {base} is no http or https address ({exc})") from exc
    archive = Archive(address, table["files"], table.get("bytes"), (table.get("sha256") or "").lower() or None)
    if parts.scheme not in ("http", "https") or not parts.hostname or not archive.name:
        raise DatasetError(f"{where}: {address} is no http or https address of a file")
    return archive


def plan(archives: Sequence[Archive], folder: Path) -> list[Job]:
    """Find out what is left to do.

    Args:
        archives: Those that are wanted.
        folder: Where they are to go; it may not exist yet.

    Returns:
        A job for each archive that is not done.

    Raises:
        DatasetError: The folder's ``fetched.json`` cannot be read.
    """
    ledger = _read_ledger(folder)
    jobs = []
    for archive in archives:
        if _is_done(archive, folder, ledger):
            continue
        if "unpacked" in ledger.get(archive.name, {}):
            logger.warning("%s: files of %s are gone or changed since they were unpacked", folder, archive.name)
        path = folder / archive.name
        held = path.stat().st_size if path.exists() else arrived(archive.address, path)
        unpacked = _unpacked(folder, archive.files)[1]
        jobs.append(Job(archive, archive.bytes or size_at(archive.address), held, unpacked))
    return jobs


def space_needed(jobs: Sequence[Job], *, keep_archives: bool) -> int:
    """Bytes that the jobs will need on the disk at their most, beyond what lies there now.

    Of photos a zip file is about as large as what is in it, and of the annotations only a part is unpacked.
    """
    kept = most = 0
    for job in jobs:
        download_left = max(0, (job.size or 0) - job.held)
        unpack_left = max(0, (job.size or 0) - job.unpacked)
        most = max(most, kept + download_left + unpack_left)
        kept += unpack_left + (download_left if keep_archives else 0)
    return most


def check_space(jobs: Sequence[Job], folder: Path, *, keep_archives: bool) -> tuple[int, int]:
    """Look whether the disk is large enough.

    Returns:
        Bytes needed, and bytes free.

    Raises:
        DatasetError: It is not.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    needed, free = space_needed(jobs, keep_archives=keep_archives), shutil.disk_usage(there).free
    if needed > free:
        raise DatasetError(
            f"{needed / 1e9:,.1f} GB are needed, and {folder} has {free / 1e9:,.1f} GB free: make room, or choose "
            "another folder"
        )
    return needed, free


def fetch(jobs: Sequence[Job], folder: Path, progress: Progress, *, keep_archives: bool = False) -> None:
    """Do the jobs, one after the other. Killed at any moment, the next call goes on.

    Args:
        jobs: From `plan`.
        folder: Where the files go.
        progress: Shows how far it is.
        keep_archives: Whether an archive stays once it is unpacked.

    Raises:
        DatasetError: An archive cannot be fetched, is not what it should be, or cannot be unpacked; another process is
            fetching into the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with one_process(
            folder / ".fetch.lock", DatasetError(f"another process is fetching into {folder}; wait for it")
        ):
            for job in jobs:
                _fetch_one(job, folder, progress, keep_archives)
    except OSError as exc:
        raise DatasetError(f"{exc.filename or folder} cannot be used: {exc.strerror or exc}") from exc


def _fetch_one(job: Job, folder: Path, progress: Progress, keep_archives: bool) -> None:
    archive, path = job.archive, folder / job.archive.name
    ledger = _read_ledger(folder)
    if _is_done(archive, folder, ledger):  # by another process, since the plan was made
        return
    entry = ledger.setdefault(archive.name, {})
    if path.exists():
        digest = _sha256(path, progress)
        _check(archive, path, digest, entry, remedy=f"delete {path} to have it fetched again")
    else:
        logger.info("fetching %s", archive.address)
        with progress(archive.name, job.size or 0, job.held) as advance:
            part = download(archive.address, path, expected_bytes=archive.bytes, on_bytes=advance)
        digest = _sha256(part, progress)
        try:
            _check(archive, part, digest, entry, remedy="it was deleted; give the same command again to fetch it anew")
        except DatasetError:
            part.unlink()
            raise
        entry |= {"address": archive.address, "bytes": part.stat().st_size, "sha256": digest}
        entry.pop("unpacked", None)
        write_json(folder / LEDGER, ledger)
        os.replace(part, path)
        part.with_suffix(".part.json").unlink(missing_ok=True)
    wanted = sum(member.file_size for member in contents(path, archive.files))
    missing, free = wanted - _unpacked(folder, archive.files)[1], shutil.disk_usage(folder).free
    if missing > free:
        raise DatasetError(
            f"unpacking {path} takes {missing / 1e9:,.1f} GB more, and {folder} has {free / 1e9:,.1f} GB free: make "
            "room, and give the same command again to go on"
        )
    with progress(f"unpacking {archive.name}", wanted, 0) as advance:
        files, size = unpack(path, folder, archive.files, advance)
    # An archive that was fetched, now or by a call that was stopped, has not been unpacked before. Another one was put
    # there by somebody, and is theirs.
    fetched = "address" in entry and "unpacked" not in entry
    entry["unpacked"] = {"files": files, "bytes": size}
    write_json(folder / LEDGER, ledger)
    logger.info("%s: %d files in %s", archive.name, files, folder / Path(archive.files).parent)
    if fetched and not keep_archives:
        path.unlink()


def _check(archive: Archive, path: Path, digest: str, entry: Mapping[str, Any], *, remedy: str) -> None:
    """Hold a file against what is known of the archive, from others or from the first download."""
    size = path.stat().st_size
    if archive.bytes is not None and size != archive.bytes:
        raise DatasetError(f"{archive.name} has {size:,} bytes, and {archive.bytes:,} are expected: {remedy}")
    if archive.sha256 is not None and digest != archive.sha256:
        raise DatasetError(f"{archive.name} is damaged, its SHA-256 is {digest} and not {archive.sha256}: {remedy}")
    before = entry.get("sha256")
    if archive.sha256 is None and before is not None and digest != before:
        raise DatasetError(
            f"{archive.name} is another file than the one that was fetched before, its SHA-256 is {digest} and was "
            f"{before}: {remedy}, or delete {LEDGER} if that is how it should be"
        )


def _sha256(path: Path, progress: Progress) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file, progress(f"checking {path.name}", path.stat().st_size, 0) as advance:
        while chunk := file.read(2**22):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def _unpacked(folder: Path, pattern: str) -> tuple[int, int]:
    """How many files of a pattern are in a folder, and their bytes."""
    sizes = [path.stat().st_size for path in folder.glob(pattern)]
    return len(sizes), sum(sizes)


def _is_done(archive: Archive, folder: Path, ledger: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether all that was unpacked is there; files that somebody put beside it do no harm."""
    done = ledger.get(archive.name, {}).get("unpacked")
    if done is None:
        return False
    files, size = _unpacked(folder, archive.files)
    return bool(files >= done["files"] and size >= done["bytes"])


def _read_ledger(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / LEDGER
    if not path.exists():
        return {}
    remedy = "delete it, and what it says is done is fetched again"
    try:
        ledger = read_json(path)
    except DatasetError as exc:
        raise DatasetError(f"{exc}: {remedy}") from exc
    if not isinstance(ledger, dict) or not all(map(_is_entry, ledger.values())):
        raise DatasetError(f"{path} is damaged: {remedy}")
    return ledger


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict):
        return False
    done = entry.get("unpacked", {"files": 0, "bytes": 0})
    return isinstance(done, dict) and all(isinstance(done.get(name), int) for name in ("files", "bytes"))

"""A file beside each photo, with a ledger of which of them are ours."""

import contextlib
import errno
import os
import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from caption_rt._sniff import PHOTO_SUFFIXES
from caption_rt.errors import CaptionError, OptionsError, Parameter, printable, remedy_of, shown
from caption_rt.ledger import SIDECARS, DamagedLedger, Ledger, Row, key_of
from caption_rt.outputs import Entry, Known, RunKey, digest_of
from caption_rt.sidecars import namesakes, sidecar_bytes, sidecar_path
from caption_rt.sources import Source

__all__ = ["SidecarOutput", "sidecar_ledger"]

# What is wrong with one folder or name rather than with the disk.
_ITS_OWN = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EROFS)


def sidecar_ledger(arguments: Sequence[str], shard: tuple[int, int] | None) -> Path:
    """Where the ledger of a run's sidecars is unless told: in the first folder that is named, else in the current one.

    Args:
        arguments: what is to be captioned.
        shard: the part of the photos; each has a ledger of its own, because machines that share a folder work at once.
    """
    folder = next((argument for argument in arguments if os.path.isdir(argument)), ".")
    part = "" if shard is None else f".{shard[0]}-of-{shard[1]}"
    return Path(folder, f".caption-rt{part}.ledger")


class SidecarOutput:
    """Sidecars, each written to a temporary file and put in its place; see `caption_rt.sidecars`.

    A batch of records is committed to the ledger before its sidecars are written; what a run that was ended between the
    two left out is written when the next one begins. A sidecar is ours while it holds, to the byte, what the ledger
    says.

    ``existing`` decides what happens where a photo has a sidecar already:

    - "resume": one of ours is replaced if photo, bundle or options changed; any other stays as it is.
    - "skip": it stays as it is, whoever wrote it, and the photo is not read.
    - "append": the caption is added to it, unless that was done before.
    - "overwrite": the caption takes the place of what it says, unless that was done before.

    A sidecar of ours that is gone is written again. A sidecar whose photo is gone or damaged stays. One that cannot be
    read or written by itself costs one record; a disk that is full ends the run.
    """

    def __init__(self, path: Path, format_name: str, existing: str, key: RunKey) -> None:
        """Open the ledger, and write what the last run left out.

        Args:
            path: the ledger; see `sidecar_ledger`.
            format_name: one of `caption_rt.writers.SIDECAR_FORMATS`.
            existing: one of `caption_rt.outputs.EXISTING`.
            key: what records depend on.

        Raises:
            CaptionError: the ledger cannot be read or written, or another process has it.
        """
        self._format = format_name
        self._existing = existing
        self._key = key
        self._folder = Path(os.path.abspath(path)).parent
        self._namesakes = lru_cache(maxsize=256)(_namesakes)
        try:
            self._ledger = Ledger(path)
            try:
                self._take_up()
            except BaseException:
                self._ledger.close()
                raise
        except DamagedLedger as exc:
            raise CaptionError(
                f"the ledger {printable(path)} is damaged: delete it; sidecars that are there then count as not ours"
            ) from exc

    def known(self, source: Source) -> Known | None:
        """What is there of a photo; see `caption_rt.outputs.Output`."""
        if _without_place(source):
            return None
        path = self._path_of(source)
        row = self._ledger.find(self._key_of(path))
        there = os.path.exists(path)
        if there and (self._existing == "skip" or (row is None and self._existing == "resume")):
            return Known(left=True, unread=True)
        if row is None:
            return None
        same = row.options == (self._key.caption if row.error is None else self._key.error)
        if not row.line:  # an error, or a caption of no word
            return Known(row.digest, row.error) if same else None
        return self._known_sidecar(path, row, same)

    def write(self, entries: Sequence[Entry]) -> list[Entry]:
        """Write records; see `caption_rt.outputs.Output`."""
        waiting: list[tuple[int, Path, bytes]] = []
        results = list(entries)
        with self._ledger.transaction():
            self._ledger.settle()
            for place, entry in enumerate(entries):
                try:
                    found = self._record(entry)
                except CaptionError as exc:
                    results[place] = entry.failed(exc)
                    continue
                if found is not None:
                    waiting.append((place, *found))
        for place, path, data in waiting:
            error = _replace(path, data)
            if error is not None:
                results[place] = entries[place].failed(error)
        return results

    def finish(self) -> None:
        """State that all photos are done; see `caption_rt.outputs.Output`."""
        with self._ledger.transaction():
            self._ledger.settle()
            self._ledger.forget_stale()

    def close(self) -> None:
        """Give the ledger back."""
        self._ledger.close()

    def _take_up(self) -> None:
        if self._ledger.fact("format", SIDECARS) != SIDECARS:
            raise OptionsError(
                f"the ledger {printable(self._ledger.path)} is that of an output file: name another with ",
                Parameter("ledger"),
            )
        self._settle()
        with self._ledger.transaction():
            self._ledger.set_facts(format=SIDECARS)

    def _settle(self) -> None:
        """Write the sidecars that the last run committed to and did not come to write."""
        for row in self._ledger.unsettled():
            path = Path(self._folder, os.fsdecode(row.key))
            with contextlib.suppress(_Unreadable):
                current = _read(path)
                if (b"" if current is None else digest_of(current)) == row.before:
                    _replace(path, row.line or b"")
        with self._ledger.transaction():
            self._ledger.settle()

    def _known_sidecar(self, path: Path, row: Row, same: bool) -> Known | None:
        left = Known(left=True, unread=True)
        line = row.line or b""
        try:
            current = _read(path)
        except _Unreadable:
            return left
        if current is None:
            return Known(row.digest, restore=lambda: _replace(path, line)) if same else None
        if self._existing == "append":
            return Known(row.digest) if same else None
        if self._existing == "overwrite":
            return Known(row.digest) if same and current == line else None
        if current != line:  # somebody edited it
            return left
        if row.own:
            return Known(row.digest) if same else None
        return Known(row.digest, left=True) if same else left

    def _record(self, entry: Entry) -> tuple[Path, bytes] | None:
        """Put a record into the ledger; what its sidecar is to hold, if that is anything new.

        Raises:
            CaptionError: there is no sidecar that it could be written to.
        """
        if _without_place(entry.source):
            if entry.source.error is None:
                raise CaptionError(
                    f"{entry.source.name} has no place for a sidecar beside it: save it as a file first",
                    reason="has no place for a sidecar beside it",
                )
            return None
        path = self._path_of(entry.source)
        key, error = self._key_of(path), entry.error
        old = self._ledger.find(key)
        if error is not None:
            # A sidecar of ours stays known as ours: the photo may come back.
            if old is None or not old.line:
                self._ledger.put(Row(key, entry.digest, self._key.error, error, b""))
            return None
        current = _read(path)
        ours = old is not None and current is not None and old.line == current
        mode = self._existing
        if mode == "resume":  # `known` has left alone what is not ours, but for one that came just now
            mode = "overwrite" if ours else "skip"
        content = sidecar_bytes(self._format, entry.record, current, mode)
        own = current is None or mode == "overwrite" or (ours and old is not None and old.own)
        before = None if content is None else b"" if current is None else digest_of(current)
        line = content if content is not None else current or b""
        self._ledger.put(Row(key, entry.digest, self._key.caption, None, line, before, own))
        return None if content is None else (path, content)

    def _path_of(self, source: Source) -> Path:
        folder = os.path.dirname(source.path) or "."
        return sidecar_path(Path(source.path), self._format, self._namesakes(folder))

    def _key_of(self, path: Path) -> bytes:
        return key_of(os.fspath(path), self._folder)


class _Unreadable(CaptionError):
    """A sidecar that cannot be read."""


def _without_place(source: Source) -> bool:
    """Whether it is no photo in a folder."""
    return source.error is not None or source.data is not None or source.is_address


def _namesakes(folder: str) -> frozenset[str]:
    """The photos of a folder that could want the same sidecar."""
    try:
        with os.scandir(folder) as found:
            return namesakes(entry.name for entry in found if os.path.splitext(entry.name)[1].lower() in PHOTO_SUFFIXES)
    except OSError:  # the photos' own errors tell
        return frozenset()


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as exc:
        reason = printable(exc.strerror or exc)
        raise _Unreadable(
            f"the sidecar {shown(path)} cannot be read ({reason}): mend that, or move it away",
            reason=f"has a sidecar that cannot be read ({reason})",
        ) from exc


def _replace(path: Path, data: bytes) -> CaptionError | None:
    """Write a file to a temporary one beside it, and put it in its place.

    Returns:
        Why this file cannot be written, where others perhaps can.

    Raises:
        CaptionError: none can be written, as where the disk is full.
    """
    fresh = path.with_name(f".{path.name}.part")
    try:
        with fresh.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(OSError):
            shutil.copymode(path, fresh)
        os.replace(fresh, path)
    except OSError as exc:
        with contextlib.suppress(OSError):
            fresh.unlink()
        reason = printable(exc.strerror or exc)
        remedy = f"{remedy_of(exc) or 'mend that'}, and give the same command again to go on"
        if exc.errno == errno.EROFS:  # nor can another sidecar of it be
            remedy = "write one output elsewhere with -o"
        error = CaptionError(
            f"the sidecar {shown(path)} cannot be written ({reason}): {remedy}",
            reason=f"has a sidecar that cannot be written ({reason})",
        )
        if exc.errno in _ITS_OWN:
            return error
        raise error from exc
    return None

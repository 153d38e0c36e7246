"""One output file that survives anything, with its ledger."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from caption_rt.errors import CaptionError, OptionsError, printable, remedy_of
from caption_rt.ledger import SIDECARS, DamagedLedger, Ledger, NoLedger, Row, key_of
from caption_rt.output_place import check_output, ledger_path, not_ours, size_of, sync_folder
from caption_rt.outputs import Entry, Known, RunKey, digest_of
from caption_rt.sources import Source
from caption_rt.writers import LineWriter

__all__ = ["FileOutput"]

_CHUNK = 1 << 20
_BINARY = getattr(os, "O_BINARY", 0)  # of Windows


class FileOutput:
    """Lines of records in one file, and its ledger: beside it, the file's name and ``.ledger``, or elsewhere.

    A batch of records is committed to the ledger, then appended to the file in one piece and flushed to the disk. The
    file is therefore always the beginning of what the ledger says it should be. When an unfinished run is taken up, the
    file must agree with the ledger up to the last batch; what follows, perhaps half a line, is cut off, and what is
    missing is written again. Where a finished file is not what the ledger says, somebody edited it, and it is refused.

    A record whose photo, bundle or options changed is written anew at the end; when the run is finished, the file is
    written once more to a temporary file, with the new record in the old one's place, and replaced. Records of photos
    that are gone stay. A photo that could be read before and cannot be now (it is on a disk that is not there, say)
    keeps its record.

    ``existing`` decides what happens where the file exists:

    - "resume": go on. Photos that have their record are passed over. A file without a ledger is refused.
    - "skip": the same, but a photo that has a record of whatever content, bundle and options is not even read.
    - "append": the file stays as it is, whoever wrote it, and records are added; nothing is ever taken out of that
      part. Photos that have their record by the ledger are passed over.
    - "overwrite": file and ledger are made anew.
    """

    def __init__(
        self,
        path: Path,
        format_name: str,
        writer: LineWriter,
        existing: str,
        key: RunKey,
        ledger: Path | None = None,
    ) -> None:
        """Open the output and bring it in order.

        Args:
            path: the file.
            format_name: the name of the format.
            writer: the format.
            existing: one of `caption_rt.outputs.EXISTING`.
            key: what records depend on.
            ledger: where its ledger is; None for beside it.

        Raises:
            OptionsError: the file is not ours, was edited, or is of another format.
            CaptionError: it cannot be written, or another process writes it.
        """
        self._path = path
        self._name = printable(path)
        self._writer = writer
        self._existing = existing
        self._key = key
        self._folder = Path(os.path.abspath(path)).parent
        self._named_ledger = ledger is not None
        self._bad_folders: set[bytes] = set()
        check_output(path, existing, ledger)
        self._ledger = self._open_ledger(ledger)
        self._file = -1
        try:
            self._take_up(format_name)
            if self._fact("base") and not os.path.exists(self._path):
                raise OptionsError(
                    f"the output {self._name} is gone, and with it what others had written there before caption-rt "
                    "added to it: put it back, choose another, or --existing overwrite"
                )
            self._open_file()
            self._complete_file()
        except BaseException:
            self.close()
            raise

    def known(self, source: Source) -> Known | None:
        """What is there of a photo; see `caption_rt.outputs.Output`."""
        row = self._ledger.find(self._key_of(source))
        if row is None:
            return None
        if self._existing == "skip" and row.digest is not None:
            return Known(error=row.error, unread=True)
        wanted = self._key.error if row.error is not None else self._key.caption
        return Known(row.digest, row.error) if row.options == wanted else None

    def write(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        """Write records; see `caption_rt.outputs.Output`."""
        lines: list[bytes] = []
        with self._ledger.transaction():
            for entry in entries:
                line = self._record(entry)
                if line is not None:
                    lines.append(line)
            if lines:
                size = self._fact("size")
                self._ledger.set_facts(state="running", synced=size, size=size + sum(map(len, lines)))
        if lines:
            self._append(b"".join(lines))
        return entries

    def finish(self) -> None:
        """State that all photos are done; see `caption_rt.outputs.Output`."""
        with self._ledger.transaction():
            for key in [row.key for row in self._ledger.unread() if self._is_mended(row.key)]:
                self._ledger.retire(key)
        if self._ledger.has_stale():
            self._write_anew()
        elif self._ledger.fact("state") != "complete":
            with self._ledger.transaction():
                self._ledger.set_facts(state="complete", synced=self._fact("size"))

    def close(self) -> None:
        """Give file and ledger back; a run that was not finished can be taken up."""
        self._close_file()
        self._ledger.close()

    def _record(self, entry: Entry) -> bytes | None:
        """Put a record into the ledger; its line if the output is to have it."""
        key = self._key_of(entry.source)
        error = entry.error
        old = self._ledger.find(key)
        if entry.source.error is not None:
            self._bad_folders.add(key)
        if entry.digest is None and old is not None and old.error is None:
            return None
        line = self._writer.line(entry.record)
        row = Row(key, entry.digest, self._key.caption if error is None else self._key.error, error, line)
        if old is not None and row.digest is not None and (row.digest, row.options) == (old.digest, old.options):
            return None  # the same photo was named twice
        if old is not None and row.line == old.line:
            self._ledger.restate(row)
            return None
        self._ledger.put(row)
        return line

    def _is_mended(self, key: bytes) -> bool:
        """Whether it is a folder that could not be looked into, and now can: no photo's record would replace its."""
        path = os.path.join(self._folder, os.fsdecode(key))
        return key not in self._bad_folders and os.path.isdir(path) and os.access(path, os.R_OK | os.X_OK)

    def _key_of(self, source: Source) -> bytes:
        if source.data is not None:  # standard input holds another photo each time
            return b"-\0" + digest_of(source.data)
        if source.is_address:
            return os.fsencode(source.path)
        return key_of(source.path, self._folder)

    def _fact(self, name: str) -> int:
        value = self._ledger.fact(name, 0)
        assert isinstance(value, int)
        return value

    def _open_ledger(self, elsewhere: Path | None) -> Ledger:
        path = elsewhere or ledger_path(self._path)
        if self._existing in ("append", "overwrite"):
            try:
                ledger = Ledger(path)
                # What is damaged further inside shows when all of it is read.
                for _ in ledger.lines():
                    pass
                return ledger
            except DamagedLedger:
                path.unlink()
                path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
            except NoLedger:
                # What has the name of our ledger goes with the output; what was named itself may be anything.
                if elsewhere is not None or self._existing == "append":
                    raise
                path.unlink()
        return Ledger(path)

    def _take_up(self, format_name: str) -> None:
        """Make the ledger fit to the file that is there and to what is to happen to it."""
        ours = self._ledger.fact("format")
        assert not isinstance(ours, bytes)
        if ours == SIDECARS:
            raise OptionsError(f"the ledger {printable(self._ledger.path)} is that of sidecars: name another")
        output = self._ledger.fact("output", printable(self._path.name))
        if output != printable(self._path.name) and self._named_ledger:
            raise OptionsError(
                f"the ledger {printable(self._ledger.path)} is that of {printable(output)}, and not of {self._name}: "
                "name another"
            )
        if self._existing == "overwrite":
            if size_of(self._path):
                os.truncate(self._path, 0)
            self._start(format_name, base=0)
        elif ours is None:
            # A ledger that is there and empty: made just now, by a process that ended early, or by whoever named it.
            there = size_of(self._path)
            if there and self._existing != "append":
                raise not_ours(self._path)
            self._start(format_name, base=self._adopt() if there else 0)
        elif ours != format_name:
            raise OptionsError(
                f"the output {self._name} has the format {ours!s}, not {format_name}: choose another, or --existing "
                "overwrite"
            )
        elif self._existing == "append" and size_of(self._path):
            self._open_file()
            with contextlib.suppress(OptionsError):  # edited: it stays so
                self._complete_file()
            base = self._adopt()
            with self._ledger.transaction():
                self._ledger.forget_lines()
                self._ledger.set_facts(header=b"", base=base, size=base, synced=base, state="running")

    def _open_file(self) -> None:
        if self._file < 0:
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _BINARY, 0o666)

    def _close_file(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _start(self, format_name: str, base: int) -> None:
        """Begin a new output after the first `base` bytes of the file."""
        header = b"" if base else self._writer.header
        with self._ledger.transaction():
            self._ledger.forget_all()
            self._ledger.set_facts(
                format=format_name, header=header, base=base, size=base + len(header), synced=base, state="running"
            )
            self._ledger.set_facts(output=printable(self._path.name))

    def _adopt(self) -> int:
        """Make sure that lines can be added to the file; its size.

        Raises:
            OptionsError: it is not of the output's format.
        """
        header = self._writer.header
        with self._path.open("rb+") as file:
            if file.read(len(header)) != header:
                raise OptionsError(
                    f"the output {self._name} does not begin as this version of caption-rt begins such a file, so "
                    "nothing can be added to it: choose another"
                )
            end = file.seek(0, os.SEEK_END)
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.write(b"\n")
                end += 1
            return end

    def _expected(self) -> Iterator[bytes]:
        """The file by the ledger, after its first `base` bytes, in pieces."""
        header = self._ledger.fact("header", b"")
        assert isinstance(header, bytes)
        yield header
        yield from self._ledger.lines()

    def _complete_file(self) -> None:
        """Bring the file to what the ledger says.

        Raises:
            OptionsError: somebody else changed it.
        """
        base, size, synced = (self._fact(name) for name in ("base", "size", "synced"))
        there, state = size_of(self._path), self._ledger.fact("state")
        # The file was to be written anew: it is the old one or the new one.
        replaced = state == "replacing" and there == self._fact("new_size")
        if replaced and self._agreement(base, stale=False) == there:
            self._forget_stale(there)
            return
        agreed = self._agreement(base) if there >= base else -1
        if base == 0 and there == 0:
            agreed = 0
        elif agreed < min(there, synced) or there > size or (state == "complete" and there != size):
            raise OptionsError(
                f"the output {self._name} was changed since caption-rt wrote it: choose another, or --existing append "
                "or overwrite"
            )
        if agreed < there:
            os.truncate(self._path, agreed)
        self._write_from(agreed - base)

    def _agreement(self, base: int, *, stale: bool = True) -> int:
        """How many bytes of the file are as the ledger says."""
        agreed = base
        pieces = self._expected() if stale else self._lasting()
        with self._path.open("rb") as file:
            file.seek(base)
            for piece in pieces:
                found = file.read(len(piece))
                if found != piece:
                    return agreed + next(
                        (i for i, (a, b) in enumerate(zip(found, piece, strict=False)) if a != b), len(found)
                    )
                agreed += len(piece)
        return agreed

    def _lasting(self) -> Iterator[bytes]:
        """As `_expected`, but without what is stale."""
        header = self._ledger.fact("header", b"")
        assert isinstance(header, bytes)
        yield header
        yield from self._ledger.lines(stale=False)

    def _write_from(self, start: int) -> None:
        """Append what the ledger says from there on, counted after the first `base` bytes."""
        at, waiting = 0, bytearray()
        for piece in self._expected():
            if at + len(piece) > start:
                waiting += piece[max(0, start - at) :]
            at += len(piece)
            if len(waiting) >= _CHUNK:
                self._append(bytes(waiting))
                waiting.clear()
        if waiting:
            self._append(bytes(waiting))

    def _append(self, data: bytes) -> None:
        """Append to the file; all of it is on the disk afterwards, or the file is as long as it was."""
        end = os.fstat(self._file).st_size
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._file, view) :]
            os.fsync(self._file)
        except OSError as exc:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, end)
            raise self._cannot_write(exc) from exc

    def _cannot_write(self, exc: OSError) -> CaptionError:
        return CaptionError(
            f"the output {self._name} cannot be written ({printable(exc.strerror or exc)}): "
            f"{remedy_of(exc) or 'mend that'}, and give the same command again to go on"
        )

    def _write_anew(self) -> None:
        """Write the file without what is stale, and put it in the place of the old one."""
        target = Path(os.path.realpath(self._path))
        fresh = target.with_name(f".{target.name}.part")
        base = self._fact("base")
        try:
            with fresh.open("wb") as file:
                with target.open("rb") as old:
                    _copy(old, file, base)
                for piece in self._lasting():
                    file.write(piece)
                size = file.tell()
                file.flush()
                os.fsync(file.fileno())
            shutil.copymode(target, fresh)
            with self._ledger.transaction():
                self._ledger.set_facts(state="replacing", new_size=size)
            self._close_file()  # Windows replaces no open file
            os.replace(fresh, target)
            sync_folder(target.parent)
            self._open_file()
        except OSError as exc:
            with contextlib.suppress(OSError):
                fresh.unlink()
            raise self._cannot_write(exc) from exc
        self._forget_stale(size)

    def _forget_stale(self, size: int) -> None:
        with self._ledger.transaction():
            self._ledger.forget_stale()
            self._ledger.set_facts(size=size, synced=size, state="complete")


def _copy(old: BinaryIO, new: BinaryIO, count: int) -> None:
    while count:
        piece = old.read(min(count, _CHUNK))
        if not piece:
            return
        new.write(piece)
        count -= len(piece)

"""The ledger of a run: which photos have their record, and what it says, in an SQLite file beside the output.

The ledger is committed to the disk before the output is written, so that whatever ends the process, and the machine
with it, the output holds nothing that the ledger lacks, and what the output lacks is completed from the ledger.
"""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caption_rt.errors import CaptionError, OptionsError, Parameter, printable

__all__ = ["SIDECARS", "DamagedLedger", "Ledger", "NoLedger", "Row", "check_ledger", "key_of"]

# SQLite's header (https://www.sqlite.org/fileformat.html, section 1.3): a magic string; at byte 68 whose file it is.
_MAGIC = b"SQLite format 3\0"
_HEADER_BYTES, _APPLICATION = 100, int.from_bytes(b"cprt", "big")
_VERSION = 1

SIDECARS = "sidecars"
"""The fact "format" of a ledger of sidecars, and of no output file."""

_LEDGER = Parameter("ledger")

_COLUMNS = "key, digest, options, error, line, before, own"
_TABLES = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE records (
  seq INTEGER PRIMARY KEY,
  place INTEGER NOT NULL,
  key BLOB NOT NULL,
  digest BLOB,
  options BLOB NOT NULL,
  error TEXT,
  line BLOB,
  before BLOB,
  own INTEGER NOT NULL,
  stale INTEGER NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX current ON records (key) WHERE NOT stale;
CREATE INDEX old ON records (stale) WHERE stale;
CREATE INDEX waiting ON records (seq) WHERE before IS NOT NULL;
CREATE INDEX without_digest ON records (seq) WHERE digest IS NULL;
"""


# What SQLite says where a file or its folder cannot be written.
_NO_PLACE = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM)


class DamagedLedger(CaptionError):
    """A ledger of ours that SQLite cannot read any more."""


class NoLedger(OptionsError):
    """A file that is no database at all where a ledger should be."""


@dataclass(frozen=True)
class Row:
    """What is known of one photo."""

    key: bytes
    """The photo's name, relative to the ledger."""
    digest: bytes | None
    """The hash of the photo's bytes; None where there were none to read."""
    options: bytes
    """What else the record depends on: the bundle, the options and the format of records, as a hash."""
    error: str | None
    """The error in the caption's place, as JSON with "class" and "message"; None for a caption."""
    line: bytes | None
    """What the record is in the output, or what the photo's sidecar holds; None where it is in a part of the output
    that the ledger does not answer for."""
    before: bytes | None = None
    """Of a sidecar that is perhaps not written yet: the hash of what it held before, empty if there was none; None
    once it is written."""
    own: bool = True
    """Of a sidecar: whether nothing of it is somebody else's."""


class Ledger:
    """An open ledger. One process has it at a time; it is used in the thread that opened it.

    It forgets nothing by itself: a row that another one of its key took the place of is stale, and stays until
    `forget_stale`.
    """

    def __init__(self, path: Path) -> None:
        """Open a ledger, or make one.

        Args:
            path: the file.

        Raises:
            OptionsError: the file is not a ledger, or of a newer version; `NoLedger` where it is no database.
            DamagedLedger: it is damaged.
            CaptionError: another process has it, or it cannot be read or written.
        """
        self.path = path
        self._name = printable(path)
        self._check_header()
        with self._errors():
            self._database = sqlite3.connect(path, timeout=0, isolation_level=None)
        try:
            with self._errors():
                self._begin()
        except BaseException:
            self._database.close()
            raise

    def close(self) -> None:
        """Give the ledger back."""
        with self._errors():
            self._database.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes within are on the disk afterwards, or none.

        Raises:
            CaptionError: the ledger cannot be written, as where the disk is full.
        """
        with self._errors():
            self._database.execute("BEGIN")
            try:
                yield
                self._database.execute("COMMIT")
            except BaseException:
                # SQLite has rolled back by itself where the disk is full.
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise

    def fact(self, name: str, default: int | str | bytes | None = None) -> int | str | bytes | None:
        """A fact about the whole output."""
        with self._errors():
            found = self._database.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return default if found is None else found[0]

    def set_facts(self, **facts: int | str | bytes) -> None:
        """State facts about the whole output."""
        self._database.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", facts.items())

    def find(self, key: bytes) -> Row | None:
        """What is known of a photo."""
        with self._errors():
            found = self._database.execute(
                f"SELECT {_COLUMNS} FROM records WHERE key = ? AND NOT stale", (key,)
            ).fetchone()
        return None if found is None else _row(found)

    def put(self, row: Row) -> None:
        """Add what is known of a photo, after all others; what was known of it before is stale.

        A stale row with a line in the output leaves its place in the order of `lines` to the new one.
        """
        old = self._database.execute(
            "SELECT seq, place FROM records WHERE key = ? AND NOT stale AND line IS NOT NULL", (row.key,)
        ).fetchone()
        self._database.execute("DELETE FROM records WHERE key = ? AND NOT stale AND line IS NULL", (row.key,))
        if old is not None:
            self._database.execute("UPDATE records SET stale = 1 WHERE seq = ?", (old[0],))
        values = (row.key, row.digest, row.options, row.error, row.line, row.before, row.own)
        added = self._database.execute(
            f"INSERT INTO records (place, {_COLUMNS}) VALUES (0, ?, ?, ?, ?, ?, ?, ?)",
            values,
        ).lastrowid
        self._database.execute("UPDATE records SET place = ? WHERE seq = ?", (added if old is None else old[1], added))

    def restate(self, row: Row) -> None:
        """Change what is known of a photo, where its line stays the same."""
        self._database.execute(
            "UPDATE records SET digest = ?, options = ?, error = ? WHERE key = ? AND NOT stale",
            (row.digest, row.options, row.error, row.key),
        )

    def lines(self, *, stale: bool = True) -> Iterator[bytes]:
        """The lines of the output.

        Args:
            stale: in the order of writing, the stale ones among them; False for those that are not, each in the place
                of the first of its photo.
        """
        where = "" if stale else "AND NOT stale "
        order = "seq" if stale else "place"
        with self._errors():
            cursor = self._database.execute(f"SELECT line FROM records WHERE line IS NOT NULL {where}ORDER BY {order}")
            for (line,) in cursor:
                yield line

    def unread(self) -> Iterator[Row]:
        """What is known of photos and folders that could not be read at all."""
        with self._errors():
            for found in self._database.execute(f"SELECT {_COLUMNS} FROM records WHERE digest IS NULL AND NOT stale"):
                yield _row(found)

    def unsettled(self) -> list[Row]:
        """The rows of sidecars that are perhaps not written yet: those of the last batch."""
        with self._errors():
            found = self._database.execute(
                f"SELECT {_COLUMNS} FROM records WHERE before IS NOT NULL AND NOT stale"
            ).fetchall()
        return [_row(values) for values in found]

    def settle(self) -> None:
        """State that all sidecars are written."""
        self._database.execute("UPDATE records SET before = NULL WHERE before IS NOT NULL")

    def retire(self, key: bytes) -> None:
        """Make what is known of a photo stale."""
        self._database.execute("UPDATE records SET stale = 1 WHERE key = ? AND NOT stale", (key,))

    def has_stale(self) -> bool:
        """Whether any row is stale."""
        with self._errors():
            return self._database.execute("SELECT 1 FROM records WHERE stale LIMIT 1").fetchone() is not None

    def forget_stale(self) -> None:
        """Drop the stale rows; from now on the others are in the order of ``lines(stale=False)``."""
        self._database.execute("DELETE FROM records WHERE stale")
        self._database.execute("UPDATE records SET seq = place WHERE seq != place")

    def forget_lines(self) -> None:
        """Keep what is known of the photos, and nothing of the output's lines."""
        self._database.execute("DELETE FROM records WHERE stale")
        self._database.execute("UPDATE records SET line = NULL, place = seq")

    def forget_all(self) -> None:
        """Make the ledger empty."""
        self._database.execute("DELETE FROM records")
        self._database.execute("DELETE FROM facts")

    def _check_header(self) -> None:
        """Look whose file it is before SQLite does; a foreign database is left alone."""
        try:
            with self.path.open("rb") as file:
                header = file.read(_HEADER_BYTES)
                made = header.strip(b"\0") or file.read().strip(b"\0")
            if not made:  # and then the power was gone
                os.truncate(self.path, 0)
                return
        except FileNotFoundError:
            return
        except OSError as exc:
            reason = printable(exc.strerror or exc)
            raise CaptionError(
                f"the ledger {self._name} cannot be read ({reason}): mend that, or name another with ", _LEDGER
            ) from exc
        sentence = (f"{self._name} is not a ledger of caption-rt: move it away, or name another with ", _LEDGER)
        if not header.startswith(_MAGIC):
            raise NoLedger(*sentence)
        if int.from_bytes(header[68:72], "big") != _APPLICATION:
            raise OptionsError(*sentence)

    def _begin(self) -> None:
        run = self._database.execute
        run("PRAGMA locking_mode = EXCLUSIVE")
        run("PRAGMA synchronous = FULL")
        # Taken now and, in this mode, kept until the end: a process that dies gives it back.
        run("BEGIN EXCLUSIVE")
        if run("PRAGMA user_version").fetchone()[0] == 0:
            for statement in _TABLES.split(";\n"):
                run(statement)
            run(f"PRAGMA application_id = {_APPLICATION}")
            run(f"PRAGMA user_version = {_VERSION}")
        version = run("PRAGMA user_version").fetchone()[0]
        run("COMMIT")
        if version != _VERSION:
            raise OptionsError(
                f"the ledger {self._name} was made by another version of caption-rt: use that one, or choose another "
                "output"
            )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn SQLite's errors into ours."""
        try:
            yield
        except sqlite3.Error as exc:
            code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise CaptionError(
                    f"another caption-rt is at work with {self._name}: wait until it is done, or choose another output"
                ) from exc
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise DamagedLedger(
                    f"the ledger {self._name} is damaged ({exc}): --existing append keeps the output and adds to it, "
                    "--existing overwrite begins anew"
                ) from exc
            if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
                raise CaptionError(
                    f"the ledger {self._name} cannot be written ({exc}): make room on the disk, and give the same "
                    "command again to go on"
                ) from exc
            if code in _NO_PLACE:
                raise _no_place(self.path) from exc
            raise CaptionError(f"the ledger {self._name} cannot be used ({exc}): name another with ", _LEDGER) from exc


def _row(values: tuple[Any, ...]) -> Row:
    key, digest, options, error, line, before, own = values
    return Row(key, digest, options, error, line, before, bool(own))


def check_ledger(path: Path) -> None:
    """Refuse a place for a ledger before anything is loaded or changed.

    Raises:
        OptionsError: it is a folder, or in a folder that does not exist.
        CaptionError: nothing can be written there.
    """
    if path.is_dir():
        raise OptionsError(f"the ledger {printable(path)} is a folder: name a file with ", _LEDGER)
    if not path.parent.is_dir():
        raise OptionsError(f"the folder of the ledger {printable(path)} does not exist: make it first")
    # SQLite makes a journal beside it.
    if not os.access(path.parent, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise _no_place(path)


def _no_place(path: Path) -> CaptionError:
    return CaptionError(
        f"the ledger {printable(path)}, by which a run goes on where it stopped, cannot be written there: name a place "
        "where it can be with ",
        _LEDGER,
    )


def key_of(path: str, folder: Path) -> bytes:
    """A photo's name in a ledger: its path from the ledger's folder, so that both can be moved together."""
    try:
        return os.fsencode(os.path.relpath(path, folder))
    except ValueError:  # on another drive of Windows
        return os.fsencode(os.path.abspath(path))

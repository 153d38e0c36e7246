"""Graphs as ONNX Runtime optimised them for this machine, kept in the user's cache, from where they load faster.

A bundle's graphs cannot be so themselves: they would hold nodes for one processor's layout of memory. A graph is kept
as a folder of two files: its nodes, and its weights, which ONNX Runtime maps into memory rather than copies, so that
processes share them. The folder is named by all that the graph depends on, and by a checksum; what has another one, or
could be somebody else's, is not used. (CRC-32 finds damage. A cryptographic hash would find no more where only the user
can write, and takes as long as the optimisation that it saves.) Where nothing can be kept, everything works without.

The environment variable ``CAPTION_RT_CACHE`` names another folder; empty or ``off``, it keeps nothing.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import mmap
import os
import platform
import secrets
import stat
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from caption_rt.errors import printable

__all__ = ["LEAST_SIZE", "VARIABLE", "WEIGHTS_FILE", "GraphCache", "cache_folder", "graph_key"]

_log = logging.getLogger(__name__)

VARIABLE = "CAPTION_RT_CACHE"
LEAST_SIZE = 2**18
"""Smaller graphs, in bytes, load in milliseconds anyway."""
WEIGHTS_FILE = "weights.bin"
"""What a graph's weights are to be called, beside the file that `GraphCache.writing` names."""

# Counted up when what is kept is another thing than before.
_VERSION = 2
_GRAPH_FILE = "graph.onnx"
_UNUSED_DAYS = 60


def cache_folder() -> Path | None:
    """Where graphs are kept; None where nothing is to be kept, or the system has no such place."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named) if named not in ("", "off") else None
    with contextlib.suppress(RuntimeError):  # no home
        if sys.platform == "win32":
            top = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        elif sys.platform == "darwin":
            top = Path.home() / "Library" / "Caches"
        else:
            # Relative paths are to be ignored: XDG Base Directory Specification.
            stated = os.environ.get("XDG_CACHE_HOME", "")
            top = Path(stated) if os.path.isabs(stated) else Path.home() / ".cache"
        return top / "caption-rt" / "graphs"
    return None


def graph_key(sha256: str, onnxruntime_version: str) -> str:
    """All that an optimised graph depends on, as 32 hexadecimal digits.

    Args:
        sha256: that of the graph's file, which names bundle, precision and graph.
        onnxruntime_version: the version that optimises and runs it.
    """
    parts = [_VERSION, sha256, onnxruntime_version, platform.machine(), _processor()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


class GraphCache:
    """A folder of optimised graphs.

    Args:
        folder: it need not be there.
    """

    def __init__(self, folder: Path) -> None:
        """Take the folder."""
        self._folder = folder

    def find(self, key: str) -> Path | None:
        """The ONNX file of a graph that is kept and whole, or None.

        Args:
            key: from `graph_key`.
        """
        for kept in self._kept(key):
            try:
                if self._checksum(kept) == kept.name.split(".")[1]:
                    with contextlib.suppress(OSError):  # the day of its last use, by which `_keep` tidies up
                        os.utime(kept)
                    return kept / _GRAPH_FILE
            except (OSError, ValueError) as exc:  # ValueError: a file is empty
                _log.debug("%s cannot be read: %s", printable(kept), exc)
        return None

    def drop(self, key: str) -> None:
        """Remove a graph that turned out to be of no use."""
        for kept in self._kept(key):
            _remove(kept)

    @contextlib.contextmanager
    def writing(self, key: str) -> Iterator[Path | None]:
        """A place for ONNX Runtime to write an optimised graph to, which is kept if it was.

        Args:
            key: from `graph_key`.

        Yields:
            The path of an ONNX file that is not there, beside which `WEIGHTS_FILE` belongs; None where nothing can be
            kept.
        """
        temporary = self._folder / f".{key}.{secrets.token_hex(4)}.tmp"
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            writable = _own(self._folder.lstat())
            if writable:
                temporary.mkdir(mode=0o700)
        except OSError:
            writable = False
        try:
            yield temporary / _GRAPH_FILE if writable else None
            if writable and (temporary / _GRAPH_FILE).is_file():
                self._keep(key, temporary)
        except (OSError, ValueError) as exc:
            _log.debug("no optimised graph is kept in %s: %s", printable(self._folder), exc)
        finally:
            _remove(temporary)

    def _keep(self, key: str, temporary: Path) -> None:
        if self.find(key) is not None:  # another process was first, and its bytes are not the same
            return
        self.drop(key)  # what is left was spoilt
        for file in temporary.iterdir():
            file.chmod(0o600)
        temporary.replace(self._folder / f"{key}.{self._checksum(temporary)}.graph")
        oldest = time.time() - _UNUSED_DAYS * 86400
        for pattern in ("*.graph", ".*.tmp"):
            for unused in self._folder.glob(pattern):
                if unused.stat().st_mtime < oldest:
                    _remove(unused)

    def _kept(self, key: str) -> list[Path]:
        try:
            return sorted(self._folder.glob(f"{key}.*.graph"))
        except OSError:
            return []

    def _checksum(self, kept: Path) -> str | None:
        """The CRC-32 of a graph's files; None if one is another user's, may be written by others, or is no file."""
        if not (_own(self._folder.stat()) and _own(kept.lstat())):
            return None
        checksum = 0
        for name in (_GRAPH_FILE, WEIGHTS_FILE):
            path = kept / name
            if name == WEIGHTS_FILE and not path.exists():  # no weights of any size
                continue
            with path.open("rb") as file:
                facts = os.fstat(file.fileno())
                if not stat.S_ISREG(facts.st_mode) or not _own(facts):
                    return None
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    checksum = zlib.crc32(data, checksum)
        return f"{checksum:08x}"


def _remove(kept: Path) -> None:
    """Remove a graph, as far as it is there; nothing else than its two files."""
    for name in (_GRAPH_FILE, WEIGHTS_FILE):
        with contextlib.suppress(OSError):
            (kept / name).unlink()
    with contextlib.suppress(OSError):
        kept.rmdir()


def _own(facts: os.stat_result) -> bool:
    """Whether nobody else can have written it, as far as the system tells."""
    if sys.platform == "win32":
        return True
    return facts.st_uid == os.geteuid() and not facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@functools.cache
def _processor() -> str:
    """What tells processors apart for which a graph is optimised differently: name and abilities."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            kinds = ("model name", "flags", "Features", "CPU part")
            first = itertools.takewhile(str.strip, file)  # the others are the same, and may be hundreds
            return "\n".join(line.strip() for line in first if line.startswith(kinds))
    except OSError:
        return platform.processor()

"""What to caption: files, folders, addresses and standard input, one photo after another.

Everything here is a generator: of a folder, the names are held while it is gone through, and never all paths of a run.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from caption_rt.errors import ImageError, OptionsError, printable

__all__ = ["Selection", "Source", "find_sources", "parse_shard"]

# A list of paths never has a zero byte, and every image format has some early: sizes and offsets in its header.
_HEAD = 64
_BINARY = (b"\xff\xd8\xff", b"\x89PNG")
# Longer than any system's longest path: what has no separator for so long is no list of paths.
_LONGEST_PATH = 1 << 17
_CHUNK = 1 << 16
_PATIENCE_S = 0.1


@dataclass(frozen=True)
class Source:
    """One photo to caption, or a folder that cannot be looked into."""

    path: str
    """What records call it: the path as it was found, an address, or "-" for the bytes of standard input."""
    relative: str
    """Its path within the folder that was named, with "/" between names; of what was named itself, that name."""
    named: bool = False
    """It was named itself on the command line, rather than found in a folder or read from a list."""
    data: bytes | None = None
    """The photo's bytes, where they came from standard input."""
    error: ImageError | None = None
    """Why there is nothing to read: a folder could not be looked into."""

    @property
    def name(self) -> str:
        """How sentences call it, on one line."""
        return "standard input" if self.path == "-" and self.data is not None else printable(self.path)

    @property
    def is_address(self) -> bool:
        """Whether it is to be fetched from the web."""
        return self.path.lower().startswith(("http://", "https://"))


@dataclass(frozen=True)
class Selection:
    """Which photos are taken.

    Patterns are the shell's: ``*``, ``?`` and ``[a-z]``; upper and lower case are the same. One without a slash is held
    against the photo's name and the name of every folder on the way to it, below the folder that was named; one with a
    slash against the whole path from there, where ``*`` matches slashes too. Photos that were named themselves are
    taken whatever the patterns say.

    Raises:
        OptionsError: an impossible shard.
    """

    include: tuple[str, ...] = ()
    """Only photos that match one of these; empty for all."""
    exclude: tuple[str, ...] = ()
    """No photo, and nothing in a folder, that matches one of these."""
    shard: tuple[int, int] | None = None
    """Part i of n, counted from 1: every photo is in exactly one part, by a hash of its path within the folder that was
    named, so that photos which are added later change nothing for the others."""

    def __post_init__(self) -> None:
        """Check the shard."""
        if self.shard is not None and not 1 <= self.shard[0] <= self.shard[1]:
            raise OptionsError(f"a shard is 1/8 to 8/8, say, not {self.shard[0]}/{self.shard[1]}")

    def takes(self, relative: str) -> bool:
        """Whether the patterns take a photo."""
        if self.include and not any(_matches(pattern, relative) for pattern in self.include):
            return False
        return not self.leaves_out(relative)

    def leaves_out(self, relative: str) -> bool:
        """Whether the patterns leave out a photo, or a folder and all that is in it."""
        return any(_matches(pattern, relative) for pattern in self.exclude)

    def in_shard(self, relative: str) -> bool:
        """Whether a photo belongs to the shard."""
        if self.shard is None:
            return True
        digest = hashlib.blake2b(relative.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        return int.from_bytes(digest, "big") % self.shard[1] == self.shard[0] - 1


def parse_shard(text: str) -> tuple[int, int]:
    """Part and number of parts, of "2/8".

    Raises:
        OptionsError: it is not two whole numbers with a slash between them.
    """
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and len(text) < 20):
        raise OptionsError(f"a shard is written as 2/8 (the second of eight parts), not {printable(text)!r}")
    return int(part), int(parts)


def find_sources(
    arguments: Iterable[str],
    selection: Selection | None = None,
    *,
    stdin: BinaryIO | None = None,
    null: bool = False,
    max_bytes: int = 1 << 28,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Source]:
    """What to caption, in order.

    A folder is gone through with its subfolders, all entries in the order of their names' characters. It gives what has
    a photo's ending (`caption_rt.image.PHOTO_SUFFIXES`, in capitals or not); hidden files and folders, whose names
    begin with a dot, are passed over. A folder that several links lead to, or that a link leads back to, is gone
    through once an argument. One that cannot be looked into gives a source with an error, in every shard.

    Args:
        arguments: names of files and folders, addresses, and "-" for standard input: a list of such names, one a line,
            or the bytes of one image. Its first bytes tell which.
        selection: which of the photos; None for all.
        stdin: standard input.
        null: the list on standard input has a zero byte after each name rather than a line break.
        max_bytes: the largest image that is taken from standard input.
        stopped: asked while standard input is waited for; once it says so, that is taken to be at its end.

    Raises:
        OptionsError: "-" came twice, or standard input is neither a list nor an image; as it is met.
    """
    selection = selection or Selection()
    taken = False
    for argument in arguments:
        if argument != "-" or stdin is None:
            yield from _expand(argument, selection, named=True)
            continue
        if taken:
            raise OptionsError("standard input can be read once: give - only once")
        taken = True
        yield from _from_stdin(stdin, selection, null, max_bytes, stopped)


def _expand(argument: str, selection: Selection, *, named: bool) -> Iterator[Source]:
    """What a name stands for."""
    if os.path.isdir(argument):
        yield from _scan(argument, selection)
    elif selection.in_shard(argument.replace(os.sep, "/")):
        yield Source(argument, argument.replace(os.sep, "/"), named)


def _scan(top: str, selection: Selection) -> Iterator[Source]:
    """The photos of a folder and of those in it."""
    from caption_rt.image import PHOTO_SUFFIXES  # with NumPy and Pillow, which --help does without

    visited: set[tuple[int, int]] = set()
    # A list a level rather than a recursion: a tree may be deeper than Python's stack.
    levels: list[tuple[str, str, Iterator[tuple[str, bool]]]] = []

    def enter(path: str, relative: str) -> Source | None:
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in visited:
                return None
            visited.add((status.st_dev, status.st_ino))
            levels.append((path, relative, iter(_entries(path))))
        except OSError as exc:
            reason = printable(exc.strerror or exc)
            error = ImageError(f"the folder {printable(path)} cannot be looked into: {reason}: check its permissions")
            return Source(path, relative, error=error)
        return None

    failed = enter(top, "")
    if failed:
        yield failed
    while levels:
        path, relative, entries = levels[-1]
        name, is_folder = next(entries, ("", False))
        if not name:
            levels.pop()
            continue
        below = f"{relative}/{name}" if relative else name
        if is_folder:
            failed = None if selection.leaves_out(below) else enter(os.path.join(path, name), below)
            if failed:
                yield failed
        elif (
            os.path.splitext(name)[1].lower() in PHOTO_SUFFIXES and selection.takes(below) and selection.in_shard(below)
        ):
            yield Source(os.path.join(path, name), below)


def _entries(folder: str) -> list[tuple[str, bool]]:
    """The names in a folder, sorted, and whether each is a folder."""
    with os.scandir(folder) as found:
        return sorted((entry.name, _is_folder(entry)) for entry in found if not entry.name.startswith("."))


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle, or one that may not be followed
        return False


def _matches(pattern: str, relative: str) -> bool:
    import fnmatch

    pattern = pattern.rstrip("/").lower()
    if "/" in pattern:
        return fnmatch.fnmatchcase(relative.lower(), pattern.lstrip("/"))
    return any(fnmatch.fnmatchcase(name, pattern) for name in relative.lower().split("/"))


def _from_stdin(
    stdin: BinaryIO, selection: Selection, null: bool, max_bytes: int, stopped: Callable[[], bool]
) -> Iterator[Source]:
    head = b""
    while len(head) < _HEAD and (b"\n" not in head or head.startswith(_BINARY)):
        read = _read(stdin, _HEAD, stopped)
        if not read:
            break
        head += read
    if not null and (head.startswith(_BINARY) or b"\0" in head[:_HEAD]):
        data = head + stdin.read(max(0, max_bytes + 1 - len(head)))
        error = None
        if len(data) > max_bytes:
            error = ImageError(f"standard input has more than {max_bytes} bytes: raise --max-bytes to read it")
        yield Source("-", "-", True, data[:max_bytes], error)
        return
    for name in _names(head, stdin, b"\0" if null else b"\n", stopped):
        yield from _expand(os.fsdecode(name), selection, named=False)


def _names(head: bytes, stdin: BinaryIO, separator: bytes, stopped: Callable[[], bool]) -> Iterator[bytes]:
    """The names of a list, without empty ones."""
    rest, read = head, b"-"
    while read:
        *names, rest = rest.split(separator)
        for name in names:
            name = name.removesuffix(b"\r") if separator == b"\n" else name
            if name:
                yield name
        if len(rest) > _LONGEST_PATH:
            raise OptionsError("standard input is neither an image nor a list of paths, one a line")
        read = _read(stdin, _CHUNK, stopped)
        rest += read
    if rest:
        yield rest.removesuffix(b"\r") if separator == b"\n" else rest


def _read(stdin: BinaryIO, count: int, stopped: Callable[[], bool]) -> bytes:
    """What is there, rather than all that was asked for: a list may be made while it is read. Empty at its end."""
    if os.name == "posix":  # Windows waits for sockets alone
        import select

        while not select.select([stdin.fileno()], [], [], _PATIENCE_S)[0]:
            if stopped():
                return b""
    return os.read(stdin.fileno(), count)

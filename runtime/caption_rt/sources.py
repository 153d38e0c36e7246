"""What to caption: files, folders, addresses and standard input, one photo after another.

Everything here is a generator: of a folder, the names are held while it is gone through, and never all paths of a run.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from caption_rt._amounts import byte_count
from caption_rt._sniff import PHOTO_SUFFIXES, other_kind, photo_kind
from caption_rt.errors import ImageError, OptionsError, Parameter, printable, shown

__all__ = ["Selection", "Source", "distinct", "find_sources", "parse_shard"]

# A list of paths never has a zero byte, and every image format has some early: sizes and offsets in its header.
_HEAD = 64
_BINARY = (b"\xff\xd8\xff", b"\x89PNG")
_UTF_8_MARK, _UTF_16_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
# The words of a scheme, as RFC 3986 has them, and not the letter of a drive.
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
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
    """Why there is nothing to read: a folder could not be looked into, say."""

    @property
    def name(self) -> str:
        """How sentences call it, on one line."""
        return "standard input" if self.path == "-" and self.data is not None else shown(self.path)

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
        OptionsError: an impossible shard, or an empty pattern.
    """

    include: tuple[str, ...] = ()
    """Only photos that match one of these; empty for all."""
    exclude: tuple[str, ...] = ()
    """No photo, and nothing in a folder, that matches one of these."""
    shard: tuple[int, int] | None = None
    """Part i of n, counted from 1: every photo is in exactly one part, by a hash of its path within the folder that was
    named, so that photos which are added later change nothing for the others."""

    def __post_init__(self) -> None:
        """Check the patterns and the shard."""
        for name in ("include", "exclude"):
            if not all(pattern.strip("/") for pattern in getattr(self, name)):
                raise OptionsError("a pattern of ", Parameter(name), ' is empty and matches nothing: "*.jpg" is one')
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
    may_be_empty: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Source]:
    """What to caption, in order.

    A folder is gone through with its subfolders, all entries in the order of their names' characters. It gives what has
    a photo's ending (`caption_rt._sniff.PHOTO_SUFFIXES`, in capitals or not); hidden files and folders, whose names
    begin with a dot, are passed over. A folder that several links lead to, or that a link leads back to, is gone
    through once an argument. One that cannot be looked into gives a source with an error, in every shard.

    A file:// address is the file's path; of what is named by another kind of address, and of standard input that is
    empty or too large, there is a source with an error.

    Args:
        arguments: names of files and folders, addresses, and "-" for standard input: a list of such names, one a line,
            or the bytes of one image. Its first bytes tell which.
        selection: which of the photos; None for all.
        stdin: standard input.
        null: the list on standard input has a zero byte after each name rather than a line break.
        max_bytes: the largest image that is taken from standard input.
        may_be_empty: standard input may be an empty list; otherwise it is an error if nothing comes at all.
        stopped: asked while standard input is waited for; once it says so, that is taken to be at its end.

    Raises:
        OptionsError: "-" came twice, standard input is neither a list nor an image, or `null` does not fit to it; as it
            is met.
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
        head = _head(stdin, null, stopped)
        if head.startswith(_UTF_8_MARK):
            head = head[len(_UTF_8_MARK) :]
        if not head:
            if not (may_be_empty or null or stopped()):
                said = "is empty: neither a photo nor a list of paths came"
                yield Source("-", "-", True, b"", ImageError(f"standard input {said}", reason="is empty"))
        elif _is_list(head, null):
            for name in _names(head, stdin, null, stopped):
                yield from _expand(os.fsdecode(name), selection, named=False)
        else:
            yield _piped(head, stdin, max_bytes, stopped)


def distinct(sources: Iterable[Source]) -> Iterator[Source]:
    """Each photo once, however often and in whatever way it was named: `photos/a.jpg`, `./photos/a.jpg`.

    What comes as bytes is let through. It keeps a hash of every path.
    """
    seen: set[bytes] = set()
    for source in sources:
        if source.data is None:
            name = source.path if source.is_address else os.path.abspath(source.path)
            digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            if digest in seen:
                continue
            seen.add(digest)
        yield source


def _expand(argument: str, selection: Selection, *, named: bool) -> Iterator[Source]:
    """What a name stands for."""
    error = None
    try:
        argument = _local(argument)
    except ImageError as exc:
        error = exc
    relative = argument.replace(os.sep, "/")
    if error is None and os.path.isdir(argument):
        yield from _scan(argument, selection)
    elif selection.in_shard(relative):
        yield Source(argument, relative, named, error=error)


def _local(argument: str) -> str:
    """What is opened or fetched for a name: of a file:// address its path.

    Raises:
        ImageError: it is an address of another kind.
    """
    found = _ADDRESS.match(argument)
    scheme = found[1].lower() if found else ""
    if scheme in ("", "http", "https") or os.path.lexists(argument):
        return argument
    if scheme == "file":
        from caption_rt._http import file_path  # with the standard library's network

        return file_path(argument)
    raise ImageError(
        f"{shown(argument)} is an address of the kind {scheme}, and only http, https and file are read: fetch it first",
        reason="is an address of a kind that is not read",
    )


def _scan(top: str, selection: Selection) -> Iterator[Source]:
    """The photos of a folder and of those in it."""
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
            error = ImageError(
                f"the folder {shown(path)} cannot be looked into ({reason}): check its permissions",
                reason=f"is a folder that cannot be looked into ({reason})",
            )
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


def _head(stdin: BinaryIO, null: bool, stopped: Callable[[], bool]) -> bytes:
    """The first bytes of standard input: a whole name, or enough to tell a photo by; empty if there is nothing."""
    head, separator = b"", b"\0" if null else b"\n"
    while len(head) < _HEAD and (separator not in head or head.startswith(_BINARY)):
        read = _read(stdin, _HEAD, stopped)
        if not read:
            break
        head += read
    return head


def _is_list(head: bytes, null: bool) -> bool:
    """Whether standard input is a list of names by its first bytes, rather than a photo or another document.

    Raises:
        OptionsError: it is a list of another kind than was said.
    """
    if null:
        if head.startswith(_BINARY):
            raise OptionsError("standard input is a photo, and ", Parameter("null"), " is about a list: leave it out")
        return True
    if head.startswith(_UTF_16_MARKS) and b"\0" in head:
        raise OptionsError("the list on standard input is UTF-16 text: save it as UTF-8")
    if b"\0" in head[:_HEAD] and photo_kind(head) is None:
        first = head.partition(b"\0")[0]
        if first and min(first) >= ord(" ") and (len(first) > 1 or os.path.lexists(first)):
            raise OptionsError("standard input has a zero byte between its names: say ", Parameter("null"))
    # Other documents have their kind named, once. A path may begin as programs and archives do.
    document = other_kind(head) in ("a PDF document", "an HTML page", "an SVG drawing", "an XML document", "JSON")
    if document or head.startswith(_BINARY) or b"\0" in head[:_HEAD]:
        return False
    first = head.partition(b"\n")[0].removesuffix(b"\r")
    return not any(byte < ord(" ") and byte != ord("\t") for byte in first) or os.path.lexists(first)


def _piped(head: bytes, stdin: BinaryIO, max_bytes: int, stopped: Callable[[], bool]) -> Source:
    """The photo that standard input is."""
    data = bytearray(head)
    while len(data) <= max_bytes and (read := _read(stdin, min(_CHUNK, max_bytes + 1 - len(data)), stopped)):
        data += read
    error = None
    if len(data) > max_bytes:
        error = ImageError(
            f"standard input has more than {byte_count(max_bytes)}: raise ",
            *(Parameter("max_bytes"), " to read it"),
            reason="is too large a file",
        )
    return Source("-", "-", True, bytes(data[:max_bytes]), error)


def _names(head: bytes, stdin: BinaryIO, null: bool, stopped: Callable[[], bool]) -> Iterator[bytes]:
    """The names of a list, without empty ones.

    Raises:
        OptionsError: it is no list, or one of the other kind.
    """
    separator = b"\0" if null else b"\n"
    rest, read, parted = head, b"-", False
    while read:
        *names, rest = rest.split(separator)
        parted = parted or bool(names)
        for name in names:
            yield from _name(name, null)
        if len(rest) > _LONGEST_PATH:
            break
        read = _read(stdin, _CHUNK, stopped)
        rest += read
    if null and not parted and b"\n" in rest and not os.path.lexists(rest):
        raise OptionsError(
            "standard input has line breaks between its names and no zero byte: leave out ", Parameter("null")
        )
    if len(rest) > _LONGEST_PATH:
        raise OptionsError("standard input is neither an image nor a list of paths, one a line")
    yield from _name(rest, null)


def _name(name: bytes, null: bool) -> Iterator[bytes]:
    if not null:
        if b"\0" in name:
            raise OptionsError(
                "a line of standard input has a zero byte in it, which no name has: say ",
                *(Parameter("null"), " if it is a list in which each name ends in one"),
            )
        name = name.removesuffix(b"\r")
    if name:
        yield name


def _read(stdin: BinaryIO, count: int, stopped: Callable[[], bool]) -> bytes:
    """What is there, rather than all that was asked for: a list may be made while it is read. Empty at its end."""
    if os.name == "posix":  # Windows waits for sockets alone
        import select

        while not select.select([stdin.fileno()], [], [], _PATIENCE_S)[0]:
            if stopped():
                return b""
    return os.read(stdin.fileno(), count)

"""A bundle that is one zip file; apart, because zipfile takes time to load and most bundles are folders."""

import contextlib
import io
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from caption_rt.errors import BundleError, printable, shown
from caption_rt.manifest import MANIFEST_FILE

__all__ = ["Zipped"]

# The directory at the end of a zip file is read whole, and each entry becomes an object: a bundle's has a few kB.
_MAX_DIRECTORY = 2**20
# Compressed, weights are hardly smaller and text is a tenth; zeros are a thousandth.
_MAX_RATIO = 100
_SMALL = 2**20  # bytes that do no harm at any ratio
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # zipfile can stop all others only where they end
_ENCRYPTED = 0x1  # of an entry's flags
_SOURCE = ": get the bundle from a source that you trust"
_LEADS_OUT = re.compile(r"/|[A-Za-z]:|(.*/)?\.\.(/|$)|.*[\\\0]", re.DOTALL)
# RuntimeError: what zipfile cannot do. ValueError: a name that is not UTF-8, a size that is none.
_DAMAGES = (zipfile.BadZipFile, RuntimeError, EOFError, ValueError, zlib.error, struct.error)


class _Archive(io.FileIO):
    """A zip file's bytes, of which zipfile gets no more in one piece than the directory of a bundle has."""

    limit: int | None = _MAX_DIRECTORY

    def read(self, size: int | None = -1) -> bytes:
        """At most `size` bytes, all if it is below 0; BundleError where these are more than the limit."""
        wanted = -1 if size is None else size
        if self.limit is not None and not 0 <= wanted <= self.limit:
            wanted = self.limit + 1
        data = super().read(wanted)
        if self.limit is not None and len(data) > self.limit:
            raise BundleError(f"the directory of the zip file {shown(self.name)} is above {self.limit} bytes{_SOURCE}")
        return data


class Zipped:
    """The files of a zip file, which holds either the files of a bundle or its folder."""

    def __init__(self, path: Path) -> None:
        """Find the bundle in it.

        Raises:
            BundleError: it is not a zip file, does not hold one bundle, or was made to do harm.
            OSError: it cannot be read.
        """
        self._path = path
        self._location = path.absolute()
        try:
            with self._opened() as archive:
                entries = archive.infolist()
        except _DAMAGES as exc:
            raise BundleError(
                f"{printable(path)} is not a bundle, neither a folder nor a whole zip file: name what "
                "caption-export wrote"
            ) from exc
        self._check(entries)
        names = [entry.filename for entry in entries]
        found = [name for name in names if name == MANIFEST_FILE or name.split("/")[1:] == [MANIFEST_FILE]]
        if len(found) != 1:
            raise BundleError(
                f"{printable(path)} holds {len(found)} files {MANIFEST_FILE}: name the zip file of one bundle"
            )
        self._prefix = found[0].removesuffix(MANIFEST_FILE)

    def read(self, name: str, limit: int) -> bytes:
        """At most `limit` + 1 bytes of a file, whatever length the archive claims: it may be a zip bomb.

        Raises:
            BundleError: it is a link, encrypted, compressed in a way that cannot be stopped, or a zip bomb.
            OSError: it is not there, or cannot be read.
        """
        try:
            with self._opened() as archive:
                entry = archive.getinfo(self._prefix + name)
                _check_entry(entry, name, limit)
                with archive.open(entry) as file:
                    return file.read(limit + 1)
        except KeyError as exc:
            raise FileNotFoundError(name) from exc
        except _DAMAGES as exc:
            raise OSError(str(exc)) from exc

    @contextlib.contextmanager
    def _opened(self) -> Iterator[zipfile.ZipFile]:
        """The archive with its directory read, and no longer a limit to what is read of it."""
        with _Archive(self._location) as file, zipfile.ZipFile(file) as archive:
            file.limit = None
            yield archive

    def _check(self, entries: list[zipfile.ZipInfo]) -> None:
        """Entries that no archiver writes, and that another reader of the archive could take for something else.

        Raises:
            BundleError: there is one.
        """
        names = set()
        for entry in entries:
            # The name as it is in the file: what zipfile makes of it depends on the system.
            name = entry.orig_filename
            if _LEADS_OUT.match(name):
                raise self._refused(f"has an entry {shown(name)!r}, whose name leads out of its folder")
            if entry.filename in names:
                raise self._refused(f"has the entry {shown(name)} twice")
            names.add(entry.filename)
        # As in a zip bomb, where each entry takes a part of all the others along.
        if sum(entry.compress_size for entry in entries) > self._path.stat().st_size:
            raise self._refused("has entries that are larger than itself, or lie on top of each other")

    def _refused(self, what: str) -> BundleError:
        return BundleError(f"the zip file {printable(self._path)} {what}{_SOURCE}")


def _check_entry(entry: zipfile.ZipInfo, name: str, limit: int) -> None:
    """See that an entry is a file that can be read; raises BundleError."""
    if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG):
        raise BundleError(f"{name} is not a regular file, and links are not followed")
    if entry.flag_bits & _ENCRYPTED:
        raise BundleError(f"{name} is encrypted, and a bundle is not")
    if entry.compress_type not in _METHODS:
        raise BundleError(
            f"{name} is compressed by zip's method {entry.compress_type}, and only stored or deflated is read"
        )
    size = min(limit, entry.file_size)
    if size > _SMALL and size > _MAX_RATIO * entry.compress_size:
        raise BundleError(
            f"{name} would become {size} bytes of {entry.compress_size} in the zip file: this is a zip bomb"
        )

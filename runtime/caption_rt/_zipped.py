"""A bundle that is one zip file; apart, because zipfile takes time to load and most bundles are folders."""

import stat
import zipfile
import zlib
from pathlib import Path

from caption_rt.errors import BundleError, printable
from caption_rt.manifest import MANIFEST_FILE

__all__ = ["Zipped"]


class Zipped:
    """The files of a zip file, which holds either the files of a bundle or its folder."""

    def __init__(self, path: Path) -> None:
        """Find the bundle in it.

        Raises:
            BundleError: it is not a zip file, or does not hold one bundle.
            OSError: it cannot be read.
        """
        self._path = path
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except zipfile.BadZipFile as exc:
            raise BundleError(
                f"{printable(path)} is not a bundle, neither a folder nor a whole zip file: name what "
                "caption-export wrote"
            ) from exc
        found = [name for name in names if name == MANIFEST_FILE or name.split("/")[1:] == [MANIFEST_FILE]]
        if len(found) != 1:
            raise BundleError(
                f"{printable(path)} holds {len(found)} files {MANIFEST_FILE}: name the zip file of one bundle"
            )
        self._prefix = found[0].removesuffix(MANIFEST_FILE)

    def read(self, name: str, limit: int) -> bytes:
        """At most `limit` + 1 bytes of a file, whatever length the archive claims: it may be a zip bomb.

        Raises:
            BundleError: it is a link.
            OSError: it is not there, or cannot be read.
        """
        try:
            with zipfile.ZipFile(self._path) as archive:
                entry = archive.getinfo(self._prefix + name)
                if stat.S_ISLNK(entry.external_attr >> 16):
                    raise BundleError(f"{name} is not a regular file, and links are not followed")
                with archive.open(entry) as file:
                    return file.read(limit + 1)
        except KeyError as exc:
            raise FileNotFoundError(name) from exc
        # RuntimeError: an encrypted entry; NotImplementedError is one too: a compression that zipfile lacks.
        except (RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as exc:
            raise OSError(str(exc)) from exc

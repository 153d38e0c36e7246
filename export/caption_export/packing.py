"""A bundle as one zip file: the same bundle always becomes the same bytes.

Entries are in one order, without the times, owners and modes of the files they came from, and stored rather than
deflated: what deflate makes depends on the library and its version, weights hardly get smaller by it, and a bundle that
is stored opens as fast as a folder.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import zipfile
from pathlib import Path

from caption_export.errors import not_written
from caption_rt.bundle import MANIFEST_FILE, Bundle
from caption_rt.errors import BundleError, CaptionError, Parameter, printable

_BEGINNING = (1980, 1, 1, 0, 0, 0)  # of zip's time
_UNIX = 3  # the system whose modes the entries have


def pack_bundle(bundle: Bundle, archive: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write an open bundle, of a folder or a zip file, as a zip file: wholly, or not at all.

    Args:
        bundle: what to write; files that its manifest does not list stay behind.
        archive: where the zip file shall be.
        overwrite: replace a zip file that is already there.

    Returns:
        The zip file, which was opened as a bundle and verified before it came to its place.

    Raises:
        BundleError: there is already something in that place, or a file has changed since the bundle was opened.
        CaptionError: the zip file cannot be written.
    """
    target = Path(archive)
    temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}.tmp"
    try:
        _check_target(target, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(temporary, "x") as file:
            for name in (MANIFEST_FILE, *sorted(bundle.manifest.files)):
                entry = zipfile.ZipInfo(name, _BEGINNING)
                entry.create_system, entry.external_attr = _UNIX, (stat.S_IFREG | 0o644) << 16
                file.writestr(entry, bundle.read(name))
        Bundle.open(temporary)
        os.replace(temporary, target)
    except OSError as exc:
        raise CaptionError(f"the zip file {not_written(target, exc)}") from exc
    finally:
        with contextlib.suppress(OSError):  # that it cannot be there is what was said already
            temporary.unlink()
    return target


def _check_target(target: Path, overwrite: bool) -> None:
    """See that nothing is lost where the zip file shall be."""
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_file() or not zipfile.is_zipfile(target):
        raise BundleError(f"{printable(target)} is no zip file, and only a zip file is overwritten: name another")
    if not overwrite:
        raise BundleError(
            f"{printable(target)} exists already: name another file, or replace it with ", Parameter("overwrite")
        )

"""Where an output file and its ledger are, and whether they can be there."""

import contextlib
import os
from pathlib import Path

from caption_rt.errors import CaptionError, OptionsError, printable
from caption_rt.ledger import check_ledger

__all__ = ["check_output", "ledger_path", "not_ours", "size_of", "sync_folder"]


def check_output(path: Path, existing: str, ledger: Path | None = None) -> None:
    """Refuse an output file before anything is loaded or changed.

    Args:
        path: the file.
        existing: one of `caption_rt.outputs.EXISTING`.
        ledger: where its ledger is; None for beside it.

    Raises:
        OptionsError: it is a folder, its folder is not there, or it is not ours and would have to be changed.
        CaptionError: it, or its ledger, cannot be written where it is.
    """
    name = printable(path)
    if path.is_dir():
        raise OptionsError(f"the output {name} is a folder: name a file")
    if not path.parent.is_dir():
        raise OptionsError(f"the folder of the output {name} does not exist: make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        what = "it" if path.exists() else "its folder"
        raise CaptionError(
            f"the output {name} cannot be written, because {what} is read-only: change that, or write it elsewhere"
        )
    check_ledger(ledger or ledger_path(path))
    if existing in ("resume", "skip") and size_of(path) and not (ledger or ledger_path(path)).exists():
        raise not_ours(path)


def not_ours(path: Path) -> OptionsError:
    """The error of an output file that no ledger answers for."""
    return OptionsError(
        f"the output {printable(path)} exists and was not written by caption-rt, or its ledger is gone: choose "
        "another, or --existing append or overwrite"
    )


def ledger_path(path: Path) -> Path:
    """Where the ledger of an output is unless told."""
    return path.with_name(f"{path.name}.ledger")


def size_of(path: Path) -> int:
    """A file's size in bytes; 0 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where the system knows such a thing."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)

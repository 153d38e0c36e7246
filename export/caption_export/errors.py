"""What goes wrong in an export, as an error that knows its exit code."""

from pathlib import Path
from typing import ClassVar

from caption_rt.errors import CaptionError, printable, remedy_of


class ExportError(CaptionError, RuntimeError):
    """A run cannot be exported, or what was exported does not do what TensorFlow does; no bundle is written."""

    exit_code: ClassVar[int] = 8


def not_written(path: Path, exc: OSError) -> str:
    """A sentence about a file that cannot be written, without the temporary name that it was written under.

    Args:
        path: Where it should have come to.
        exc: What the system said.
    """
    if isinstance(exc, FileExistsError | NotADirectoryError):  # of something above it
        reason, remedy = f"{printable(path.parent)} is not a folder", ""
    else:
        reason, remedy = printable(exc.strerror or exc), remedy_of(exc)
    return f"{printable(path)} cannot be written: {reason}{remedy and ': '}{remedy}"

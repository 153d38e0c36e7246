"""What goes wrong in an export, as an error that knows its exit code."""

from typing import ClassVar

from caption_rt.errors import CaptionError


class ExportError(CaptionError, RuntimeError):
    """A run cannot be exported, or what was exported does not do what TensorFlow does; no bundle is written."""

    exit_code: ClassVar[int] = 8

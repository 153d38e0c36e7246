"""One record of a photo: its caption, or why it has none."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from caption_rt.errors import CaptionError

if TYPE_CHECKING:
    from caption_rt.caption import Caption

__all__ = ["Record", "error_fields"]


@dataclass(frozen=True)
class Record:
    """What is written about one photo."""

    path: str
    """The photo as it was named: a path, "-" or an address. Bytes that are no text are lone surrogates, as Python
    gives them."""
    result: "Caption | CaptionError"
    """The caption, or the error that stands in its place."""
    thumbnail: bytes | None = None
    """A small copy of the photo as a JPEG file, for formats that show it; see `caption_rt.gallery.thumbnail_of`."""

    def to_dict(self) -> dict[str, Any]:
        """The record as values that `json.dumps` takes; "path", "status" and "caption" stand in every record.

        Returns:
            "status" is "ok", and the fields of `Caption.to_dict` follow; or it is "error", "caption" is None, and
            "error" is what `error_fields` gives.
        """
        if isinstance(self.result, CaptionError):
            return {"path": self.path, "status": "error", "caption": None, "error": error_fields(self.result)}
        return {"path": self.path, "status": "ok", **self.result.to_dict()}


def error_fields(error: CaptionError) -> dict[str, str]:
    """An error as a record has it: its "class", its "reason" (see `CaptionError`), and its "message", a sentence."""
    return {"class": type(error).__name__, "reason": error.reason or "is not captioned", "message": str(error)}

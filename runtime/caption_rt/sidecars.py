"""A file beside each photo: its caption as text, or as XMP metadata that photo managers read.

The text file is the convention of image-generation training sets: the caption alone, in a file of the photo's name. XMP
(ISO 16684-1) keeps it as Dublin Core's description. How an existing XMP file takes it stands in `caption_rt.xmp`.
"""

import codecs
import os
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path

from caption_rt import xmp
from caption_rt.errors import CaptionError, OptionsError, printable
from caption_rt.records import Record

__all__ = ["MODES", "namesakes", "sidecar_bytes", "sidecar_path"]

MODES = ("skip", "append", "overwrite")
"""What happens to a sidecar that is there: it stays, the caption is added to it, or takes the older one's place."""


def sidecar_path(photo: Path, name: str, siblings: Collection[str]) -> Path:
    """Where a photo's sidecar stands: `a.txt` for `a.jpg`, but `a.jpg.txt` where `a.txt` could be another photo's too.

    A photo's sidecar has its whole name where another photo of the folder has the same name but for the ending (`a.jpg`
    beside `a.png` or `A.jpg`), or is called as this one without its ending (`a.jpg.png` beside `a.jpg`). Upper and
    lower case count as the same, because on many file systems they are. An XMP file of the whole name that is there
    already is used in any case: digiKam and darktable call theirs so, and would not look at another.

    Args:
        photo: the photo.
        name: the format, one of `caption_rt.writers.SIDECAR_FORMATS`.
        siblings: the names of the photos of its folder, its own among them or not. Of a large folder the `namesakes`
            are enough, and quicker.

    Raises:
        OptionsError: there is no such format.
    """
    _check(name)
    whole = photo.with_name(f"{photo.name}.{name}")
    short = photo.with_name(f"{photo.stem}.{name}")
    if name == "xmp" and os.path.exists(whole):
        return whole
    stem = photo.stem.casefold()
    for other in siblings:
        if other != photo.name and stem in (other.casefold(), Path(other).stem.casefold()):
            return whole
    return short


def namesakes(names: Iterable[str]) -> frozenset[str]:
    """Of the photos of one folder, those that could make `sidecar_path` use a whole name: usually none.

    Args:
        names: the names of all photos of the folder.
    """
    names = set(names)
    stems = Counter(Path(name).stem.casefold() for name in names)
    return frozenset(name for name in names if stems[Path(name).stem.casefold()] > 1 or name.casefold() in stems)


def sidecar_bytes(name: str, record: Record, existing: bytes | None, mode: str = "skip") -> bytes | None:
    """What a photo's sidecar is to hold.

    Args:
        name: the format, one of `caption_rt.writers.SIDECAR_FORMATS`.
        record: the photo's record.
        existing: what the file holds now; None if there is no file.
        mode: one of `MODES`. "append" makes the caption a further line of the text or of the description, unless it is
            one of its lines already. "overwrite" replaces the text, or the description; all else in an XMP file (the
            ratings, keywords and edits of other programs) stays as it is, to the byte.

    Returns:
        The whole new file; None where there is nothing to write: no caption, no word in it, or nothing that changes.

    Raises:
        OptionsError: there is no such format or mode.
        CaptionError: the existing file is not text or XMP that can be added to; it is best left alone.
    """
    _check(name)
    if mode not in MODES:
        raise OptionsError(f"an existing sidecar is treated by {', '.join(MODES)}, not by {printable(mode)!r}")
    if isinstance(record.result, CaptionError) or not record.result.text:
        return None
    caption = printable(record.result.text)
    if existing is None:
        return f"{caption}\n".encode() if name == "txt" else xmp.new(caption)
    if mode == "skip":
        return None
    kind, article = ("text", "a") if name == "txt" else ("XMP", "an")
    try:
        if name == "xmp":
            result = xmp.describe(existing, caption, append=mode == "append")
        else:
            result = f"{caption}\n".encode() if mode == "overwrite" else _append_line(existing, caption)
    except CaptionError as exc:
        raise CaptionError(
            f"the {kind} file of {printable(record.path)} is left as it is: {exc}",
            reason=f"has {article} {kind} file that nothing can be added to",
        ) from exc
    return None if result == existing else result


def _check(name: str) -> None:
    if name not in ("txt", "xmp"):
        raise OptionsError(f"a sidecar's format is txt or xmp, not {printable(name)!r}")


def _append_line(existing: bytes, caption: str) -> bytes:
    """The text with the caption as its last line, in its own encoding and with its own line breaks.

    Raises:
        CaptionError: it begins as text in UTF-16 does, and is not.
    """
    encoding = "utf-8"
    for mark, named in ((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
        if existing.startswith(mark):
            encoding = named
    # Bytes that are no text, of whatever other encoding, come back as they were.
    try:
        text = existing.decode(encoding, "surrogateescape" if encoding == "utf-8" else "surrogatepass")
    except UnicodeDecodeError as exc:
        raise CaptionError("it is not text in UTF-16") from exc
    if caption in (line.strip().lstrip("\ufeff") for line in text.splitlines()):
        return existing
    line_break = "\r\n" if "\r\n" in text else "\n"
    gap = "" if text.strip("\ufeff") == "" or text.endswith("\n") else line_break
    return existing + (gap + caption + line_break).encode(encoding)

"""What a file is, by its ending or by its first bytes: a photo that is read, or else what a sentence calls it."""

import re

__all__ = ["PHOTO_KINDS", "PHOTO_SUFFIXES", "SNIFFED_BYTES", "other_kind", "photo_kind"]

PHOTO_SUFFIXES: frozenset[str] = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".dib", ".webp", ".tif", ".tiff", ".avif")
).union((".avifs", ".heic", ".heif", ".hif"))
"""The endings of photos, in lower case: what a scan of a folder takes. What a file holds decides how it is read."""

SNIFFED_BYTES = 1024
"""How many of a file's first bytes are looked at."""

PHOTO_KINDS: tuple[str, ...] = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "AVIF", "HEIF")
"""What `photo_kind` tells apart, by Pillow's names."""

_MAGICS: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),  # BigTIFF
    (b"MM\0+", "TIFF"),
)

# Sizes of the headers that a BMP file may have after its 14 bytes: without them every text that begins with BM is one.
_BMP_HEADERS = frozenset({12, 16, 40, 52, 56, 64, 108, 124})

# ISO 14496-12, box ftyp: the brands of still images. HEIF's general brands leave the coding to the compatible ones.
_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"})
_HEIF_BRANDS = frozenset({b"mif1", b"mif2", b"msf1"})

_RAW = "a camera's raw file (export it as JPEG)"
_OFFICE = "a ZIP archive or an office document"
_OTHERS: tuple[tuple[bytes, str], ...] = (
    (b"%PDF-", "a PDF document"),
    (b"%!PS", "a PostScript document"),
    (b"\xc5\xd0\xd3\xc6", "a PostScript document"),
    (b"PK\x03\x04", _OFFICE),
    (b"PK\x05\x06", _OFFICE),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old office document or a thumbnail database"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\0", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"\x1aE\xdf\xa3", "a video (Matroska or WebM)"),
    (b"FLV\x01", "a video (Flash)"),
    (b"\0\0\x01\xba", "a video (MPEG)"),
    (b"\0\0\x01\xb3", "a video (MPEG)"),
    (b"0&\xb2u\x8ef\xcf\x11", "a video or a sound (Windows Media)"),
    (b"OggS", "a sound or a video (Ogg)"),
    (b"ID3", "a sound (MP3)"),
    (b"fLaC", "a sound (FLAC)"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image"),
    (b"\xff\x0a", "a JPEG XL image"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 image"),
    (b"\xffO\xffQ", "a JPEG 2000 image"),
    (b"8BPS", "a Photoshop document"),
    (b"gimp xcf", "a GIMP document"),
    (b"\0\0\x01\0", "an icon"),
    (b"IIRO", _RAW),
    (b"IIRS", _RAW),
    (b"IIU\0", _RAW),
    (b"FUJIFILMCCD-RAW", _RAW),
    (b"FOVb", _RAW),
    # What macOS leaves beside the files of a foreign disk, under the name ._photo.jpg.
    (b"\0\x05\x16\x07", "the macOS attributes of a file and not the file (a name that begins with ._)"),
    (b"version https://git-lfs", "a Git LFS pointer in place of the file (git lfs pull brings it)"),
    (b"SQLite format 3\0", "a database"),
    (b"\x7fELF", "a program"),
    (b"MZ", "a program"),
)


def photo_kind(data: bytes) -> str | None:
    """One of `PHOTO_KINDS`, or None for what begins like none of them.

    Args:
        data: a file, or its first `SNIFFED_BYTES`.
    """
    head = data[:SNIFFED_BYTES]
    for magic, kind in _MAGICS:
        if head.startswith(magic):
            # Canon's raw files are TIFF files with a mark; what stands first in them is no picture of use.
            return None if kind == "TIFF" and head[8:10] == b"CR" else kind
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    brands = _brands(head)
    if brands and brands[0] in _AVIF_BRANDS | _HEIC_BRANDS | _HEIF_BRANDS:
        return "AVIF" if brands[0] in _AVIF_BRANDS or _AVIF_BRANDS.intersection(brands) else "HEIF"
    return None


def other_kind(data: bytes) -> str | None:
    """What a file that is no photo holds, with its article, such as "a PDF document"; None if it cannot be told.

    Args:
        data: a file, or its first `SNIFFED_BYTES`.
    """
    head = data[:SNIFFED_BYTES]
    for magic, name in _OTHERS:
        if head.startswith(magic):
            return name
    if head[8:10] == b"CR" and head[:2] in (b"II", b"MM"):
        return _RAW
    if head[257:262] == b"ustar":
        return "a tar archive"
    if head[:4] == b"RIFF":
        return {b"AVI ": "a video (AVI)", b"WAVE": "a sound (WAV)"}.get(head[8:12])
    brands = _brands(head)
    if brands:
        return _RAW if brands[0] == b"crx " else "a video (MP4 or QuickTime)"
    if head[4:8] in (b"moov", b"mdat", b"wide"):  # QuickTime before it had brands
        return "a video (MP4 or QuickTime)"
    if not head.strip(b"\0"):
        return "nothing but zeros"
    return _text_kind(head)


def _brands(head: bytes) -> list[bytes]:
    """The brands of an ISO base media file, its major one first; none for another file."""
    if head[4:8] != b"ftyp":
        return []
    end = min(int.from_bytes(head[:4], "big"), len(head))
    return [head[8:12], *(head[at : at + 4] for at in range(16, end - 3, 4))]


def _text_kind(head: bytes) -> str | None:
    try:
        # The last character may have been cut.
        text = head.decode("utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", errors="strict")
    except UnicodeDecodeError as exc:
        if exc.start < len(head) - 4:
            return None
        text = head[: exc.start].decode("utf-8-sig", errors="ignore")
    if any(ord(char) < 32 and char not in "\t\n\r\f\x1b" for char in text):
        return None
    start = text.strip().lower()
    if not start:
        return None
    if re.search(r"<!doctype html|<html|<head|<body", start):
        return "an HTML page"
    if re.search(r"<svg|<!doctype svg", start):
        return "an SVG drawing"
    if start.startswith("<?xml"):
        return "an XML document"
    return "JSON" if re.match(r'\{\s*"|\[\s*[\[{"]', start) else "text"

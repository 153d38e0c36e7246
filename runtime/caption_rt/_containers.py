"""Photo files, taken apart: pixels here; orientation, colour profile and stated size there.

Pillow reads the pixels. What else is in a file, it parses as well, with a warning for whatever it stumbles over, with
limits that belong to the whole process, and with an exception where a comment is damaged. So it is given each file
without that, and the few things that matter are read here. The formats: ITU-T T.81 and EXIF 2.32 (JPEG), the PNG
specification (third edition), GIF89a, TIFF 6.0 and its big sibling, RFC 9649 (WebP), ISO 23008-12 (HEIF, AVIF).
"""

import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["Parts", "is_cut_short", "orientation_of", "scans", "take_apart"]

_MOST_METADATA = 4 * 2**20  # of a profile or of EXIF data, once decompressed


@dataclass(frozen=True)
class Parts:
    """A photo file, taken apart."""

    data: bytes
    """The file without what Pillow has no need of; the very bytes that were given where there was nothing to leave
    out."""
    exif: bytes = b""
    """EXIF data: a TIFF file, perhaps after the mark `Exif`; empty where there is none, or where Pillow will tell."""
    xmp: bytes = b""
    """XMP data; empty as for `exif`."""
    profile: bytes = b""
    """The ICC profile; empty as for `exif`."""
    size: tuple[int, int] | None = None
    """Width and height in pixels that the file states; None where Pillow tells them before it takes memory for them."""


class _Kept:
    """A file without some stretches of it, in memory that does not grow with their number."""

    def __init__(self, data: bytes) -> None:
        self._whole, self._kept, self._begun = memoryview(data), io.BytesIO(), 0

    def drop(self, start: int, end: int) -> None:
        """Leave out a stretch; each begins behind the one before."""
        self._kept.write(self._whole[self._begun : start])
        self._begun = end

    def data(self) -> bytes:
        """The file without them."""
        self._kept.write(self._whole[self._begun :])
        return self._kept.getvalue()


def take_apart(kind: str, data: bytes) -> Parts:
    """Take a file apart.

    A file that is damaged is taken apart as far as it goes, and left for Pillow to complain about.

    Args:
        kind: one of `caption_rt._sniff.PHOTO_KINDS`.
        data: the file.

    Raises:
        ValueError: a TIFF file without a directory.
    """
    way = _WAYS.get(kind)
    try:
        return Parts(data) if way is None else way(data)
    except (IndexError, struct.error) as exc:
        if kind == "TIFF":
            raise ValueError(str(exc)) from exc
        return Parts(data)


def orientation_of(exif: bytes, xmp: bytes) -> int | None:
    """The orientation that a photo states, 1 to 8, in EXIF data or else in XMP; None for none.

    Raises:
        ValueError: the EXIF data is damaged.
    """
    if exif:
        try:
            for tag, type_, count, value in _tiff_entries(exif.removeprefix(b"Exif\0\0")):
                # EXIF 2.32, tag 0x0112: one number of 16 bits; some write one of 32.
                if tag == 0x0112 and count == 1 and type_ in (3, 4):
                    value = value[: 2 if type_ == 3 else 4]
                    return int.from_bytes(value, "little" if b"II" in exif[:8] else "big")
        except struct.error as exc:
            raise ValueError(str(exc)) from exc
    found = re.search(rb"tiff:Orientation(?:\s*=\s*[\"']|>)\s*([1-8])", xmp)
    return int(found[1]) if found else None


def scans(data: bytes) -> int:
    """How many times a JPEG file goes over its picture; for each, a decoder works through all of it.

    Args:
        data: the file, as `Parts.data` gives it. What stands behind its picture, such as a video, does not count.
    """
    # In coded pixels, 0 or a restart mark stands behind every byte of 255.
    count, at, mark = 0, 2, re.compile(rb"\xff([^\0\xff\xd0-\xd7])")
    while (found := mark.search(data, at)) and found[1] != b"\xd9":
        count += found[1] == b"\xda"
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    return count


def is_cut_short(kind: str, data: bytes) -> bool:
    """Whether a file that could not be decoded lacks its end.

    Args:
        kind: one of `caption_rt._sniff.PHOTO_KINDS`.
        data: the file.
    """
    if kind == "JPEG":  # without the EXIF data, which holds a small picture with an end of its own
        return b"\xff\xd9" not in take_apart(kind, data).data
    if kind == "PNG":
        return b"IEND" not in data
    if kind == "GIF":
        return not data.rstrip(b"\0").endswith(b";")
    if kind == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if kind == "BMP":
        return int.from_bytes(data[2:6], "little") > len(data)
    if kind == "TIFF":
        return _tiff_is_cut_short(data)
    at = 0
    while at + 8 <= len(data):  # ISO 14496-12: boxes; a size of 1 is followed by a long one, 0 reaches to the end
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if size < 8:
            return False
        at += size
    return at != len(data)


# A mark that a length follows; before it there may be fill bytes of 255, junk, and marks that stand alone.
_JPEG_MARK = re.compile(rb"\xff[^\0\x01\xd0-\xd8\xff]")


def _jpeg(data: bytes) -> Parts:
    kept, exif, xmp, profile, at = _Kept(data), bytearray(), b"", {}, 2
    while (found := _JPEG_MARK.search(data, at)) and found.end() + 2 <= len(data):
        at, marker = found.start(), data[found.start() + 1]
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in (0xDA, 0xD9) or end > len(data):  # the pixels begin
            break
        content = data[at + 4 : end]
        if marker == 0xE1 and content.startswith(b"Exif\0\0"):
            exif += content.removeprefix(b"Exif\0\0")
        elif marker == 0xE1 and content.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            xmp = content
        elif marker == 0xE2 and content.startswith(b"ICC_PROFILE\0") and len(content) > 14:
            profile[content[12]] = content[14:]
        # JFIF and Adobe's mark tell what the colours are; the other marks and comments are no matter of the decoder.
        if (0xE1 <= marker <= 0xEF and marker != 0xEE) or marker == 0xFE:
            kept.drop(at, end)
        at = end
    return Parts(kept.data(), bytes(exif), xmp, b"".join(profile[number] for number in sorted(profile)))


# What is needed to decode the pixels of the picture that every viewer shows.
_PNG_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})


def _png(data: bytes) -> Parts:
    kept, exif, raw, xmp, profile, at = _Kept(data), b"", b"", b"", b"", 8
    while at + 12 <= len(data):
        name, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data):
            break
        if name == b"eXIf":
            exif = data[at + 8 : end - 4]
        elif name == b"iCCP":
            profile = data[at + 8 : end - 4]
        elif name == b"zTXt" and data[at + 8 : end].startswith(b"Raw profile type exif\0"):
            raw = data[at + 31 : end - 4]
        elif name == b"iTXt" and data[at + 8 : end].startswith(b"XML:com.adobe.xmp\0\0"):
            xmp = data[at + 8 : end - 4]
        if name not in _PNG_CHUNKS:
            kept.drop(at, end)
        at = end
    # Here, because each may be there any number of times, and a few bytes become megabytes.
    exif = exif or _raw_profile(_inflate(raw))
    return Parts(kept.data(), exif, xmp, _inflate(profile.partition(b"\0")[2][1:]))


def _inflate(data: bytes) -> bytes:
    """Decompress, up to what metadata may hold; empty for damaged data and for more than that."""
    try:
        inflater = zlib.decompressobj()
        content = inflater.decompress(data, _MOST_METADATA)
    except zlib.error:
        return b""
    return b"" if inflater.unconsumed_tail else content


def _raw_profile(text: bytes) -> bytes:
    r"""EXIF data as ImageMagick wrote it before PNG had a place for it: ``\nexif\n  length\nhexadecimal digits``."""
    try:
        return bytes.fromhex("".join(text.decode("ascii").split()[2:]))
    except ValueError:
        return b""


def _gif(data: bytes) -> Parts:
    """The screen and the first frame: a frame may be larger than the screen, and Pillow then widens the screen."""
    screen = struct.unpack_from("<HH", data, 6)
    whole = bytearray(data)
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    while data[at] != 0x2C:  # the image descriptor
        if data[at] == 0x3B:  # the end
            return Parts(data, size=screen)
        if data[at] != 0x21:  # junk rather than an extension
            at += 1
            continue
        if data[at + 1] == 0xF9:
            # What is to become of the frame when the next one comes; Pillow takes memory for that at once.
            whole[at + 3] &= ~0x1C
        at += 2
        while data[at]:
            at += data[at] + 1
        at += 1
    left, top, width, height = struct.unpack_from("<HHHH", data, at + 1)
    size = max(screen[0], left + width), max(screen[1], top + height)
    if size != screen and max(size) <= 0xFFFF:
        struct.pack_into("<HH", whole, 6, *size)
    return Parts(bytes(whole), size=size)


def _webp(data: bytes) -> Parts:
    """The size alone, because the decoder takes memory for it when it is made; Pillow hands out the rest as bytes."""
    size, kind = None, data[12:16]
    if kind == b"VP8X":
        size = int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    elif kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        size = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        size = width & 0x3FFF, height & 0x3FFF
    return Parts(data, size=size)


# TIFF 6.0: the tags that say how to decode, and whether each has one value alone; and the bytes of each type.
_TIFF_TAGS = {256: True, 257: True, 258: False, 259: True, 262: True, 266: True, 273: False, 277: True, 278: True}
_TIFF_TAGS |= {279: False, 284: True, 292: True, 293: True, 317: True, 320: False, 322: True, 323: True, 324: False}
_TIFF_TAGS |= {325: False, 332: True, 338: False, 339: False, 347: False, 512: True, 513: True, 514: True, 515: True}
_TIFF_TAGS |= {519: False, 520: False, 521: False, 529: False, 530: False, 531: True, 532: False, 34675: False}
_TIFF_TYPES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


def _tiff_entries(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Tag, type, count and value (or the place of it) of each entry in the first directory of a TIFF file.

    Raises:
        struct.error: the file ends before its directory.
        ValueError: it is no TIFF file.
    """
    order, magic = {b"II": "<", b"MM": ">"}.get(data[:2]), data[2:4]
    if order is None or magic.strip(b"\0") not in (b"*", b"+"):
        raise ValueError("it does not begin as TIFF data does")
    big = b"+" in magic
    entry, number, place = ("HHQ8s", "Q", 8) if big else ("HHL4s", "H", 4)
    (at,) = struct.unpack_from(order + ("Q" if big else "L"), data, place)
    if at > len(data):
        raise ValueError("its directory lies beyond its end")
    (count,) = struct.unpack_from(order + number, data, at)
    at += struct.calcsize(order + number)
    for _ in range(min(count, (len(data) - at) // struct.calcsize(order + entry))):
        yield struct.unpack_from(order + entry, data, at)
        at += struct.calcsize(order + entry)


def _tiff(data: bytes) -> Parts:
    """The file with a directory of its own at its end: what decoding the first picture needs and what lies within."""
    order, big = ("<" if data[:2] == b"II" else ">"), b"+" in data[2:4]
    room, entry, number = (8, "HHQ8s", "Q") if big else (4, "HHL4s", "H")
    where = order + ("Q" if big else "L")
    profile, kept, left = b"", [], len(data)
    for tag, type_, count, value in _tiff_entries(data):
        unit = _TIFF_TYPES.get(type_)
        if unit is None or tag not in _TIFF_TAGS or count == 0:
            continue
        size = count * unit
        if size > room:
            (place,) = struct.unpack(where, value)
            left -= size
            if place + size > len(data) or left < 0:
                continue
            if tag == 34675:
                profile = data[place : place + size] if size <= _MOST_METADATA else b""
                continue
            if _TIFF_TAGS[tag] and unit <= room:
                count, value = 1, data[place : place + unit]
        elif _TIFF_TAGS[tag]:
            count = 1
        kept.append(struct.pack(order + entry, tag, type_, count, value))
    at = len(data) + len(data) % 2
    header = data[:8] + struct.pack(where, at) if big else data[:4] + struct.pack(where, at)
    directory = struct.pack(order + number, len(kept)) + b"".join(kept) + bytes(room)
    whole = b"".join((header, memoryview(data)[len(header) :], bytes(len(data) % 2), directory))
    return Parts(whole, exif=data, profile=profile)


def _tiff_is_cut_short(data: bytes) -> bool:
    """Whether pixels are said to lie beyond the end, or the directory does."""
    order = "<" if data[:2] == b"II" else ">"
    try:
        tables = {tag: (type_, count, value) for tag, type_, count, value in _tiff_entries(data)}
        ends = []
        for places, sizes in ((273, 279), (324, 325)):
            if places in tables and sizes in tables:
                last = [_tiff_last(data, order, *tables[tag]) for tag in (places, sizes)]
                ends.append(sum(last))
    except (struct.error, ValueError):
        return True
    return any(end > len(data) for end in ends)


def _tiff_last(data: bytes, order: str, type_: int, count: int, value: bytes) -> int:
    """The last number of an entry that holds several.

    Raises:
        ValueError: it lies beyond the end.
    """
    unit = _TIFF_TYPES.get(type_, 4)
    code = order + {1: "B", 2: "H", 4: "L", 8: "Q"}[unit]
    if unit * count <= len(value):
        return int(struct.unpack_from(code, value, unit * max(0, count - 1))[0])
    (place,) = struct.unpack(order + ("Q" if len(value) == 8 else "L"), value)
    if place + unit * count > len(data):
        raise ValueError("it lies beyond the end")
    return int(struct.unpack_from(code, data, place + unit * (count - 1))[0])


def _avif(data: bytes) -> Parts:
    """The file with its EXIF data renamed: AVIF is turned by its boxes irot and imir, never by EXIF data."""
    hidden = re.sub(rb"(infe[\x02\x03].{3}(?:.{2}|.{4})\0\0)Exif", rb"\1skip", data, flags=re.DOTALL)
    return Parts(hidden)


_WAYS: dict[str, Callable[[bytes], Parts]] = {
    "JPEG": _jpeg,
    "PNG": _png,
    "GIF": _gif,
    "WEBP": _webp,
    "TIFF": _tiff,
    "AVIF": _avif,
}

"""Make the malformed photos that the runtime is tested with: every format, damaged in every way we could think of.

    python tests/runtime/make_malformed_images.py FOLDER [--thorough]

The same files on every run: what is random has a seed. A few are sound and only odd; reading one of these files gives
pixels or an ImageError, and never anything else.
"""

import argparse
import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, features

PHOTOS = Path(__file__).resolve().parents[1] / "data" / "photos"

NOT_PHOTOS = {
    "page.jpg": b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n",
    "drawing.png": b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>\n',
    "document.jpg": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "archive.jpg": b"PK\x03\x04" + bytes(60),
    "video.jpg": b"\0\0\0\x20ftypisom\0\0\x02\0isomiso2avc1mp41" + bytes(60),
    "sound.webp": b"RIFF\x24\0\0\0WAVEfmt " + bytes(60),
    "words.jpg": "Ein Hund läuft über die Wiese.\n".encode() * 40,
    "pointer.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
    "zeros.jpg": bytes(5000),
    "postscript.tif": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    "noise.gif": bytes(range(256)) * 20,
}


def make(folder: Path, *, thorough: bool = False) -> list[Path]:
    """Write the files.

    Args:
        folder: made if it is not there.
        thorough: ten times as many of those that are cut or have bits turned over.

    Returns:
        The files, sorted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    good = good_photos()
    files = {"empty.jpg": b"", "empty.png": b"", "one.jpg": b"\xff"} | NOT_PHOTOS
    for name, data in good.items():
        files |= cut(name, data, 100 if thorough else 6)
        files |= turned_over(name, data, 120 if thorough else 12)
        files |= headed_otherwise(name, data, good)
    files |= dict(bombs(good)) | dict(metadata(good))
    paths = []
    for name in sorted(files):
        path = folder / name
        path.write_bytes(files[name])
        paths.append(path)
    return paths


def good_photos() -> dict[str, bytes]:
    """A sound file of every format and kind, by its name."""
    photo = Image.open(PHOTOS / "chelsea.jpg").resize((120, 80))
    other = Image.open(PHOTOS / "coffee.jpg").resize((120, 80))
    alpha = photo.copy()
    alpha.putalpha(other.convert("L"))
    palette = photo.quantize(32)
    kinds: dict[str, tuple[Image.Image, str, dict[str, object]]] = {
        "baseline.jpg": (photo, "JPEG", {"quality": 90, "exif": exif(6)}),
        "progressive.jpg": (photo, "JPEG", {"progressive": True}),
        "cmyk.jpg": (photo.convert("CMYK"), "JPEG", {}),
        "grey.jpg": (photo.convert("L"), "JPEG", {}),
        "colours.png": (photo, "PNG", {"exif": exif(3)}),
        "alpha.png": (alpha, "PNG", {}),
        "palette.png": (palette, "PNG", {"transparency": 3}),
        "deep.png": (photo.convert("L").convert("I;16"), "PNG", {}),
        "still.gif": (palette, "GIF", {}),
        "moving.gif": (photo, "GIF", {"save_all": True, "append_images": [other], "disposal": 2, "loop": 0}),
        "bitmap.bmp": (photo, "BMP", {}),
        "palette.bmp": (palette, "BMP", {}),
        "lossy.webp": (photo, "WEBP", {"exif": exif(8)}),
        "lossless.webp": (alpha, "WEBP", {"lossless": True}),
        "moving.webp": (photo, "WEBP", {"save_all": True, "append_images": [other]}),
        "plain.tif": (photo, "TIFF", {"exif": exif(5)}),
        "lzw.tif": (photo, "TIFF", {"compression": "tiff_lzw"}),
        "jpeg.tif": (photo, "TIFF", {"compression": "jpeg"}),
        "pages.tif": (photo, "TIFF", {"save_all": True, "append_images": [other], "compression": "tiff_adobe_deflate"}),
        "big.tif": (photo, "TIFF", {"big_tiff": True}),
    }
    if find_spec("PIL.AvifImagePlugin") and features.check("avif"):
        kinds["photo.avif"] = (alpha, "AVIF", {"exif": exif(6), "speed": 10})
    files = {}
    for name, (image, format, options) in kinds.items():
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        files[name] = buffer.getvalue()
    if find_spec("pillow_heif"):
        files["photo.heic"] = heic(photo, quality=60, exif=exif(6))
    return files


def heic(image: Image.Image, **options: object) -> bytes:
    """A HEIC file, by pillow-heif."""
    import pillow_heif

    image = image.copy()
    if "icc_profile" in options:
        image.info["icc_profile"] = options.pop("icc_profile")
    heif, buffer = pillow_heif.from_pillow(image), io.BytesIO()
    heif.save(buffer, **options)
    return buffer.getvalue()


def exif(orientation: int) -> bytes:
    """EXIF data that holds an orientation and the name of a camera."""
    data = Image.Exif()
    data[0x0112], data[0x010F] = orientation, "A camera with a long name"
    return data.tobytes()


def cut(name: str, data: bytes, count: int) -> dict[str, bytes]:
    """Files that end too early: after their first bytes, in between, and one byte before their end."""
    lengths = {4, 12, 30, 60, len(data) - 1, *(len(data) * (k + 1) // (count + 1) for k in range(count))}
    return {f"cut-{length:06}-{name}": data[:length] for length in lengths}


def turned_over(name: str, data: bytes, count: int) -> dict[str, bytes]:
    """Files with bits turned over: half of them near the beginning, where the structure is."""
    draw, files = random.Random(name), {}
    for number in range(count):
        damaged = bytearray(data)
        reach = min(len(data), 400) if number % 2 else len(data)
        for _ in range(draw.choice((1, 3, 20))):
            damaged[draw.randrange(4, reach)] ^= 1 << draw.randrange(8)
        files[f"bits-{number:03}-{name}"] = bytes(damaged)
    return files


def headed_otherwise(name: str, data: bytes, good: dict[str, bytes]) -> dict[str, bytes]:
    """Files with the first bytes of another format, and a file under the name of another format."""
    files, endings = {}, set()
    for other, header in good.items():
        ending = Path(other).suffix
        if ending != Path(name).suffix and ending not in endings:
            endings.add(ending)
            files[f"head-{ending[1:]}-{name}"] = header[:16] + data[16:]
    files[f"named-{name}{'.png' if name.endswith('.jpg') else '.jpg'}"] = data
    return files


def png_chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file, its checksum right."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *chunks: bytes, pixels: bytes = bytes(1000)) -> bytes:
    """A PNG file, RGB of 8 bits, whose numbers need not be true."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IDAT", zlib.compress(pixels)) + ENDING


ENDING = png_chunk(b"IEND", b"")


def tiff(entries: list[tuple[int, int, int, int]], next_directory: int = 0) -> bytes:
    """A TIFF file of nothing but a directory: tag, type, count and value of each entry."""
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", next_directory) + bytes(600)


def jpeg_sized(data: bytes, width: int, height: int) -> bytes:
    """A JPEG file that states another size."""
    at = next(at for mark in (b"\xff\xc0", b"\xff\xc2") if (at := data.find(mark)) > 0)
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def isobmff_sized(data: bytes, width: int, height: int) -> bytes:
    """A HEIC or AVIF file that states another size."""
    at = data.index(b"ispe") + 8
    return data[:at] + struct.pack(">II", width, height) + data[at + 8 :]


def webp_sized(width: int, height: int) -> bytes:
    """A WebP file of nothing but a canvas."""
    canvas = struct.pack("<I", 0x02) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", len(canvas)) + canvas + b"ANIM\x06\0\0\0" + bytes(6)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def bombs(good: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """Small files that state huge sizes, or huge counts, or never come to an end."""
    yield "bomb-png.png", png(60_000, 60_000)
    yield "bomb-png-2.png", png(2**31 - 1, 2**31 - 1)
    yield "zero-png.png", png(0, 10)
    yield (
        "bomb-bmp.bmp",
        b"BM" + struct.pack("<IIIIiiHHIIIIII", 90, 0, 54, 40, 65_000, 65_000, 1, 24, *[0] * 6) + bytes(40),
    )
    yield (
        "bomb-bmp-2.bmp",
        b"BM" + struct.pack("<IIIIiiHHIIIIII", 90, 0, 54, 40, 2**31 - 1, -(2**31), 1, 8, 1, *[0] * 5),
    )
    size = [(256, 4, 1, 60_000), (257, 4, 1, 60_000), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 200)]
    yield "bomb-tiff.tif", tiff([*size, (277, 3, 1, 1), (279, 4, 1, 500)])
    yield "bomb-tiff-samples.tif", tiff([*size[2:], (256, 4, 1, 9), (257, 4, 1, 9), (277, 4, 1, 2**31)])
    yield "bomb-tiff-count.tif", tiff([(tag, 3, 2**32 - 1, 8) for tag in (256, 257, 258, 273, 279, 700, 34675)])
    yield "loop-tiff.tif", tiff([], next_directory=8)
    yield "bomb-gif.gif", b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + good["still.gif"][10:]
    yield "bomb-gif-frame.gif", gif_frame(65_535, 65_535)
    yield "odd-gif-frame.gif", gif_frame(120, 3000)
    for name in ("baseline.jpg", "progressive.jpg", "cmyk.jpg"):
        yield f"bomb-{name}", jpeg_sized(good[name], 65_500, 65_500)
        yield f"flat-{name}", jpeg_sized(good[name], 65_500, 8)
        yield f"zero-{name}", jpeg_sized(good[name], 0, 0)
    yield "bomb-scans.jpg", jpeg_of_scans(good["progressive.jpg"], 3000)
    yield "bomb-webp.webp", webp_sized(16_383, 16_383)
    yield "bomb-webp-2.webp", webp_sized(2**24, 2**24)
    for name in ("photo.avif", "photo.heic"):
        if name in good:
            yield f"bomb-{name}", isobmff_sized(good[name], 60_000, 60_000)
            yield f"bomb-2-{name}", isobmff_sized(good[name], 2**32 - 1, 2**32 - 1)


def gif_frame(width: int, height: int) -> bytes:
    """A GIF file of a small screen and a large frame, which is to be wiped afterwards."""
    control = b"!\xf9\x04\x08\0\0\0\0"
    frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\0"
    return b"GIF89a" + struct.pack("<HHBBB", 4, 4, 0x80, 0, 0) + bytes(6) + control + frame + b";"


def jpeg_of_scans(data: bytes, count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    last = data.rfind(b"\xff\xda")
    return data[:last] + data[last:-2] * count + b"\xff\xd9"


def metadata(good: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """Sound pixels beside EXIF data, profiles and comments that are damaged or swell when they are unpacked."""
    photo = Image.open(PHOTOS / "astronaut.jpg").resize((90, 90))
    swelling = zlib.compress(bytes(2**25))
    pixels = b"".join(b"\0" + photo.tobytes()[row * 270 :][:270] for row in range(90))
    for name, chunk in {
        "ztxt": png_chunk(b"zTXt", b"Comment\0\0" + swelling),
        "iccp": png_chunk(b"iCCP", b"Profile\0\0" + swelling),
        "exif": png_chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff"),
        "actl": png_chunk(b"acTL", bytes(8)),
        "raw": png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n 4\n45zz\n")),
    }.items():
        yield f"metadata-{name}.png", png(90, 90, chunk, pixels=pixels)
    damaged = b"Exif\0\0II*\0\x08\0\0\0\x03\0" + b"\x12\x01\x05\0\xff\xff\xff\xff\xff\xff\xff\x7f" * 3
    profile = struct.pack(">I4sI4s4s4s", 9999, b"none", 0x02400000, b"mntr", b"RGB ", b"XYZ ") + bytes(200)
    ways: dict[str, Callable[[], dict[str, object]]] = {
        "exif": lambda: {"exif": damaged},
        "exif-short": lambda: {"exif": b"Exif\0\0II"},
        "profile": lambda: {"icc_profile": profile},
        "profile-noise": lambda: {"icc_profile": random.Random(1).randbytes(3000)},
        "xmp": lambda: {"xmp": b"<x tiff:Orientation='9' \xff\xfe"},
    }
    for way, options in ways.items():
        for format, ending in (("JPEG", "jpg"), ("WEBP", "webp"), ("TIFF", "tif")):
            if format == "TIFF" and "exif" in options():
                continue  # Pillow would parse it while it writes
            buffer = io.BytesIO()
            photo.save(buffer, format, **options())
            yield f"metadata-{way}.{ending}", buffer.getvalue()
    data = good["baseline.jpg"]
    yield "metadata-mpo.jpg", data[:2] + b"\xff\xe2" + struct.pack(">H", 30) + b"MPF\0II*\0" + bytes(20) + data[2:]
    yield "metadata-photoshop.jpg", data[:2] + b"\xff\xed\0\x20Photoshop 3.0\x008BIM" + bytes(12) + data[2:]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--thorough", action="store_true", help="ten times as many")
    arguments = parser.parse_args()
    print(len(make(arguments.folder, thorough=arguments.thorough)), "files in", arguments.folder)

"""The one place where a photo is read: the same pixels in training, in the exporter and on the device."""

import importlib
import importlib.util
import io
import logging
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile

from caption_rt._amounts import byte_counts, pixel_counts
from caption_rt._arguments import whole_number
from caption_rt._colour import to_srgb
from caption_rt._containers import Parts, is_cut_short, orientation_of, scans, take_apart
from caption_rt._sniff import PHOTO_SUFFIXES, other_kind, photo_kind
from caption_rt.errors import ImageError, Parameter, printable, shown

__all__ = [
    "FORMATS",
    "READING",
    "ImageSource",
    "PhotoLimits",
    "open_photo",
    "read_file",
    "read_photo",
    "to_pixels",
]

_log = logging.getLogger(__name__)

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]
"""A path, the bytes of an image file, a PIL image, or a uint8 array: RGB [height, width, 3] or grey [height, width]."""

# An allow-list: Pillow's rarer decoders (EPS runs Ghostscript) have no business with photos of unknown origin. The
# classes are taken one by one, and not by Image.open: it knows one limit of pixels for the whole process, and loads
# all of its common plugins where one is needed.
_PLUGINS = {
    "JPEG": ("PIL.JpegImagePlugin", "JpegImageFile"),
    "PNG": ("PIL.PngImagePlugin", "PngImageFile"),
    "GIF": ("PIL.GifImagePlugin", "GifImageFile"),
    "BMP": ("PIL.BmpImagePlugin", "BmpImageFile"),
    "WEBP": ("PIL.WebPImagePlugin", "WebPImageFile"),
    "TIFF": ("PIL.TiffImagePlugin", "TiffImageFile"),
    "AVIF": ("PIL.AvifImagePlugin", "AvifImageFile"),
}

FORMATS: tuple[str, ...] = tuple(
    # AVIF came with Pillow 11.3.
    name
    for name, (module, _) in _PLUGINS.items()
    if name != "AVIF" or importlib.util.find_spec(module)
)
"""The file formats that Pillow reads for us, by its names. HEIF comes to them with the extra `heif`."""

# EXIF 2.32, tag 0x0112: what undoes each orientation that a camera may have stored.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# A progressive JPEG has about ten scans. With thousands of a few bytes each it would keep a decoder busy for hours.
_MOST_SCANS = 100


@dataclass(frozen=True)
class PhotoLimits:
    """What a photo may cost; looked at before any of it is decoded.

    Raises:
        OptionsError: a limit that is not a whole number, or out of its range.
    """

    max_pixels: int = 178_956_970
    """The most pixels, width times height, 1 to 2**32; the default is where Pillow refuses as well."""
    max_bytes: int = 256 * 2**20
    """The largest file, in bytes, 1 to 2**40."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, value, most in (("max_pixels", self.max_pixels, 2**32), ("max_bytes", self.max_bytes, 2**40)):
            object.__setattr__(self, name, whole_number(name, value, 1, most))


_LIMITS = PhotoLimits()


READING = 2
"""Which way `read_photo` reads: raised with every change of the pixels that it gives, so that grids which were kept of
others are not taken for these (`caption_train.cache`). 2: decoded whole, in sRGB."""


def read_photo(
    source: ImageSource, size: int, *, limits: PhotoLimits = _LIMITS, name: str | None = None
) -> NDArray[np.uint8]:
    """A photo as the extractor takes it.

    The photo is squeezed into a square, as TensorFlow's image-captioning tutorial does, by Pillow's bilinear filter,
    which averages over all the pixels that fall together. It is decoded whole: every faster way changes the words of
    some photos (benchmarks/reading.py).

    Args:
        source: the photo; see `ImageSource`.
        size: pixels on each side of the result.
        limits: what the photo may cost.
        name: how errors call a photo that is given as bytes, such as the path that they came from.

    Returns:
        uint8 [size, size, 3], RGB, upright.

    Raises:
        ImageError: the photo cannot be read.
    """
    return to_pixels(open_photo(source, limits=limits, name=name), size)


def to_pixels(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """An open photo as the extractor takes it: the second half of `read_photo`.

    Args:
        image: a PIL image of mode RGB, as `open_photo` gives it.
        size: pixels on each side of the result.

    Returns:
        uint8 [size, size, 3], RGB.
    """
    return np.array(image.resize((size, size), Image.Resampling.BILINEAR), dtype=np.uint8)


def open_photo(
    source: ImageSource,
    *,
    at_least: int | None = None,
    limits: PhotoLimits = _LIMITS,
    name: str | None = None,
) -> Image.Image:
    """A photo, decoded: upright by its orientation, in sRGB, transparent places white, the first frame of several.

    Args:
        source: the photo; see `ImageSource`. What a file holds decides, and not its name.
        at_least: a JPEG file may be decoded at 1/2, 1/4 or 1/8 of its size as long as no side gets shorter than this
            many pixels; None decodes it whole.
        limits: what the photo may cost; an array has been paid for and has none.
        name: how errors call a photo that is given as bytes, such as the path that they came from.

    Returns:
        A PIL image of mode RGB; for a PIL image that is already so, the very image that was given.

    Raises:
        ImageError: the photo is missing, empty, damaged, of an unknown format, too large, or no photo at all.
    """
    if isinstance(source, Image.Image):
        return _from_pil(source, limits, "the PIL image" if name is None else shown(name))
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        return _from_bytes(read_file(path, limits), at_least, limits, path)
    if isinstance(source, bytes | bytearray | memoryview):
        return _from_bytes(bytes(source), at_least, limits, name)
    raise ImageError(
        f"a photo is a path, bytes, a PIL image or a uint8 array, and {type(source).__name__} is none of them",
        reason="is no photo",
    )


def read_file(path: str | os.PathLike[str], limits: PhotoLimits = _LIMITS) -> bytes:
    """The bytes of a photo's file; `open_photo` and `read_photo` take them.

    Args:
        path: the file.
        limits: how large it may be; looked at before it is read.

    Returns:
        Its bytes, at least one.

    Raises:
        ImageError: there is no such file, it is empty, too large, no regular file, or it cannot be read.
    """
    path = os.fspath(path)
    if not path:  # which the file system would take as the folder we are in
        raise ImageError("the path of a photo is empty: name an image file", reason="has an empty path")
    name = shown(path)
    try:
        mode = Path(path).stat()
        if stat.S_ISDIR(mode.st_mode):
            raise ImageError(f"{name} is a folder: name the photos in it", reason="is a folder")
        # Opening a named pipe would wait for ever, and a device has no end.
        if not stat.S_ISREG(mode.st_mode):
            raise ImageError(f"{name} is not a regular file: name an image file", reason="is not a regular file")
        _check_bytes(mode.st_size, limits, name)
        with Path(path).open("rb") as file:
            # No more than that, because a file may grow meanwhile.
            data = file.read(limits.max_bytes + 1)
        _check_bytes(len(data), limits, name)
        return data
    except ImageError:
        raise
    except FileNotFoundError as exc:
        raise ImageError(f"{name} does not exist: check the path", reason="does not exist") from exc
    except PermissionError as exc:
        raise ImageError(f"{name} may not be read: check its permissions", reason="may not be read") from exc
    except OSError as exc:
        why = f"cannot be read ({printable(exc.strerror or exc)})"
        raise ImageError(f"{name} {why}: check the path and its disk", reason=why) from exc
    except ValueError as exc:
        raise ImageError(
            f"{name} is no path: none has a zero byte in it, or what cannot be encoded", reason="is no path"
        ) from exc


def _from_bytes(data: bytes, at_least: int | None, limits: PhotoLimits, path: str | None) -> Image.Image:
    name = "the image data" if path is None else shown(path)
    _check_bytes(len(data), limits, name)
    kind = photo_kind(data)
    if kind is None:
        raise _no_photo(data, name, path)
    try:
        parts = take_apart(kind, data)
        if parts.size is not None:
            _check_pixels(parts.size, limits, name, len(data))
        if kind == "JPEG" and (count := scans(parts.data)) > _MOST_SCANS:
            raise ImageError(
                f"{name} has {count} scans, and a JPEG photo has about ten: save it anew", reason="has too many scans"
            )
        with _opened(kind, parts, limits, name) as image:
            if at_least is not None:
                # Only Pillow's JPEG decoder does anything here; it never goes below the size asked for.
                image.draft(None, (at_least, at_least))
            image.load()
            upright = _upright(image, None if kind == "HEIF" else _orientation(image, parts, name))
            return to_srgb(upright, parts.profile or image.info.get("icc_profile") or b"", name)
    except ImageError:
        raise
    except MemoryError as exc:
        raise ImageError(
            f"{name} needs more memory than there is: scale it down first", reason="needs more memory than there is"
        ) from exc
    # A decoder may meet any kind of damage with any kind of exception; whatever it is, this photo cannot be read.
    except Exception as exc:
        # What it says of its insides helps nobody who only has the file; it stays as the cause.
        _log.info("%s: %s: %s", name, type(exc).__name__, exc)
        how = "is cut short" if "truncated" in str(exc).lower() or is_cut_short(kind, data) else "is damaged"
        raise ImageError(f"{name} {how}: copy it again from its source", reason=how) from exc


class _InPieces(io.BytesIO):
    """A file that gives few bytes at a time unless it is asked for all.

    Pillow holds a WebP file's size against the limit of the whole process where it sees it in its first read.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(size if size is None or size < 0 else min(size, 20))


def _opened(kind: str, parts: Parts, limits: PhotoLimits, name: str) -> Image.Image:
    """The file, open, its size checked; decoded only where HEIF's library knows no other way."""
    if kind == "HEIF":
        heif = _heif_library(name).open_heif(io.BytesIO(parts.data))
        _check_pixels(heif.size, limits, name, len(parts.data))
        photo: Image.Image = heif.to_pillow()
        photo.info["icc_profile"] = heif.info.get("icc_profile")
        return photo
    module_name, class_name = _PLUGINS[kind]
    module = importlib.import_module(module_name) if kind in FORMATS else None
    if module is None or not getattr(module, "SUPPORTED", True):
        raise ImageError(
            f"{name} is an {kind} photo, which this Pillow cannot read: pip install -U Pillow brings it",
            reason=f"is an {kind} photo, which this Pillow cannot read",
        )
    image: ImageFile.ImageFile = getattr(module, class_name)((_InPieces if kind == "WEBP" else io.BytesIO)(parts.data))
    _check_pixels(image.size, limits, name, len(parts.data))
    if kind == "TIFF":
        # Otherwise Pillow would hold it against the limit of the whole process.
        image.im = Image.new(image.mode, image.size, None).im
    return image


def _heif_library(name: str) -> ModuleType:
    """pillow-heif, which is used as it is and never put among Pillow's plugins: those belong to the whole process."""
    try:
        return importlib.import_module("pillow_heif")
    except ImportError as exc:
        raise ImageError(
            f"{name} is a HEIC photo: pip install 'caption-rt[heif]' brings what reads it",
            reason="is a HEIC photo, which needs the extra heif",
        ) from exc


def _from_pil(image: Image.Image, limits: PhotoLimits, name: str) -> Image.Image:
    _check_pixels(image.size, limits, name, None)
    try:
        image.load()
        return to_srgb(_upright(image, _orientation(image, None, name)), image.info.get("icc_profile") or b"", name)
    except ImageError:
        raise
    except Exception as exc:  # as in _from_bytes
        _log.info("%s: %s: %s", name, type(exc).__name__, exc)
        raise ImageError(
            f"{name} is cut short or damaged: open it again from its source", reason="is cut short or damaged"
        ) from exc


def _orientation(image: Image.Image, parts: Parts | None, name: str) -> int | None:
    try:
        if parts is None:
            return image.getexif().get(ExifTags.Base.Orientation)
        xmp = parts.xmp or image.info.get("xmp", b"")
        return orientation_of(parts.exif or image.info.get("exif", b""), xmp if isinstance(xmp, bytes) else b"")
    # Broken EXIF data comes as whatever its parser stumbles over. The pixels are good, so the photo is kept.
    except Exception as exc:
        _log.info("%s: EXIF data cannot be read (%s); taken as upright", name, exc)
        return None


def _upright(image: Image.Image, orientation: int | None) -> Image.Image:
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _from_array(array: NDArray[np.uint8]) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise ImageError(
            f"an image array is uint8 [height, width, 3] or [height, width], not {array.dtype} {list(array.shape)}",
            reason="is no photo",
        )
    if array.size == 0:
        raise ImageError(f"the image array is empty: its shape is {list(array.shape)}", reason="is empty")
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def _check_bytes(count: int, limits: PhotoLimits, name: str) -> None:
    if count == 0:
        raise ImageError(f"{name} is empty (0 bytes): copy it again from its source", reason="is empty")
    if count > limits.max_bytes:
        size, most = byte_counts(count, limits.max_bytes)
        raise ImageError(
            f"{name} is a file of {size}, and the limit is {most}: scale it down, or raise ",
            Parameter("max_bytes"),
            reason="is too large a file",
        )


def _check_pixels(size: tuple[int, int], limits: PhotoLimits, name: str, count: int | None) -> None:
    pixels = size[0] * size[1]
    if pixels <= limits.max_pixels:
        return
    # A photo takes a tenth of a byte a pixel and more; a bomb states pixels that it does not have.
    bomb = count is not None and pixels > 1000 * count
    stated = f"{name} states {size[0]} x {size[1]} pixels"
    if bomb:
        raise ImageError(
            f"{stated} in a file of {count} bytes, which is a decompression bomb: delete it",
            reason="is a decompression bomb",
        )
    found, most = pixel_counts(pixels, limits.max_pixels)
    raise ImageError(
        f"{stated} ({found}), and the limit is {most}: scale it down, or raise ",
        Parameter("max_pixels"),
        reason="has too many pixels",
    )


def _readable() -> str:
    """The formats that can be read here, for a sentence."""
    names = []
    for name in FORMATS:
        if getattr(importlib.import_module(_PLUGINS[name][0]), "SUPPORTED", True):
            names.append(name)
    if importlib.util.find_spec("pillow_heif"):
        names.append("HEIC")
    return ", ".join(names)


def _no_photo(data: bytes, name: str, path: str | None) -> ImageError:
    what = other_kind(data)
    if what is None:
        return ImageError(
            f"{name} is not an image, or its beginning is damaged: {_readable()} are read", reason="is not an image"
        )
    named = path is not None and os.path.splitext(path)[1].lower() in PHOTO_SUFFIXES
    return ImageError(
        f"{name} is {'named like a' if named else 'no'} photo and holds {what}: {_readable()} are read",
        reason=f"holds {what}",
    )

"""The one place where a photo is read: the same pixels in training, in the exporter and on the device."""

import importlib.util
import io
import logging
import os
import stat
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from caption_rt.errors import ImageError, printable

__all__ = ["FORMATS", "ImageSource", "open_photo", "read_photo"]

_log = logging.getLogger(__name__)

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]
"""A path, the bytes of an image file, a PIL image, or a uint8 array: RGB [height, width, 3] or grey [height, width]."""

# An allow-list: Pillow's rarer decoders (EPS runs Ghostscript) have no business with photos of unknown origin. JPEG
# stands first, so that Pillow loads its other plugins only for a file that needs one. AVIF came with Pillow 11.3.
FORMATS: tuple[str, ...] = (
    "JPEG",
    "PNG",
    "GIF",
    "BMP",
    "WEBP",
    "TIFF",
    *(("AVIF",) if importlib.util.find_spec("PIL.AvifImagePlugin") else ()),
)
"""The file formats that are read, by Pillow's names."""

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


def read_photo(source: ImageSource, size: int) -> NDArray[np.uint8]:
    """A photo as the extractor takes it.

    The photo is squeezed into a square, as TensorFlow's image-captioning tutorial does, by Pillow's bilinear filter,
    which averages over all the pixels that fall together. A JPEG is decoded at a fraction of its size where that leaves
    at least ``2 * size`` pixels on the short side; it is three times faster for a photo of 12 megapixels.

    Args:
        source: the photo; see `ImageSource`.
        size: pixels on each side of the result.

    Returns:
        uint8 [size, size, 3], RGB, upright.

    Raises:
        ImageError: the photo cannot be read.
    """
    photo = open_photo(source, at_least=2 * size)
    return np.array(photo.resize((size, size), Image.Resampling.BILINEAR), dtype=np.uint8)


def open_photo(source: ImageSource, *, at_least: int | None = None) -> Image.Image:
    """A photo, decoded: upright by its EXIF orientation, RGB, transparent places white, the first frame of several.

    Args:
        source: the photo; see `ImageSource`.
        at_least: a JPEG file may be decoded at 1/2, 1/4 or 1/8 of its size as long as no side gets shorter than this
            many pixels; None decodes it whole.

    Returns:
        A PIL image of mode RGB; for a PIL image that is already so, the very image that was given.

    Raises:
        ImageError: the photo is missing, empty, damaged, of an unknown format, or has too many pixels.
    """
    if isinstance(source, Image.Image):
        return _decode(source, "the PIL image", None)
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, bytes | bytearray | memoryview):
        if not source:
            raise ImageError("the image data is empty: 0 bytes were given")
        return _open(io.BytesIO(source), "the image data", at_least)
    if isinstance(source, str | os.PathLike):
        return _open_path(os.fspath(source), at_least)
    raise ImageError(
        f"a photo is a path, bytes, a PIL image or a uint8 array, and {type(source).__name__} is none of them"
    )


def _open_path(path: str, at_least: int | None) -> Image.Image:
    if not path:  # which the file system would take as the folder we are in
        raise ImageError("the path of a photo is empty: name an image file")
    name = printable(path)
    try:
        mode = Path(path).stat()
        if stat.S_ISDIR(mode.st_mode):
            raise ImageError(f"{name} is a folder: name the photos in it")
        # Opening a named pipe would wait for ever, and a device has no end.
        if not stat.S_ISREG(mode.st_mode):
            raise ImageError(f"{name} is not a regular file: name an image file")
        if mode.st_size == 0:
            raise ImageError(f"{name} is empty (0 bytes): copy it again from its source")
        with Path(path).open("rb") as file:
            return _open(file, name, at_least)
    except FileNotFoundError as exc:
        raise ImageError(f"{name} does not exist: check the path") from exc
    except PermissionError as exc:
        raise ImageError(f"{name} may not be read: check its permissions") from exc
    except OSError as exc:
        raise ImageError(f"{name} cannot be read: {printable(exc.strerror or exc)}") from exc
    except ValueError as exc:
        if isinstance(exc, ImageError):
            raise
        # A path with a zero byte in it.
        raise ImageError(f"{name} is not a valid path: {printable(exc)}") from exc


def _open(file: BinaryIO, name: str, at_least: int | None) -> Image.Image:
    try:
        with Image.open(file, formats=FORMATS) as image:
            return _decode(image, name, at_least)
    except ImageError:
        raise
    except UnidentifiedImageError as exc:
        known = ", ".join(FORMATS)
        raise ImageError(f"{name} is not an image, or its beginning is damaged: {known} are read") from exc
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise _too_large(name) from exc
    # A decoder may meet any kind of damage with any kind of exception; whatever it is, this photo cannot be read.
    except Exception as exc:
        raise _damaged(name, exc) from exc


def _decode(image: Image.Image, name: str, at_least: int | None) -> Image.Image:
    """Load the pixels and turn them into upright RGB."""
    try:
        if at_least is not None:
            # Only Pillow's JPEG decoder does anything here; it never goes below the size asked for.
            image.draft(None, (at_least, at_least))
        image.load()
        return _to_rgb(_upright(image, name), name)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise _too_large(name) from exc
    except Exception as exc:  # as in _open
        raise _damaged(name, exc) from exc


def _upright(image: Image.Image, name: str) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    # Broken EXIF data comes as whatever its parser stumbles over. The pixels are good, so the photo is kept.
    except Exception as exc:
        _log.info("%s: EXIF data cannot be read (%s); taken as upright", name, exc)
        return image
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise ImageError(f"{name} holds floating-point values without a stated range: convert it to 8 bits a channel")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion cuts off at 255 rather than scaling 16 bits to 8.
        grey = np.clip(np.asarray(image, dtype=np.int64), 0, 65535) >> 8
        image = Image.fromarray(grey.astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_array(array: NDArray[np.uint8]) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise ImageError(
            f"an image array is uint8 [height, width, 3] or [height, width], not {array.dtype} {list(array.shape)}"
        )
    if array.size == 0:
        raise ImageError(f"the image array is empty: its shape is {list(array.shape)}")
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def _too_large(name: str) -> ImageError:
    # Pillow warns at its limit and refuses at twice that; an application that treats warnings as errors stops earlier.
    limit = (Image.MAX_IMAGE_PIXELS or 0) * 2 / 1e6
    return ImageError(f"{name} has too many pixels (at most {limit:.0f} million are read): scale it down first")


def _damaged(name: str, exc: Exception) -> ImageError:
    return ImageError(f"{name} is cut short or damaged ({printable(exc)}): copy it again from its source")

"""Colours: whatever a photo's own are, sRGB is what the network was trained on and what a screen shows."""

import io
import logging
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from caption_rt.errors import ImageError

if TYPE_CHECKING:
    from PIL import ImageCms

__all__ = ["to_srgb"]

_log = logging.getLogger(__name__)

# ICC.1:2022, 7.2.6: the colour space of a profile, and the mode of an image that it can be about.
_MODES = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK", b"Lab ": "LAB"}

# The many profiles that mean sRGB give values that differ by their makers' rounding.
_SAME = 2


def to_srgb(image: Image.Image, profile: bytes, name: str) -> Image.Image:
    """An image in sRGB, transparent places white.

    Args:
        image: of any mode; its pixels are loaded.
        profile: its ICC profile, or nothing. One that is broken or about other colours is passed over, and logged.
        name: what to call the photo in a sentence.

    Returns:
        A PIL image of mode RGB; the very image that was given where there is nothing to do.

    Raises:
        ImageError: its values have no stated range.
    """
    flat = _flat(image, name)
    if profile or flat.mode == "LAB":
        try:
            converted = _converted(flat, profile)
        # LittleCMS has many ways to dislike a profile. The pixels are good, so the photo is kept.
        except Exception as exc:
            _log.info("%s: the colour profile cannot be used (%s); passed over", name, exc)
        else:
            return converted
    return flat if flat.mode == "RGB" else flat.convert("RGB")


def _flat(image: Image.Image, name: str) -> Image.Image:
    """Of mode RGB, L, CMYK or LAB: 8 bits, no palette, nothing transparent."""
    if image.mode == "F":
        raise ImageError(
            f"{name} holds floating-point values without a stated range: convert it to 8 bits a channel",
            reason="holds floating-point values",
        )
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion cuts off at 255 rather than scaling 16 bits to 8.
        grey = np.clip(np.asarray(image, dtype=np.int64), 0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in _MODES.values() else image.convert("RGB")


def _converted(image: Image.Image, profile: bytes) -> Image.Image:
    if profile and _MODES.get(profile[16:20]) != image.mode:
        raise ValueError(f"it is about {profile[16:20]!r} and the photo is {image.mode}")
    transform = _transform(profile, image.mode)
    if transform is None:
        return image if image.mode == "RGB" else image.convert("RGB")
    converted = transform.apply(image)
    assert converted is not None  # as it is only when a photo is converted in place
    return converted


@lru_cache(maxsize=8)  # a folder's photos come from a few cameras
def _transform(profile: bytes, mode: str) -> "ImageCms.ImageCmsTransform | None":
    """From a profile to sRGB; None where that is what Pillow's own conversion gives."""
    from PIL import ImageCms  # LittleCMS, which most photos do without

    source = ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile else ImageCms.createProfile("LAB")
    transform = ImageCms.buildTransform(
        source,
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    if mode in ("RGB", "L"):
        levels = np.linspace(0, 255, 9 if mode == "RGB" else 256).astype(np.uint8)
        cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3) if mode == "RGB" else levels[None]
        probe = Image.fromarray(cube)
        converted = transform.apply(probe)
        difference = np.asarray(converted, np.int16) - np.asarray(probe.convert("RGB"), np.int16)
        if np.abs(difference).max() <= _SAME:
            return None
    return transform

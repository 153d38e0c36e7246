"""Colour profiles: what a photo's numbers mean, against the matrices of the standards."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from caption_rt.image import FORMATS, open_photo
from runtime.make_malformed_images import heic


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def icc_profile(matrix, gamma=2.2, space=b"RGB "):
    """An ICC profile, version 2 (ICC.1:2001-04): primaries or grey, and one gamma.

    Args:
        matrix: the red, green and blue primaries as XYZ under D50, a row each.
        gamma: of each channel.
        space: b"RGB " or b"GRAY".
    """
    curve = b"curv" + bytes(4) + (1).to_bytes(4, "big") + round(gamma * 256).to_bytes(2, "big") + bytes(2)
    white = [0.9642, 1.0, 0.8249]
    tags = [(b"wtpt", white), *zip((b"rXYZ", b"gXYZ", b"bXYZ"), matrix, strict=False)]
    content = [(n, b"XYZ " + bytes(4) + b"".join(round(v * 65536).to_bytes(4, "big") for v in xyz)) for n, xyz in tags]
    content += [(name, curve) for name in ((b"kTRC",) if space == b"GRAY" else (b"rTRC", b"gTRC", b"bTRC"))]
    content += [(b"desc", b"desc" + bytes(4) + (5).to_bytes(4, "big") + b"Test\0" + bytes(79))]
    table, data, at = b"", b"", 132 + 12 * len(content)
    for name, value in content:
        table += name + (at + len(data)).to_bytes(4, "big") + len(value).to_bytes(4, "big")
        data += value + bytes(-len(value) % 4)
    header = (at + len(data)).to_bytes(4, "big") + bytes(4) + b"\2\x10\0\0mntr" + space + b"XYZ " + bytes(12) + b"acsp"
    header += bytes(28) + b"".join(round(v * 65536).to_bytes(4, "big") for v in white)
    return header.ljust(128, b"\0") + len(content).to_bytes(4, "big") + table + data


# XYZ under D50 of the primaries of Adobe RGB (1998), whose green lies far outside sRGB, and of sRGB.
ADOBE = [[0.60974, 0.31111, 0.01947], [0.20528, 0.62567, 0.06087], [0.14919, 0.06322, 0.74457]]
SRGB = [[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.7141]]


def adobe_to_srgb(values):
    """What sRGB values a colour of Adobe RGB has, by the matrices (IEC 61966-2-1)."""
    linear = (np.asarray(values) / 255) ** 2.2 @ np.array(ADOBE) @ np.linalg.inv(np.array(SRGB))
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF", "HEIC"])
def test_a_wide_gamut_is_converted_to_srgb(format):
    colours = [(200, 60, 40), (60, 180, 80), (128, 128, 128), (40, 60, 200), (255, 255, 255)]
    expected = [adobe_to_srgb(colour) for colour in colours]
    assert np.abs(np.subtract(expected, colours)).max() > 30
    photo = Image.fromarray(np.kron(np.array([colours], np.uint8), np.ones((32, 32, 1), np.uint8)))
    options = {"icc_profile": icc_profile(ADOBE)}
    if format == "HEIC":
        pytest.importorskip("pillow_heif", reason="the extra heif is not installed")
        data = heic(photo, quality=98, chroma=444, **options)
    elif format in FORMATS:
        data = encode(photo, format, **options, **({} if format in ("PNG", "TIFF") else {"quality": 98}))
    else:
        pytest.skip("this Pillow reads no AVIF")
    pixels = np.asarray(open_photo(data), float)[16, 16::32]
    assert np.abs(pixels - expected).max() <= (2 if format in ("PNG", "TIFF") else 8)


def test_a_profile_that_is_srgb_changes_nothing(photos):
    original = Image.open(photos[0])
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = encode(original, "PNG", icc_profile=own)
    np.testing.assert_array_equal(np.asarray(open_photo(data)), np.asarray(original))
    assert open_photo(original) is original


def test_grey_and_transparent_photos_are_converted_as_well():
    grey = open_photo(encode(Image.new("L", (2, 2), 100), "PNG", icc_profile=icc_profile([], 1.0, b"GRAY")))
    assert abs(grey.getpixel((0, 0))[0] - 168) <= 1  # linear 100 / 255, as sRGB writes it
    layer = Image.new("RGBA", (1, 1), (60, 180, 80, 255))
    data = encode(layer, "PNG", icc_profile=icc_profile(ADOBE))
    assert np.abs(open_photo(data).getpixel((0, 0)) - adobe_to_srgb((60, 180, 80))).max() <= 2


def test_a_broken_profile_costs_no_photo(photos, caplog):
    original = Image.open(photos[1])
    for profile in (b"no profile", icc_profile(ADOBE)[:300], icc_profile([], 2.2, b"GRAY")):
        caplog.clear()
        with caplog.at_level("INFO", "caption_rt"):
            photo = open_photo(encode(original, "PNG", icc_profile=profile))
        np.testing.assert_array_equal(np.asarray(photo), np.asarray(original))
        assert "the colour profile cannot be used" in caplog.text

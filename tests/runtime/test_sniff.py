"""What a file is, by its first bytes."""

import pytest

from caption_rt.errors import ImageError
from caption_rt.image import FORMATS, open_photo


@pytest.mark.parametrize(
    ("begins", "what"),
    [
        (b"<!DOCTYPE html>\n<html>", "an HTML page"),
        (b"\n<?xml version='1.0'?><!-- x --><svg>", "an SVG drawing"),
        (b"<?xml version='1.0'?><rss>", "an XML document"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "a PostScript document"),
        (b"PK\x03\x04rest", "a ZIP archive or an office document"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0isomiso2", "a video (MP4 or QuickTime)"),
        (b"\0\0\0\x18ftypcrx \0\0\0\0crx isom", "a camera's raw file (export it as JPEG)"),
        (b"II*\0\x10\0\0\0CR\2\0", "a camera's raw file (export it as JPEG)"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "a sound (WAV)"),
        (b"\xff\x0a\xfa\x1f", "a JPEG XL image"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer in place of the file"),
        (b"\0\x05\x16\x07\0\2\0\0Mac OS X", "the macOS attributes of a file"),
        (bytes(4000), "nothing but zeros"),
        ('{"error": "nö"}'.encode(), "JSON"),
        ("Grüße aus dem Süden\n".encode() * 100, "text"),
        (b"\xff\xfet\0e\0x\0t\0", "text"),
        (b"BM is how this text begins", "text"),
    ],
)
def test_what_is_named_like_a_photo_and_is_none_is_called_by_its_name(begins, what):
    with pytest.raises(ImageError) as caught:
        open_photo(begins, name="holiday.JPG")
    assert str(caught.value).startswith(f"holiday.JPG is named like a photo and holds {what}")
    assert f": {', '.join(FORMATS)}" in str(caught.value)
    assert str(caught.value).endswith(" are read")
    with pytest.raises(ImageError, match="the image data is no photo and holds "):
        open_photo(begins)

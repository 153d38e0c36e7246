"""Reading photos: the same pixels from every kind of source, and one sentence for every kind of damage."""

import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from caption_rt._sniff import PHOTO_SUFFIXES
from caption_rt.errors import ImageError, OptionsError
from caption_rt.image import FORMATS, READING, PhotoLimits, open_photo, read_file, read_photo, to_pixels
from runtime.make_malformed_images import exif, gif_frame, heic, jpeg_of_scans, png, png_chunk

# What undoes EXIF orientation n, told by where the stored image's top left corner belongs: an L of known pixels.
UPRIGHT = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.T,
    6: np.rot90(UPRIGHT),
    7: np.rot90(UPRIGHT, 2).T,
    8: np.rot90(UPRIGHT, -1),
}


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_path_bytes_image_and_array_give_the_same_pixels(photos):
    for path in photos:
        pixels = np.asarray(Image.open(path))
        whole = [open_photo(source) for source in (path, str(path), path.read_bytes(), Image.open(path), pixels)]
        for image in whole:
            assert image.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(image), pixels)
        expected = np.asarray(Image.open(path).resize((64, 64), Image.Resampling.BILINEAR))
        photo = read_photo(pixels, 64)
        assert photo.dtype == np.uint8
        assert photo.shape == (64, 64, 3)
        np.testing.assert_array_equal(photo, expected)
        np.testing.assert_array_equal(read_photo(path, 299), read_photo(path.read_bytes(), 299))


def test_a_large_jpeg_is_decoded_smaller_on_request_but_never_below_what_was_asked(photos):
    large = Image.open(photos[1]).resize((2000, 1600))
    data = encode(large, "JPEG", quality=95)
    assert open_photo(data).size == (2000, 1600)
    assert open_photo(data, at_least=400).size == (500, 400)
    assert open_photo(data, at_least=401).size == (1000, 800)
    assert open_photo(data, at_least=5000).size == (2000, 1600)
    assert open_photo(encode(large, "PNG"), at_least=400).size == (2000, 1600)
    exact = np.asarray(open_photo(data).resize((64, 64), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(read_photo(data, 64), exact)
    # The difference of the draft is small.
    draft = to_pixels(open_photo(data, at_least=128), 64)
    assert 0 < np.abs(draft - exact.astype(float)).mean() < 1.5


def test_a_file_and_its_bytes_are_read_in_two_steps_as_in_one(photos):
    data = read_file(photos[0])
    assert data == photos[0].read_bytes()
    np.testing.assert_array_equal(to_pixels(open_photo(data), 75), read_photo(photos[0], 75))


def test_the_pixels_that_reading_gives_have_a_number():
    """What `READING` stands for, by two photos that every decoder gives exactly.

    A PNG is lossless, and a grey JPEG of flat blocks has no frequency whose rounding could differ between libjpegs;
    half of its size would have other pixels. Orientation, alpha and resizing are Pillow's, in whole numbers.
    """
    y, x = np.indices((48, 64))
    colours = np.stack([x * 4, y * 5, x * y % 256, 255 - (x + y) * 2 % 256], -1).astype(np.uint8)
    blocks = np.kron((np.arange(48).reshape(6, 8) * 37 % 256).astype(np.uint8), np.ones((16, 16), np.uint8))
    photos = [
        encode(Image.fromarray(colours), "PNG", exif=exif(6)),
        encode(Image.fromarray(blocks), "JPEG", quality=100),
    ]
    found = [hashlib.sha256(read_photo(data, 20).tobytes()).hexdigest() for data in photos]
    assert (READING, found) == (
        2,
        [
            "ac87f6364a81ff400e3b37e20668248eb367cb2140931d6bd8cc7f9910ec4a84",
            "245847ca18aee7369581421c4822004f810fb4aeac94e750b4ddd5f1aa2eab59",
        ],
    ), "photos are read otherwise: raise READING in caption_rt/image.py, or caches give grids of other pixels"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_undone(orientation, format):
    if format not in FORMATS:
        pytest.skip("this Pillow reads no AVIF")
    # Each value is a square of 16 pixels, so that lossy formats keep it.
    stored = np.kron(STORED[orientation], np.ones((16, 16), np.uint8))
    lossless = {"lossless": True} if format == "WEBP" else {"quality": 95}
    data = encode(Image.fromarray(stored).convert("RGB"), format, exif=exif(orientation), **lossless)
    assert_upright(open_photo(data))


def assert_upright(image):
    assert image.size == (48, 32)
    assert np.abs(np.asarray(image, int)[8::16, 8::16, 1] - UPRIGHT).max() <= 3


@pytest.mark.parametrize("orientation", STORED)
def test_a_heic_photo_is_turned_once(orientation):
    pytest.importorskip("pillow_heif", reason="the extra heif is not installed")
    stored = np.kron(STORED[orientation], np.ones((16, 16), np.uint8))
    assert_upright(open_photo(heic(Image.fromarray(stored).convert("RGB"), exif=exif(orientation), quality=95)))


def test_orientation_is_taken_from_xmp_where_exif_has_none():
    stored = Image.fromarray(np.kron(STORED[6], np.ones((16, 16), np.uint8))).convert("RGB")
    for format in ("JPEG", "WEBP"):
        xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
        assert_upright(open_photo(encode(stored, format, quality=95, xmp=xmp)))


def test_orientation_as_imagemagick_once_wrote_it():
    pixels = b"".join(b"\0" + bytes(row.repeat(3)) for row in np.kron(STORED[3], np.ones((16, 16), np.uint8)))
    data = b"Exif\0\0" + exif(3).removeprefix(b"Exif\0\0")
    text = f"\nexif\n    {len(data)}\n{data.hex()}\n".encode()
    chunk = png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))
    assert_upright(open_photo(png(48, 32, chunk, pixels=pixels)))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_costs_no_photo(format, caplog, recwarn):
    photo = Image.new("RGB", (4, 3), "red")
    for damage in (b"not a TIFF header at all", b"II*\0\xff\xff\xff\x7f", b"MM"):
        caplog.clear()
        with caplog.at_level("INFO", "caption_rt"):
            assert open_photo(encode(photo, format, exif=b"Exif\0\0" + damage)).size == (4, 3)
        assert "taken as upright" in caplog.text
    assert not recwarn.list


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_of_the_list_is_read(format, photos):
    original = Image.open(photos[2])
    read = open_photo(encode(original, format, quality=90))
    assert (read.mode, read.size) == ("RGB", (600, 400))
    # Lossless, 256 colours, or of good quality.
    limit = {"PNG": 0, "BMP": 0, "TIFF": 0, "GIF": 10}.get(format, 2)
    assert np.abs(np.asarray(read, float) - np.asarray(original, float)).mean() <= limit


def test_transparent_places_become_white():
    layer = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    layer.putpixel((1, 0), (0, 0, 0, 0))
    palette = layer.convert("P")
    palette.info["transparency"] = palette.getpixel((1, 0))
    for image in (layer, layer.convert("LA"), palette):
        assert open_photo(encode(image, "PNG")).getpixel((1, 0)) == (255, 255, 255)
    assert open_photo(layer).getpixel((0, 0)) == (200, 0, 0)
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert open_photo(half).getpixel((0, 0)) == (127, 127, 127)


def test_sixteen_bits_are_scaled_and_not_cut_off():
    grey = np.array([[0, 256, 32768, 65535]], np.uint16)
    image = open_photo(encode(Image.fromarray(grey), "PNG"))
    assert np.asarray(image)[0, :, 1].tolist() == [0, 1, 128, 255]


def test_cmyk_and_grey_become_rgb(photos):
    original = Image.open(photos[0])
    cmyk = np.asarray(open_photo(encode(original.convert("CMYK"), "JPEG", quality=95)), float)
    assert np.abs(cmyk - np.asarray(original, float)).mean() < 4
    grey = open_photo(np.full((5, 7), 80, np.uint8))
    assert (grey.size, grey.getpixel((0, 0))) == ((7, 5), (80, 80, 80))


def test_the_first_of_several_frames_is_taken():
    frames = [Image.new("RGB", (3, 3), color) for color in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_photo(data).getpixel((0, 0)) == (255, 0, 0)


def test_a_given_image_is_not_changed(photos):
    image = Image.open(photos[1])
    read_photo(image, 32)
    assert image.size == (451, 300)


def test_sixteen_bits_a_channel_are_read():
    values = np.array([[[0, 256, 65535], [32768, 1000, 258]]], ">u2")
    header = png_chunk(b"IHDR", b"\0\0\0\x02\0\0\0\x01\x10\x02\0\0\0")
    chunks = header + png_chunk(b"IDAT", zlib.compress(b"\0" + values.tobytes())) + png_chunk(b"IEND", b"")
    tiff = tiff_of((2, 1), values.tobytes(), bits=16)
    for data in (b"\x89PNG\r\n\x1a\n" + chunks, tiff):
        assert np.asarray(open_photo(data)).tolist() == [[[0, 1, 255], [128, 3, 1]]]


def tiff_of(size, pixels, *, bits):
    """An RGB file of big-endian TIFF, uncompressed; its directory has entries that mean nothing."""
    entries = [(256, 3, 1, size[0] << 16), (257, 3, 1, size[1] << 16), (258, 3, 3, 8), (259, 3, 1, 1 << 16)]
    entries += [(262, 3, 1, 2 << 16), (273, 4, 1, 14), (277, 3, 1, 3 << 16), (279, 4, 1, len(pixels))]
    entries += [(305, 2, 2**31, 7), (33432, 99, 1, 0), (34665, 4, 1, 2**31)]
    directory = b"".join(b"".join(n.to_bytes(k, "big") for n, k in zip(e, (2, 2, 4, 4), strict=True)) for e in entries)
    start = (14 + len(pixels)).to_bytes(4, "big")
    return (
        b"MM\0*" + start + bits.to_bytes(2, "big") * 3 + pixels + len(entries).to_bytes(2, "big") + directory + bytes(4)
    )


def test_the_second_picture_in_a_jpeg_and_a_tiff_is_passed_over():
    for format in ("MPO", "TIFF", "WEBP", "PNG"):
        frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
        data = encode(frames[0], format, save_all=True, append_images=frames[1:])
        red, _, blue = open_photo(data).getpixel((8, 8))
        assert red > 250 > 5 > blue, format


def test_a_video_behind_a_jpeg_is_passed_over(photos):
    good = photos[1].read_bytes()
    np.testing.assert_array_equal(read_photo(good + b"\xff\xda\0\x08ftyp" * 500, 64), read_photo(good, 64))


def test_a_gif_may_have_a_frame_larger_than_its_screen():
    data = encode(Image.new("RGB", (30, 20), "lime"), "GIF")
    assert open_photo(data[:6] + b"\x04\0\x04\0" + data[10:]).size == (30, 20)


def bad_files(folder, photo):
    """Every kind of bad file: name -> a part of its sentence."""
    good = photo.read_bytes()
    scans = jpeg_of_scans(encode(Image.open(photo), "JPEG", progressive=True), 200)
    contents = {
        "empty.jpg": (b"", "is empty (0 bytes)"),
        "truncated.jpg": (good[: len(good) // 2], "is cut short: copy it again from its source"),
        "truncated.png": (encode(Image.open(photo), "PNG")[:5000], "is cut short: copy"),
        "truncated.webp": (encode(Image.open(photo), "WEBP")[:5000], "is cut short: copy"),
        "truncated.tif": (encode(Image.open(photo), "TIFF")[:5000], "is cut short: copy"),
        "header.jpg": (good[:20], "is cut short: copy"),
        "damaged.png": (png(20, 20, pixels=b"\7" * 2000), "is damaged: copy it again from its source"),
        "noise.jpg": (bytes(range(256)) * 9, "is not an image, or its beginning is damaged: JPEG, PNG, "),
        "float.tiff": (encode(Image.new("F", (3, 3)), "TIFF"), "holds floating-point values"),
        "bomb.png": (
            png(60_000, 60_000),
            "states 60000 x 60000 pixels in a file of ",
        ),
        "bomb.gif": (gif_frame(65_535, 65_535), "in a file of 43 bytes, which is a decompression bomb: delete it"),
        "scans.jpg": (scans, "has 209 scans, and a JPEG photo has about ten: save it anew"),
    }
    for name, (data, _) in contents.items():
        (folder / name).write_bytes(data)
    return {name: sentence for name, (_, sentence) in contents.items()}


@pytest.mark.filterwarnings("default")
def test_bad_files_get_a_sentence_with_their_name(tmp_path, photos):
    sentences = bad_files(tmp_path, photos[0])
    (tmp_path / "folder.jpg").mkdir()
    sentences |= {"folder.jpg": "is a folder: name the photos in it", "missing.jpg": "does not exist: check the path"}
    for name, sentence in sentences.items():
        path = tmp_path / name
        with pytest.raises(ImageError) as caught:
            read_photo(path, 32)
        assert str(caught.value).startswith(f"{path} "), name
        assert sentence in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("default")
def test_bad_bytes_get_the_same_sentences(tmp_path, photos):
    for name, sentence in bad_files(tmp_path, photos[0]).items():
        with pytest.raises(ImageError, match="the image data") as caught:
            read_photo((tmp_path / name).read_bytes(), 32)
        assert sentence.split(" (")[0] in str(caught.value)


def test_a_jpeg_cut_anywhere_is_an_image_error_or_a_photo(photos):
    good = photos[1].read_bytes()
    for length in range(0, len(good), 997):
        with pytest.raises(ImageError):
            read_photo(good[:length], 32)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_rather_than_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError, match="is not a regular file"):
        read_photo(tmp_path / "pipe.jpg", 32)


def test_a_forbidden_file_says_so(monkeypatch, photos):
    def forbid(*_, **__):
        raise PermissionError(13, "Permission denied")

    # In place of chmod, because the superuser may read everything.
    monkeypatch.setattr(Path, "open", forbid)
    with pytest.raises(ImageError, match="may not be read: check its permissions"):
        read_photo(photos[0], 32)


def test_a_name_with_control_characters_stays_on_one_line(tmp_path):
    with pytest.raises(ImageError) as caught:
        read_photo(tmp_path / "two\nlines\x1b.jpg", 32)
    assert "two\\nlines\\x1b.jpg does not exist" in str(caught.value)
    with pytest.raises(ImageError, match="is no path: none has a zero byte in it"):
        read_photo("zero\0byte.jpg", 32)


def test_what_a_file_holds_decides_and_not_its_name(tmp_path, photos):
    pixels = np.asarray(Image.open(photos[0]))
    for name in ("a.jpg", "b.txt", "c"):
        (tmp_path / name).write_bytes(encode(Image.open(photos[0]), "PNG"))
        np.testing.assert_array_equal(np.asarray(open_photo(tmp_path / name)), pixels)


def test_a_heic_photo_without_its_extra_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(
        ImageError, match=r"x\.heic is a HEIC photo: pip install 'caption-rt\[heif\]' brings what reads it"
    ):
        open_photo(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", name="x.heic")


def test_limits_are_looked_at_before_decoding_and_can_be_raised(tmp_path, photos):
    path, size = photos[0], photos[0].stat().st_size
    assert read_photo(path, 32, limits=PhotoLimits(max_pixels=512 * 512, max_bytes=size)).shape == (32, 32, 3)
    few = PhotoLimits(max_pixels=512 * 512 - 1)
    for source in (path, path.read_bytes(), Image.new("RGB", (512, 512))):
        # To the last pixel, because rounded the two would be the same.
        said = r"states 512 x 512 pixels \(262144 pixels\), and the limit is 262143 pixels: .*, or raise max_pixels"
        with pytest.raises(ImageError, match=said):
            read_photo(source, 32, limits=few)
    small = PhotoLimits(max_bytes=size - 1)
    for read in (lambda: read_photo(path, 32, limits=small), lambda: read_file(path, small)):
        said = rf"astronaut\.jpg is a file of {size} bytes, and the limit is {size - 1} bytes: .*, or raise max_bytes"
        with pytest.raises(ImageError, match=said):
            read()
    with pytest.raises(ImageError, match="raise max_bytes"):
        open_photo(path.read_bytes(), limits=small)
    for limit, said in ((1, "1 byte"), (999, "999 bytes"), (2048, "2.0 KiB")):
        with pytest.raises(ImageError, match=rf"a file of {size / 1024:.1f} KiB, and the limit is {said}:"):
            read_file(path, PhotoLimits(max_bytes=limit))


def test_the_formats_that_are_named_are_those_that_can_be_read_here(monkeypatch):
    with pytest.raises(ImageError) as caught:
        open_photo(b"%PDF-1.7", name="a.pdf")
    expected = [*FORMATS, *(["HEIC"] if importlib.util.find_spec("pillow_heif") else [])]
    assert str(caught.value) == f"a.pdf is no photo and holds a PDF document: {', '.join(expected)} are read"
    monkeypatch.setattr("PIL.WebPImagePlugin.SUPPORTED", False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "pillow_heif")
    with pytest.raises(ImageError, match=r": JPEG, PNG, GIF, BMP, TIFF, (AVIF, )?HEIC are read"):
        open_photo(b"%PDF-1.7")


def test_a_name_without_end_is_shortened_in_the_middle():
    for name, read in (("x" * 70_000, read_file), ("y" * 70_000, lambda name: open_photo(b"", name=name))):
        with pytest.raises(ImageError) as caught:
            read(name)
        assert len(str(caught.value)) < 420
        assert f"{name[:100]}" in str(caught.value)


@pytest.mark.parametrize("values", [{"max_pixels": 0}, {"max_pixels": True}, {"max_bytes": 1.5}, {"max_bytes": 2**41}])
def test_impossible_limits_are_refused(values):
    with pytest.raises(OptionsError, match=f"{next(iter(values))} must be a whole number from 1 to "):
        PhotoLimits(**values)


@pytest.mark.parametrize("format", [*FORMATS, "HEIC"])
def test_pillows_own_limit_of_pixels_is_not_ours(format, photos, monkeypatch):
    photo = open_photo(photos[2])
    if format == "HEIC":
        pytest.importorskip("pillow_heif", reason="the extra heif is not installed")
    data = heic(photo) if format == "HEIC" else encode(photo, format)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # refuses from 2,000 pixels on, warns before
    assert open_photo(data).size == (600, 400)
    assert Image.MAX_IMAGE_PIXELS == 1000
    if format == "GIF":
        assert open_photo(data[:6] + b"\x04\0\x04\0" + data[10:]).size == (600, 400)


def test_photos_are_read_by_many_threads_at_once(photos):
    files = [path.read_bytes() for path in photos]
    files += [encode(open_photo(path), format) for path in photos for format in FORMATS]
    expected = [read_photo(data, 50) for data in files]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            for pixels, wanted in zip(pool.map(lambda data: read_photo(data, 50), files), expected, strict=True):
                np.testing.assert_array_equal(pixels, wanted)


def test_reading_leaves_pillow_as_it_was_and_loads_one_plugin(photos):
    script = f"""
import sys
from PIL import Image
before = dict(Image.OPEN), list(Image.ID), Image.MAX_IMAGE_PIXELS
from caption_rt.image import read_photo
read_photo({str(photos[0])!r}, 32)
after = sorted(name for name in sys.modules if name.endswith("ImagePlugin"))
assert after == ["PIL.JpegImagePlugin"], after
assert "HEIF" not in Image.ID and "PIL.ImageCms" not in sys.modules and "urllib.request" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=60)


def test_the_endings_of_photos():
    assert {
        ".jpg",
        ".jpeg",
        ".png",
        ".webp",
        ".gif",
        ".tif",
        ".tiff",
        ".bmp",
        ".avif",
        ".heic",
        ".heif",
    } <= PHOTO_SUFFIXES
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in PHOTO_SUFFIXES)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "not float32 [4, 4, 3]"),
        (np.zeros((4, 4, 4), np.uint8), "not uint8 [4, 4, 4]"),
        (np.zeros((1, 4, 4, 3), np.uint8), "not uint8 [1, 4, 4, 3]"),
        (np.zeros((0, 4, 3), np.uint8), "is empty"),
        (b"", "is empty"),
        ("", "the path of a photo is empty: name an image file"),
        (42, "int is none of them"),
        (None, "NoneType is none of them"),
    ],
)
def test_what_is_not_a_photo_is_refused(source, message):
    with pytest.raises(ImageError) as caught:
        read_photo(source, 32)
    assert message in str(caught.value)

"""Reading photos: the same pixels from every kind of source, and one sentence for every kind of damage."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from caption_rt.errors import ImageError
from caption_rt.image import FORMATS, open_photo, read_photo

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


def test_a_large_jpeg_is_decoded_smaller_but_never_below_what_was_asked(photos):
    large = Image.open(photos[1]).resize((2000, 1600))
    data = encode(large, "JPEG", quality=95)
    assert open_photo(data).size == (2000, 1600)
    assert open_photo(data, at_least=400).size == (500, 400)
    assert open_photo(data, at_least=401).size == (1000, 800)
    assert open_photo(data, at_least=5000).size == (2000, 1600)
    assert open_photo(encode(large, "PNG"), at_least=400).size == (2000, 1600)
    # The difference to the exact way is small.
    exact = np.asarray(open_photo(data).resize((64, 64), Image.Resampling.BILINEAR), dtype=float)
    assert np.abs(read_photo(data, 64) - exact).mean() < 1.5


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_undone(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation]))
    for format in ("PNG", "TIFF"):
        image = open_photo(encode(stored, format, exif=exif))
        np.testing.assert_array_equal(np.asarray(image)[..., 0], UPRIGHT, format)


def test_broken_exif_costs_no_photo(caplog):
    data = encode(Image.new("RGB", (4, 3), "red"), "PNG", exif=b"Exif\0\0not a TIFF header at all")
    with caplog.at_level("INFO", "caption_rt"):
        assert open_photo(data).size == (4, 3)
    assert "taken as upright" in caplog.text


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


def bad_files(folder, photo):
    """Every kind of bad file: name -> a part of its sentence."""
    good = photo.read_bytes()
    contents = {
        "empty.jpg": (b"", "is empty (0 bytes)"),
        "truncated.jpg": (good[: len(good) // 2], "is cut short or damaged"),
        "truncated.png": (encode(Image.open(photo), "PNG")[:5000], "is cut short or damaged"),
        "header.jpg": (good[:20], "is not an image, or its beginning is damaged"),
        "text.jpg": (b"a dog runs through the grass\n" * 100, "is not an image"),
        "zeros.jpg": (bytes(100_000), "is not an image"),
        "program.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "is not an image"),
        "float.tiff": (encode(Image.new("F", (3, 3)), "TIFF"), "holds floating-point values"),
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
    with pytest.raises(ImageError, match="is not a valid path"):
        read_photo("zero\0byte.jpg", 32)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch, photos):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60_000)
    with pytest.raises(ImageError, match=r"too many pixels \(at most 0 million are read\): scale it down"):
        read_photo(photos[0], 32)


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

"""A caption data set of drawn photos: coloured shapes, which a network of a few thousand weights can tell apart."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (40, 180, 60),
    "blue": (30, 60, 220),
    "yellow": (240, 220, 40),
    "black": (10, 10, 10),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle")
TWO_CAPTIONS = ("{}", "There is {}, in the middle.")


def shape_photo(index: int) -> tuple[Image.Image, str]:
    """The photo of a number, 96x72 pixels, and its caption; the numbers from 0 to 89 have captions of their own."""
    colours = list(COLOURS)
    shape = SHAPES[index % 3]
    ground = colours[index // 3 % 6]
    colour = colours[(index // 3 + 1 + index // 18) % 6]
    photo = Image.new("RGB", (96, 72), COLOURS[ground])
    draw = ImageDraw.Draw(photo)
    if shape == "circle":
        draw.ellipse((28, 16, 68, 56), COLOURS[colour])
    elif shape == "square":
        draw.rectangle((28, 16, 68, 56), COLOURS[colour])
    else:
        draw.polygon([(48, 12), (22, 60), (74, 60)], COLOURS[colour])
    return photo, f"a {colour} {shape} on a {ground} ground"


def write_flickr8k(
    folder: Path, train: Sequence[int], validation: Sequence[int], *, captions: Sequence[str] = TWO_CAPTIONS
) -> Path:
    """Write drawn photos in the format of Flickr8k, with the lists of its split.

    Args:
        folder: Made if it is not there.
        train: Numbers of the photos to train on.
        validation: Numbers of those to validate on.
        captions: What each photo's captions are, {} being the one that tells all.

    Returns:
        The folder.
    """
    (folder / "images").mkdir(parents=True)
    lines = []
    for index in (*train, *validation):
        photo, caption = shape_photo(index)
        photo.save(folder / "images" / f"{index}.jpg", quality=90)
        lines += [f"{index}.jpg#{k}\t{text.format(caption)}\n" for k, text in enumerate(captions)]
    (folder / "Flickr8k.token.txt").write_text("".join(lines), encoding="utf-8")
    for name, part in (("train", train), ("dev", validation)):
        (folder / f"Flickr_8k.{name}Images.txt").write_text("".join(f"{index}.jpg\n" for index in part))
    return folder

"""A sheet of photos with their captions and where the model looked: one sees an epoch's progress at a glance."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from caption_rt.attention import highlight
from caption_rt.errors import ImageError
from caption_rt.image import open_photo
from caption_train.errors import TrainingError

_TILE = 112  # pixels on each side
_GAP, _LINE = 6, 17
_PANELS = 12  # words with a panel; what comes after them is in the caption alone
_INK, _FAINT, _PAPER, _MISSING = (20, 20, 20), (110, 110, 110), (255, 255, 255), (200, 200, 200)


class SheetRow(NamedTuple):
    """A photo of the sheet."""

    path: Path
    """Where it lies."""
    words: tuple[str, ...]
    """Its generated caption."""
    attention: NDArray[np.float32]
    """Where the model looked for each word, float32 [words, rows, columns]."""
    real: str
    """A caption that somebody wrote."""


def draw_sheet(rows: Sequence[SheetRow], path: Path) -> None:
    """Draw photos below each other, beside each one panel a word, and write the sheet as a PNG.

    The file is replaced as a whole. A photo that is not there any more is a grey square.

    Args:
        rows: The photos.
        path: The PNG; its folder is made.

    Raises:
        TrainingError: It cannot be written.
    """
    height = _TILE + 3 * _LINE + _GAP
    sheet = Image.new("RGB", ((_PANELS + 1) * (_TILE + _GAP) + _GAP, len(rows) * height + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, row in enumerate(rows):
        _draw_row(sheet, draw, row, index * height + _GAP)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(temporary, format="PNG")
        os.replace(temporary, path)
    except OSError as exc:
        raise TrainingError(f"{path} cannot be written: {exc.strerror or exc}") from exc
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _draw_row(sheet: Image.Image, draw: ImageDraw.ImageDraw, row: SheetRow, top: int) -> None:
    photo = _tile(row.path)
    draw.text((_GAP, top), " ".join(row.words) or "(no words)", _INK, _font())
    draw.text((_GAP, top + _LINE), row.real, _FAINT, _font())
    top += 2 * _LINE
    sheet.paste(photo, (_GAP, top + _LINE))
    for index, (word, attention) in enumerate(zip(row.words[:_PANELS], row.attention, strict=False), 1):
        left = _GAP + index * (_TILE + _GAP)
        draw.text((left, top), word, _INK, _font())
        panel = (255 * highlight(photo, attention)).astype(np.uint8)
        sheet.paste(Image.fromarray(panel), (left, top + _LINE))


def _tile(path: Path) -> Image.Image:
    """The photo as the network sees it: square, its aspect ratio not kept."""
    try:
        return open_photo(path, at_least=_TILE).resize((_TILE, _TILE), Image.Resampling.BILINEAR)
    except ImageError:
        return Image.new("RGB", (_TILE, _TILE), _MISSING)


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings: it has more letters than Pillow's own."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 12)

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from caption_rt.attention import highlight
from caption_train.errors import TrainingError
from caption_train.sheets import SheetRow, draw_sheet

GREY = (200, 200, 200)


def row(path: Path, words: str) -> SheetRow:
    """The last word looks at the lower right corner, the others everywhere."""
    attention = np.full((len(words.split()), 3, 3), 1 / 9, np.float32)
    if len(attention):
        attention[-1] = 0
        attention[-1, 2, 2] = 1
    return SheetRow(path, tuple(words.split()), attention, "somebody's own words, ä and 猫")


def test_a_row_has_the_photo_and_a_panel_a_word(tmp_path: Path) -> None:
    photo = tmp_path / "red.png"
    Image.new("RGB", (300, 200), (220, 30, 30)).save(photo)
    draw_sheet([row(photo, "a red wall"), row(tmp_path / "gone.png", "")], tmp_path / "sheets" / "one.png")
    with Image.open(tmp_path / "sheets" / "one.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    height = (len(pixels) - 6) // 2
    first = pixels[6 + 2 * 17 + 17 :][:112]  # the panels of the first row
    panels = [first[:, 6 + index * 118 :][:, :112] for index in range(5)]
    assert (panels[0] == (220, 30, 30)).all()
    for panel in panels[1:3]:  # evenly bright
        assert panel.std(axis=(0, 1)).max() < 2
        assert panel[..., 0].min() > 200
    last = panels[3]
    assert last[100, 100, 0] > last[10, 10, 0] + 100
    assert (panels[4] == 255).all()  # no fourth word
    assert (pixels[height + 6 + 3 * 17 :][:112, 6:118] == GREY).all()  # the photo that is gone
    assert [path.name for path in (tmp_path / "sheets").iterdir()] == ["one.png"]


def test_more_words_than_panels(tmp_path: Path) -> None:
    photo = tmp_path / "red.png"
    Image.new("RGB", (8, 8), (220, 30, 30)).save(photo)
    sizes = set()
    for name, words in (("few", "a"), ("many", "word " * 40)):
        draw_sheet([row(photo, words)], tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as sheet:
            sizes.add(sheet.size)
    assert len(sizes) == 1


def test_a_sheet_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"file/one\.png cannot be written: "):
        draw_sheet([], tmp_path / "file" / "one.png")


def test_highlight_keeps_what_was_looked_at() -> None:
    photo = Image.new("RGB", (30, 30), (200, 100, 50))
    attention = np.zeros((3, 3), np.float32)
    attention[0, 0] = 0.5
    shown = highlight(photo, attention)
    assert (shown.dtype, shown.shape) == (np.float32, (30, 30, 3))
    np.testing.assert_allclose(shown[4, 4], np.array([200, 100, 50]) / 255, atol=0.12)
    np.testing.assert_allclose(shown[29, 29], 350 / 3 / 255 * 0.35, atol=0.01)  # dark and grey

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from caption_train.errors import TrainingError

pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra train)")

from caption_train.plots import plot_losses

BLUE, ORANGE, GREEN = (31, 119, 180), (255, 127, 14), (44, 160, 44)  # training loss, validation loss, perplexity
HISTORY = [
    {"epoch": 1, "step": 100, "loss": 4.1, "val_loss": 3.9, "perplexity": 49.4},
    {"epoch": 2, "step": 200, "loss": 3.4, "val_loss": 3.5, "perplexity": 33.1},
    {"epoch": 3, "step": 300, "loss": 3.0, "val_loss": 3.3, "perplexity": 27.1},
]


def colours(path: Path) -> dict[tuple[int, int, int], int]:
    """How many pixels the picture has of each curve's colour."""
    with Image.open(path) as picture:
        assert (picture.format, picture.size) == ("PNG", (840, 540))
        pixels = np.asarray(picture.convert("RGB"))
    return {colour: int((pixels == colour).all(axis=2).sum()) for colour in (BLUE, ORANGE, GREEN)}


def test_three_curves(tmp_path: Path) -> None:
    plot_losses(HISTORY, tmp_path / "loss.png")
    assert all(count > 100 for count in colours(tmp_path / "loss.png").values())
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_only_what_the_history_has_is_drawn(tmp_path: Path) -> None:
    rows = [{"step": 10.0 * i, "loss": 1 / i, "cosine": 0.5, "perplexity": float("nan")} for i in range(1, 6)]
    plot_losses(rows, tmp_path / "loss.png")
    found = colours(tmp_path / "loss.png")
    assert found[BLUE] > 100
    assert (found[ORANGE], found[GREEN]) == (0, 0)


def test_rows_need_not_have_everything(tmp_path: Path) -> None:
    rows = [
        {"epoch": 0.5, "loss": 5.0},
        {"epoch": 1, "loss": float("inf"), "val_loss": 4.0},
        {"epoch": 2, "val_loss": 3.0},
    ]
    plot_losses(rows, tmp_path / "loss.png")
    found = colours(tmp_path / "loss.png")
    assert found[ORANGE] > 100 > found[BLUE] > 10  # a curve of two points, and one dot with its line in the legend
    assert found[GREEN] == 0


def test_an_older_picture_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "loss.png"
    plot_losses(HISTORY[:1], path)
    first = path.read_bytes()
    plot_losses(HISTORY, path)
    assert path.read_bytes() != first


def test_nothing_to_draw(tmp_path: Path) -> None:
    for rows in ([], [{"epoch": 1, "cosine": 0.5}], [{"epoch": 1, "loss": float("nan")}]):
        with pytest.raises(TrainingError, match="no loss to draw"):
            plot_losses(rows, tmp_path / "loss.png")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"loss.png cannot be written: No such file") as caught:
        plot_losses(HISTORY, tmp_path / "no" / "loss.png")
    assert caught.value.exit_code == 7


def test_no_global_state_of_pyplot() -> None:
    code = "import sys, caption_train.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

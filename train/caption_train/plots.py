"""The loss curve as a picture."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from caption_train.errors import TrainingError

LOSSES = {"loss": ("training loss", "tab:blue"), "val_loss": ("validation loss", "tab:orange")}


def plot_losses(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draws the losses by epoch, and the perplexity on an axis of its own where there is one, as a PNG.

    The file is replaced as a whole: whoever looks at it during training never finds half a picture.

    Args:
        history: One row an epoch, or more often: "epoch" (else "step") is where the row stands, and "loss", "val_loss"
            and "perplexity" are drawn; a row need not have them all. Other keys, and values that are not finite, are
            passed over.
        path: The PNG to write.

    Raises:
        TrainingError: The history has nothing to draw, or the file cannot be written.
    """
    along = "epoch" if all("epoch" in row for row in history) else "step"
    figure = Figure(figsize=(7, 4.5), dpi=120)
    # Fixed margins: to lay out what is always the same would take half of the time, after every epoch.
    axes = figure.subplots(gridspec_kw={"left": 0.1, "right": 0.88, "bottom": 0.11, "top": 0.9})
    lines = [line for name, style in LOSSES.items() for line in _draw(axes, history, along, name, *style)]
    if not lines:
        raise TrainingError(f"{path}: the history holds no loss to draw")
    axes.set_xlabel(along)
    axes.set_ylabel("loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if _points(history, along, "perplexity"):
        second = axes.twinx()
        lines += _draw(second, history, along, "perplexity", "perplexity", "tab:green", dashed=True)
        second.set_ylabel("perplexity")
    figure.legend(handles=lines, loc="upper center", ncols=len(lines))  # beside the curves, never on them
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png")
        os.replace(temporary, path)
    except OSError as exc:
        raise TrainingError(f"{path} cannot be written: {exc.strerror or exc}") from exc
    finally:
        temporary.unlink(missing_ok=True)


def _points(history: Sequence[Mapping[str, float]], along: str, name: str) -> list[tuple[float, float]]:
    return [(row[along], row[name]) for row in history if along in row and math.isfinite(row.get(name, math.nan))]


def _draw(
    axes: Axes,
    history: Sequence[Mapping[str, float]],
    along: str,
    name: str,
    label: str,
    color: str,
    *,
    dashed: bool = False,
) -> list[Line2D]:
    """One curve, or none where no row has the value. A dot marks each value, so that a first epoch alone is seen."""
    points = _points(history, along, name)
    if not points:
        return []
    xs, ys = zip(*points, strict=True)
    return axes.plot(xs, ys, label=label, color=color, linestyle="--" if dashed else "-", marker=".")

"""Attention plots: the photo once a word, with where the model looked. The only file that imports matplotlib."""

import contextlib
import logging
import math
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from caption_rt.errors import CaptionError, OptionsError, printable, remedy_of
from caption_rt.image import ImageSource, PhotoLimits, open_photo

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from caption_rt.caption import Caption

__all__ = [
    "PLOT_FORMATS",
    "check_plot_path",
    "check_screen",
    "highlight",
    "plot_attention",
    "save_plot",
    "show_plot",
    "upsample",
]

PLOT_FORMATS = ("png", "svg", "pdf")
"""What `save_plot` writes, by the ending of the file's name."""

# Pixels on the long side of a photo in the plot: sharp on a screen.
_PANEL_PIXELS = 400
_PANEL_INCHES = 2.4
_DPI = 150
# Pixels of a PNG: with more words than about 20, each photo gets fewer of them, and the file stays below some 5 MB.
_MOST_PIXELS = 4e6
# A sheet so wide has a title of the usual size; on a wider one it grows with it, to be as large beside the sheet.
_USUAL_INCHES = 12
_WINDOWS = ("macosx", "tkagg", "qtagg", "gtk4agg", "gtk3agg", "wxagg")
_GLOW = np.array([0.22, 0.16, 0.04], np.float32)


def plot_attention(photo: Image.Image, caption: "Caption", figure: "Figure | None" = None) -> "Figure":
    """Draw the photo once for each word, the places where the model looked for it bright and the others dark.

    Each panel is scaled by its own word's strongest place, so that a word that looked everywhere can be told from one
    that looked at one thing. A caption without words shows the photo alone.

    Args:
        photo: RGB, upright, of any size and aspect ratio.
        caption: its caption.
        figure: an empty figure to draw in; None for one of its own, which leaves pyplot's state alone.

    Returns:
        The figure.

    Raises:
        OptionsError: matplotlib is not installed.
    """
    small = photo.copy()
    small.thumbnail((_PANEL_PIXELS, _PANEL_PIXELS))
    panels = max(1, len(caption.words))
    columns = math.ceil(math.sqrt(panels))
    rows = math.ceil(panels / columns)
    scale = _PANEL_INCHES / max(small.size)
    figure = figure or _figure_class()()
    # The words stand above the panels, the sentence above all.
    figure.set_size_inches(
        columns * (small.width * scale + 0.15), rows * (small.height * scale + 0.4) + 0.4, forward=True
    )
    figure.set_layout_engine("constrained")
    larger = max(1.0, figure.get_figwidth() / _USUAL_INCHES)
    figure.suptitle(caption.text or "(no words)", fontsize=10 * larger, parse_math=False, wrap=True)
    for index in range(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        if caption.words:
            _draw_word(axes, small, caption.attention[index], f"{index + 1} {caption.words[index]}")
        else:
            axes.imshow(small)
        axes.set_axis_off()
    return figure


def upsample(attention: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """One word's attention, smoothly enlarged over the photo.

    Args:
        attention: float32 [rows, columns].
        size: width and height of the result in pixels.

    Returns:
        float32 [height, width], 0 to 1, the word's strongest place near 1.
    """
    image = Image.fromarray(np.ascontiguousarray(attention, dtype=np.float32))
    # The cubic filter overshoots a little beside a peak.
    enlarged = np.maximum(np.asarray(image.resize(size, Image.Resampling.BICUBIC)), 0)
    strongest = enlarged.max()
    return np.asarray(enlarged / strongest if strongest > 0 else enlarged, dtype=np.float32)


def highlight(photo: Image.Image, attention: NDArray[np.float32]) -> NDArray[np.float32]:
    """The photo with the places where the model looked bright and in colour, the others dark and grey.

    Args:
        photo: RGB.
        attention: one word's, float32 [rows, columns].

    Returns:
        float32 [height, width, 3], 0 to 1.
    """
    light = upsample(attention, photo.size)[..., None]
    pixels = np.asarray(photo, dtype=np.float32) / 255
    # Where it did not look, the photo is dark and grey; where it looked, it is as it is, in its colours, with a little
    # warm light, without which black things would be black either way.
    grey = pixels.mean(axis=2, keepdims=True) * 0.35
    shown = grey + (pixels - grey) * light
    return np.asarray(shown + (1 - shown) * _GLOW * light, dtype=np.float32)


def save_plot(
    image: ImageSource,
    caption: "Caption",
    path: str | os.PathLike[str],
    *,
    limits: PhotoLimits | None = None,
    name: str | None = None,
) -> None:
    """Read the photo, plot its caption's attention and write the plot.

    Args:
        image: the photo that was captioned.
        caption: its caption.
        path: the file to write or replace; its ending is one of `PLOT_FORMATS`.
        limits: the largest photos that are read; None for the defaults of `PhotoLimits`.
        name: how errors call a photo that is given as bytes, such as the path that they came from.

    Raises:
        OptionsError: another ending, or matplotlib is not installed.
        ImageError: the photo cannot be read.
        CaptionError: the file cannot be written.
    """
    target = check_plot_path(path)
    figure = plot_attention(_photo(image, limits, name), caption)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        dpi = min(_DPI, math.sqrt(_MOST_PIXELS / (figure.get_figwidth() * figure.get_figheight())))
        figure.savefig(temporary, format=target.suffix[1:].lower(), dpi=dpi)
        os.replace(temporary, target)
    except OSError as exc:
        reason = printable(exc.strerror or exc)
        raise CaptionError(
            f"the plot {printable(target)} cannot be written ({reason}): {remedy_of(exc) or 'name a file elsewhere'}"
        ) from exc
    finally:
        temporary.unlink(missing_ok=True)


def show_plot(
    image: ImageSource, caption: "Caption", *, limits: PhotoLimits | None = None, name: str | None = None
) -> None:
    """Open a window with the plot, and wait until it is closed. For a program of its own: pyplot's state is used.

    Args:
        image: the photo that was captioned.
        caption: its caption.
        limits: the largest photos that are read; None for the defaults of `PhotoLimits`.
        name: how errors call a photo that is given as bytes, such as the path that they came from.

    Raises:
        OptionsError: matplotlib is not installed, there is no screen, or nothing that opens a window.
        ImageError: the photo cannot be read.
    """
    check_screen()
    from matplotlib import pyplot

    figure = pyplot.figure(num=f"caption-rt: {caption.text}")
    plot_attention(_photo(image, limits, name), caption, figure)
    pyplot.show(block=True)


def _photo(image: ImageSource, limits: PhotoLimits | None, name: str | None) -> Image.Image:
    # Twice the panel's size leaves enough for a good reduction.
    return open_photo(image, at_least=2 * _PANEL_PIXELS, limits=limits or PhotoLimits(), name=name)


def check_screen() -> None:
    """See that a window can be opened.

    Raises:
        OptionsError: matplotlib is not installed, there is no screen, or nothing that opens a window.
    """
    _figure_class()
    from matplotlib import pyplot

    # tkinter comes with Python and fails with an exception; Qt without its system libraries ends the process.
    for backend in filter(None, (os.environ.get("MPLBACKEND"), *_WINDOWS)):
        with contextlib.suppress(ImportError, ValueError):
            pyplot.switch_backend(backend)
            return
    raise OptionsError(
        "no window can be opened: there is no screen, or Python has neither tkinter nor Qt (pip install "
        "PySide6-Essentials brings Qt); write the plot to a file instead"
    )


def check_plot_path(path: str | os.PathLike[str]) -> Path:
    """The path, if a plot can be written there: its ending is one of `PLOT_FORMATS`, and matplotlib is installed.

    Raises:
        OptionsError: one of them is not so.
    """
    _figure_class()
    target = Path(path)
    if target.suffix[1:].lower() not in PLOT_FORMATS:
        endings = ", ".join(f".{name}" for name in PLOT_FORMATS)
        raise OptionsError(f"a plot's name ends in one of {endings}, and {printable(target)} does not")
    return target


def _figure_class() -> "type[Figure]":
    try:
        with _without_warnings():
            from matplotlib.figure import Figure
    except ImportError as exc:
        raise OptionsError("plots need matplotlib, which is missing: pip install 'caption-rt[plot]' brings it") from exc
    except ValueError as exc:  # what matplotlib says of the environment's MPLBACKEND
        backend = printable(repr(os.environ.get("MPLBACKEND")))
        raise OptionsError(f"matplotlib knows no backend MPLBACKEND={backend}: unset that variable") from exc
    return Figure


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Let matplotlib say nothing of what it comes across while it is loaded.

    Where its folder cannot be written (MPLCONFIGDIR, or no home), it takes a temporary one, and says so in lines of
    logging that reach standard error.
    """
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _draw_word(axes: "Axes", photo: Image.Image, attention: NDArray[np.float32], title: str) -> None:
    axes.imshow(highlight(photo, attention))
    axes.set_title(title, fontsize="medium", parse_math=False)

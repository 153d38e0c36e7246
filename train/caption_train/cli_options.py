"""What the commands of `caption-train` share: arguments, and progress bars."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

FOLDER = click.Path(file_okay=False, path_type=Path)
PATH = click.Path(path_type=Path)
COUNT = click.IntRange(1)


def options_of(*decorators: Callable[..., Any]) -> Callable[..., Any]:
    """Several click decorators as one, first to last."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for decorator in decorators[::-1]:
            function = decorator(function)
        return function

    return decorate


data_options = options_of(
    click.argument("data", type=PATH),
    click.argument("run", type=FOLDER),
    click.option("--images", type=PATH, help="Folder of the photos; Flickr8k's is found beside its captions."),
    click.option(
        "--max-missing-share",
        type=click.FloatRange(0, 1),
        default=0.0,
        help="Go on as long as no more than this share of the photos is missing.",
    ),
    click.option(
        "--cache", type=FOLDER, help="Folder of the grid features, which runs may share.  [default: RUN/grids]"
    ),
)


@contextlib.contextmanager
def progress_bar(label: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
    """A progress bar on stderr, where that is a terminal; yields what moves it on and names it anew."""
    if not sys.stderr.isatty():
        yield lambda count, label: None
        return
    with click.progressbar(length=total, label=label, show_pos=True, file=sys.stderr) as bar:
        bar.update(done)

        def advance(count: int, label: str) -> None:
            bar.label = label
            bar.update(count)

        yield advance


@contextlib.contextmanager
def training_bar(total: int, done: int, captions: int = 0) -> Iterator[Callable[[int, float], None]]:
    """A progress bar over training steps, with the loss and, of steps with so many captions, the rate."""
    last, seconds = time.monotonic(), 0.0
    with progress_bar("training", total, done) as advance:

        def on_step(step: int, loss: float) -> None:
            nonlocal last, seconds
            now = time.monotonic()
            took, last = now - last, now
            seconds = 0.9 * seconds + 0.1 * took if seconds else took
            rate = f", {captions / seconds:.0f} captions/s" if captions else ""
            advance(1, f"training, loss {loss:.3f}{rate}")

        yield on_step

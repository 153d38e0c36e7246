"""The command `caption-train caption`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from caption_rt.command_options import GroupedCommand, GroupedOption, check_sampling, decode_options, word_options
from caption_rt.console import complain, echo
from caption_rt.errors import ImageError, OptionsError, printable
from caption_rt.options import DecodeOptions
from caption_train.cli_options import FOLDER, PATH
from caption_train.console import quiet_stderr

if TYPE_CHECKING:
    from caption_rt.caption import Caption
    from caption_train.captioning import RunCaptioner

_BATCH = 16


@click.command(cls=GroupedCommand)
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True, type=PATH)
@click.argument("run", type=FOLDER)
@click.option(
    "--checkpoint",
    cls=GroupedOption,
    group="Model and output",
    type=click.Choice(["best", "last"]),
    default="best",
    help="The best one on the validation photos, or the last one.",
)
@click.option(
    "--plot",
    cls=GroupedOption,
    group="Model and output",
    type=PATH,
    metavar="FILE",
    help="Write where the model looked for each word (PNG, SVG, PDF); one photo only.",
)
@click.option(
    "--json", "as_json", cls=GroupedOption, group="Model and output", is_flag=True, help="Print a JSON object a photo."
)
@word_options
def caption(
    images: tuple[Path, ...], run: Path, checkpoint: str, plot: Path | None, as_json: bool, **given: Any
) -> int:
    """Caption each IMAGE with the trained model in the folder RUN, in TensorFlow.

    For looking at a model before it is exported: the search, its options and the guard are those of caption-rt. Prints
    the caption of one photo, or a line PATH, tab, CAPTION for each of several. A photo that cannot be read is reported;
    the others are still captioned, and the exit code is 4.
    """
    check_sampling(given)
    if (given["n_best"] or 1) > 1 and not as_json:
        raise click.UsageError("JSON alone has more than one caption a photo: add --json to --n-best")
    decode_options(DecodeOptions(), given)
    if plot is not None:
        _check_plot(plot, images)
    with quiet_stderr():
        from caption_train.captioning import RunCaptioner
        from caption_train.runs import open_run
    trained = open_run(run, checkpoint)
    options = decode_options(DecodeOptions(max_words=trained.max_words), given)
    unread = 0
    for image, result in _captions(RunCaptioner(trained), images, options):
        if isinstance(result, ImageError):
            unread += 1
            complain("caption-train", str(result))
            continue
        if plot is not None:
            result.plot(image, plot)
        if as_json:
            echo(json.dumps({"path": str(image), **result.to_dict()}))
        else:
            echo(result.text if len(images) == 1 else f"{printable(image)}\t{result.text}")
    return ImageError.exit_code if unread else 0


def _check_plot(plot: Path, images: Sequence[Path]) -> None:
    from caption_rt.attention import check_plot_path

    if len(images) != 1:
        raise click.UsageError("--plot takes one photo")
    folder = check_plot_path(plot).parent
    if not folder.is_dir():
        raise OptionsError(f"the folder {printable(folder)} of the plot does not exist: make it first")


def _captions(
    captioner: RunCaptioner, images: Sequence[Path], options: DecodeOptions
) -> Iterator[tuple[Path, Caption | ImageError]]:
    """Each photo with its caption, or why it cannot be read; in order, a batch at a time."""
    from caption_rt.image import read_photo

    for first in range(0, len(images), _BATCH):
        batch = images[first : first + _BATCH]
        read: list[Any] = []
        for image in batch:
            try:
                read.append(read_photo(image, captioner.size))
            except ImageError as exc:
                read.append(exc)
        pixels = [photo for photo in read if not isinstance(photo, ImageError)]
        found = iter(captioner.caption_pixels(pixels, options))
        for image, photo in zip(batch, read, strict=True):
            yield image, photo if isinstance(photo, ImageError) else next(found)

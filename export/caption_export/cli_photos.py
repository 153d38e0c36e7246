"""`--photos` and `--limit-photos` of the commands that compare what they make or examine on real photos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
from click.core import ParameterSource

from caption_train.datasets import photos_in

limit_photos_option = click.option("--limit-photos", type=click.IntRange(1), default=16, help="Take so many, by path.")


def chosen_photos(context: click.Context, photos: Path | None, limit: int) -> Sequence[Path]:
    """The first photos of a folder; none without one.

    Raises:
        click.UsageError: There is a limit of no photos.
        DatasetError: The folder is not there, or holds no photo.
    """
    if photos is not None:
        return photos_in(photos)[:limit]
    if context.get_parameter_source("limit_photos") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--limit-photos is about --photos: name a folder of them, or leave it out", context)
    return ()

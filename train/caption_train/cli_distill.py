"""The command `caption-train distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from caption_rt.console import echo
from caption_rt.errors import OptionsError, printable
from caption_train.cli_options import COUNT, FOLDER, PATH, training_bar
from caption_train.console import quiet_stderr
from caption_train.datasets import photos_in


@click.command()
@click.argument("photos", nargs=-1, required=True, type=PATH)
@click.option("--out", type=FOLDER, required=True, help="Folder of the run and the finished extractor.")
@click.option("--cache", type=FOLDER, help="Folder of the teacher's grids.  [default: OUT/teacher]")
@click.option("--exclude", type=PATH, help="A list of file names, one a line, that must stay unseen.")
@click.option(
    "--teacher-weights", metavar="imagenet|FILE", default="imagenet", help="'imagenet' (downloaded) or a weights file."
)
@click.option("--teacher-layer", default="mixed10", help="Block of the teacher that is reproduced, mixed0 to mixed10.")
@click.option("--width", type=float, default=0.25, help="Width multiplier of the student.")
@click.option("--layer", default="mixed10", help="Block of the student whose output is its grid, mixed0 to mixed10.")
@click.option("--size", type=int, default=299, help="Pixels to a side of the photos, for both.")
@click.option("--epochs", type=COUNT, default=10, help="Passes over all views.")
@click.option("--views", type=COUNT, default=2, help="Views of each photo: the whole, and crops.")
@click.option("--batch-size", type=COUNT, default=64, help="Views a step.")
@click.option("--learning-rate", type=float, default=2e-3, help="The highest; it falls along a cosine.")
@click.option("--checkpoint-steps", type=COUNT, default=100, help="Steps between checkpoints.")
@click.option("--seed", type=int, default=0, help="Of weights, held-out photos, order and augmentation.")
def distill(
    photos: tuple[Path, ...],
    out: Path,
    cache: Path | None,
    exclude: Path | None,
    teacher_weights: str,
    teacher_layer: str,
    width: float,
    layer: str,
    size: int,
    **options: Any,
) -> None:
    """Train a small extractor to reproduce a large one's grid, on the photos of the folders PHOTOS (no captions).

    Give OUT to 'train' as the setting extractor.weights. After a stop, the same command goes on.
    """
    paths = [path for folder in photos for path in photos_in(folder)]
    if exclude is not None:
        unseen = _lines(exclude, "--exclude")
        paths = [path for path in paths if path.name not in unseen]
    with quiet_stderr():
        from caption_train.distill import DistillConfig, run_distillation
        from caption_train.inception import ExtractorConfig

    run_distillation(
        paths,
        ExtractorConfig(1.0, size, teacher_layer),
        teacher_weights,
        ExtractorConfig(width, size, layer),
        DistillConfig(**options),
        out,
        cache or out / "teacher",
        training_bar,
    )
    echo(printable(out))


def _lines(path: Path, option: str) -> set[str]:
    try:
        return {line.strip() for line in path.read_text(encoding="utf-8").splitlines()}
    except OSError as exc:
        raise OptionsError(f"{option} {path} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise OptionsError(f"{option} {path} is not UTF-8 text") from exc

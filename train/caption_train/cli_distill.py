"""The command `caption-train distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from caption_rt.console import echo
from caption_rt.errors import OptionsError, printable
from caption_train.cli_options import COUNT, FOLDER, PATH, training_bar
from caption_train.console import quiet_stderr
from caption_train.datasets import load_dataset, photos_in


@click.command()
@click.argument("photos", nargs=-1, required=True, type=PATH)
@click.option("--out", type=FOLDER, required=True, help="Folder of the run and the finished extractor.")
@click.option("--cache", type=FOLDER, help="Folder of the teacher's grids.  [default: OUT/teacher]")
@click.option("--exclude", type=PATH, help="A list of file names, one a line, that must stay unseen.")
@click.option(
    "--teacher-weights", metavar="imagenet|FILE", default="imagenet", help="'imagenet' (downloaded) or a weights file."
)
@click.option(
    "--teacher-bundle",
    type=PATH,
    metavar="BUNDLE",
    help="In place of these: the extractor of a bundle, which in int8 answers three times as fast on a CPU.",
)
@click.option("--teacher-layer", default="mixed10", help="Block of the teacher that is reproduced, mixed0 to mixed10.")
@click.option("--teacher-size", type=int, default=299, help="Pixels to a side of the teacher's photos.")
@click.option("--width", type=float, default=1.0, help="Width multiplier of the student.")
@click.option(
    "--layer",
    default="stage3",
    help="The student's block whose output is its grid: stage1 to stage3 of a residual network, or mixed0 to mixed10.",
)
@click.option("--size", type=int, default=224, help="Pixels to a side of the student's photos.")
@click.option("--rounds", type=COUNT, default=48, help="New views of every photo.")
@click.option("--passes", type=COUNT, default=4, help="Passes' worth of steps a round.")
@click.option("--window", type=COUNT, default=4, help="Rounds whose views are learnt from: the newest ones.")
@click.option("--batch-size", type=COUNT, default=32, help="Views a step.")
@click.option("--learning-rate", type=float, default=1e-3, help="The highest; it falls along a cosine.")
@click.option("--checkpoint-steps", type=COUNT, default=250, help="Steps between checkpoints.")
@click.option("--seed", type=int, default=0, help="Of weights, held-out photos, and what is drawn in each step.")
@click.option(
    "--start-from",
    type=PATH,
    metavar="FILE",
    help="Begin with the small.npz of a run that was stopped elsewhere, at its next round.",
)
@click.option(
    "--captioner", type=FOLDER, metavar="RUN", help="A captioner trained on the teacher's grids: progress in CIDEr."
)
@click.option("--captions", type=PATH, metavar="DATA", help="The data set of the captioner, for its validation photos.")
def distill(
    photos: tuple[Path, ...],
    out: Path,
    cache: Path | None,
    exclude: Path | None,
    teacher_weights: str,
    teacher_bundle: Path | None,
    teacher_layer: str,
    teacher_size: int,
    width: float,
    layer: str,
    size: int,
    start_from: Path | None,
    captioner: Path | None,
    captions: Path | None,
    **options: Any,
) -> None:
    """Train a small extractor to reproduce a large one's grid, on the photos of the folders PHOTOS (no captions).

    Give OUT to 'train' as the setting extractor.weights. After a stop, the same command goes on.
    """
    if (captioner is None) != (captions is None):
        raise OptionsError("--captioner and --captions go together: give both or neither")
    paths = [path for folder in photos for path in photos_in(folder)]
    if exclude is not None:
        unseen = _lines(exclude, "--exclude")
        paths = [path for path in paths if path.name not in unseen]
    with quiet_stderr():
        from caption_train.distill import DistillConfig, run_distillation
        from caption_train.distill_views import Teacher
        from caption_train.inception import ExtractorConfig
        from caption_train.runs import data_choices, open_run

    judges, cache_folder = None, cache or out / "teacher"
    if captioner is not None and captions is not None:
        validation = load_dataset(captions, **data_choices(captioner)).validation
        if seen := {path.name for path in paths} & {image.path.name for image in validation}:
            raise OptionsError(
                f"{len(seen)} validation photos of {captions}, such as {min(seen)}, are among PHOTOS: --exclude them"
            )
        judges = open_run(captioner), validation
    student, config = ExtractorConfig(width, size, layer), DistillConfig(**options)
    if teacher_bundle is not None:
        teacher = Teacher.of_bundle(teacher_bundle, cache_folder)
    else:
        of_teacher = ExtractorConfig(1.0, teacher_size, teacher_layer)
        teacher = Teacher.of_network(of_teacher, teacher_weights, cache_folder)
    run_distillation(
        paths,
        teacher,
        student,
        config,
        out,
        training_bar,
        start_from=start_from,
        captioner=judges,
    )
    echo(printable(out))


def _lines(path: Path, option: str) -> set[str]:
    try:
        return {line.strip() for line in path.read_text(encoding="utf-8").splitlines()}
    except OSError as exc:
        raise OptionsError(f"{option} {path} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise OptionsError(f"{option} {path} is not UTF-8 text") from exc

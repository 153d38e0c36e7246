"""`caption-train`: parses, calls, prints."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from caption_rt import __version__
from caption_rt.errors import CaptionError, OptionsError
from caption_train.datasets import Dataset, load_dataset, photos_in

if TYPE_CHECKING:
    from caption_train.runs import Evaluation

_FOLDER = click.Path(file_okay=False, path_type=Path)
_PATH = click.Path(path_type=Path)


class _Group(click.Group):
    """Turns this project's errors into one line on stderr and their exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CaptionError as exc:
            click.echo(f"caption-train: error: {exc}", err=True)
            ctx.exit(exc.exit_code)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="caption-train")
@click.option("-v", "--verbose", is_flag=True, help="Say more of what goes on, on stderr.")
def main(verbose: bool) -> None:
    """Train an image captioner: InceptionV3, Bahdanau attention, GRU ("Show, Attend and Tell").

    Exit codes: 0 done, 2 options, 4 photo, 6 data set, 7 training, 130 interrupted.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("caption_train").setLevel(logging.DEBUG if verbose else logging.INFO)
    # Before TensorFlow is imported, which reads them once. oneDNN is off by default on processors without AVX-512,
    # where it makes training an extractor twice as fast.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    if not verbose:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")


def _data_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that name a data set, and what of it to take."""
    for decorate in (
        click.argument("data", type=_PATH),
        click.option(
            "--images", type=_PATH, help="Folder of the photos; for Flickr8k found beside the captions if not given."
        ),
        click.option("--limit", type=click.IntRange(min=2), help="Take so many photos (the tutorial: 6000)."),
        click.option(
            "--validation-share",
            type=click.FloatRange(0, 1, min_open=True, max_open=True),
            default=0.2,
            help="Share of the photos to validate on, where the set has no split of its own.",
        ),
        click.option(
            "--max-missing-share",
            type=click.FloatRange(0, 1),
            default=0.0,
            help="Go on as long as no more than this share of the photos is missing.",
        ),
        click.option("--data-seed", type=int, default=0, help="Seed of limit and split."),
    )[::-1]:
        command = decorate(command)
    return command


def _load(
    data: Path,
    images: Path | None,
    limit: int | None,
    validation_share: float,
    max_missing_share: float,
    data_seed: int,
) -> tuple[Dataset, dict[str, Any]]:
    """The data set, and the choices that made it, for ``run.json``."""
    dataset = load_dataset(
        data,
        images=images,
        limit=limit,
        seed=data_seed,
        validation_share=validation_share,
        max_missing_share=max_missing_share,
    )
    return dataset, {"limit": limit, "seed": data_seed, "validation_share": validation_share}


@main.command()
@_data_options
@click.argument("run", type=_FOLDER)
@click.option("--cache", type=_FOLDER, help="Folder of the grid features; RUN/grids if not given.")
@click.option(
    "--extractor-weights",
    default="imagenet",
    help="'imagenet' (Keras downloads them), 'none' (random), a weights file, or a folder from 'distill'.",
)
@click.option("--width", type=float, default=1.0, help="Width multiplier of InceptionV3.")
@click.option("--size", type=int, default=299, help="Pixels to a side of the photo that the network sees.")
@click.option("--layer", default="mixed10", help="Block of InceptionV3 whose output is the grid.")
@click.option("--epochs", type=int, default=20)
@click.option("--batch-size", type=int, default=64, help="Captions a step.")
@click.option("--learning-rate", type=float, default=1e-3)
@click.option("--schedule", type=click.Choice(["cosine", "constant"]), default="cosine")
@click.option("--dropout", type=float, default=0.3)
@click.option("--vocabulary", type=int, default=5000, help="Words beside the special ones.")
@click.option("--max-words", type=int, default=40, help="Cut longer captions.")
@click.option("--embedding-dim", type=int, default=256)
@click.option("--units", type=int, default=512)
@click.option("--recurrence", type=click.Choice(["carry", "reset"]), default="carry", help="'reset' is the tutorial's.")
@click.option("--checkpoint-steps", type=int, default=500)
@click.option("--seed", type=int, default=0)
@click.option(
    "--until",
    type=click.Choice(["features", "training", "scores"]),
    default="scores",
    help="Stop after this stage; call again to go on.",
)
def train(
    data: Path,
    run: Path,
    images: Path | None,
    limit: int | None,
    validation_share: float,
    max_missing_share: float,
    data_seed: int,
    cache: Path | None,
    extractor_weights: str,
    width: float,
    size: int,
    layer: str,
    until: str,
    **options: Any,
) -> None:
    """Train on the captions of DATA, in the folder RUN; call again to go on after a stop.

    DATA is the folder of Flickr8k (Flickr8k.token.txt and, if there, the split lists) or a COCO caption JSON. Stages:
    grid features, vocabulary, training, scores on the validation photos.
    """
    dataset, choices = _load(data, images, limit, validation_share, max_missing_share, data_seed)
    from caption_train.inception import ExtractorConfig
    from caption_train.runs import prepare, start_run, trainer_of
    from caption_train.training import TrainConfig

    config = TrainConfig(**{field.name: options[field.name] for field in fields(TrainConfig)})
    start_run(run, dataset, config, ExtractorConfig(width, size, layer), extractor_weights, facts=choices)
    cache = cache or run / "grids"
    if until == "features":
        prepare(run, dataset, cache)
        return
    trainer = trainer_of(run, dataset, cache)
    with _steps(trainer.total_steps, int(trainer.step)) as on_step:
        trainer.run(on_step)
    if until == "scores":
        _print_scores(_evaluate(run, dataset, "validation", cache, "best", 1, 0.0, None))


@main.command()
@_data_options
@click.argument("run", type=_FOLDER)
@click.option("--cache", type=_FOLDER, help="Folder of the grid features; RUN/grids if not given.")
@click.option("--split", type=click.Choice(["train", "validation", "test"]), default="validation")
@click.option("--checkpoint", type=click.Choice(["best", "last"]), default="best")
@click.option("--beam", type=click.IntRange(1), default=1, help="Beam size; 1 is greedy.")
@click.option("--length-penalty", type=float, default=0.0, help="Alpha of Wu et al. 2016, equation 14.")
@click.option("--show", type=click.IntRange(0), default=5, help="So many photos' captions beside the real ones.")
@click.option("--json", "as_json", is_flag=True, help="Scores and all captions as one JSON object.")
def evaluate(
    data: Path,
    run: Path,
    cache: Path | None,
    split: str,
    checkpoint: str,
    beam: int,
    length_penalty: float,
    show: int,
    as_json: bool,
    **choices: Any,
) -> None:
    """Print BLEU-1 to 4, ROUGE-L and CIDEr of RUN on a split of DATA, and generated beside real captions."""
    dataset, _ = _load(data, **choices)
    evaluation = _evaluate(run, dataset, split, cache or run / "grids", checkpoint, beam, length_penalty, None)
    if as_json:
        rows = [
            {"path": str(image.path), "caption": caption, "references": list(image.captions)}
            for image, caption in zip(evaluation.images, evaluation.captions, strict=True)
        ]
        click.echo(json.dumps({"scores": evaluation.scores, "captions": rows}))
        return
    _print_scores(evaluation)
    shown = max(1, len(evaluation.images) // show) if show else 1
    for image, caption in list(zip(evaluation.images, evaluation.captions, strict=True))[::shown][:show]:
        click.echo(f"\n{image.path.name}\n  generated  {caption}")
        for reference in image.captions:
            click.echo(f"  real       {reference}")


@main.command()
@click.argument("photos", nargs=-1, required=True, type=_PATH)
@click.option("--out", type=_FOLDER, required=True, help="Folder of the run and the finished extractor.")
@click.option("--cache", type=_FOLDER, help="Folder of the teacher's grids; OUT/teacher if not given.")
@click.option("--exclude", type=_PATH, help="A list of file names, one a line, that must stay unseen.")
@click.option("--teacher-weights", default="imagenet", help="'imagenet' or a weights file.")
@click.option("--teacher-layer", default="mixed10")
@click.option("--width", type=float, default=0.25, help="Width multiplier of the student.")
@click.option("--size", type=int, default=299, help="Pixels to a side, for both.")
@click.option("--epochs", type=int, default=10)
@click.option("--views", type=int, default=2, help="Views of each photo: the whole, and crops.")
@click.option("--batch-size", type=int, default=64)
@click.option("--learning-rate", type=float, default=2e-3)
@click.option("--seed", type=int, default=0)
def distill(
    photos: tuple[Path, ...],
    out: Path,
    cache: Path | None,
    exclude: Path | None,
    teacher_weights: str,
    teacher_layer: str,
    width: float,
    size: int,
    **options: Any,
) -> None:
    """Train a small extractor to reproduce a large one's grid, on the photos of the folders PHOTOS (no captions).

    Give OUT to 'train' as --extractor-weights. Call again to go on after a stop.
    """
    paths = [path for folder in photos for path in photos_in(folder)]
    if exclude is not None:
        try:
            unseen = set(exclude.read_text(encoding="utf-8").split())
        except (OSError, UnicodeDecodeError) as exc:
            raise OptionsError(f"--exclude {exclude} cannot be read: {exc}") from exc
        paths = [path for path in paths if path.name not in unseen]
    from caption_train.distill import DistillConfig, run_distillation
    from caption_train.inception import ExtractorConfig

    run_distillation(
        paths,
        ExtractorConfig(1.0, size, teacher_layer),
        teacher_weights,
        ExtractorConfig(width, size),
        DistillConfig(**options),
        out,
        cache or out / "teacher",
        _steps,
    )
    click.echo(out)


@contextlib.contextmanager
def _steps(total: int, done: int) -> Iterator[Callable[[int, float], None]]:
    """A progress bar with the loss on a terminal's stderr; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda step, loss: None
        return
    with click.progressbar(length=total, label="training", show_pos=True, file=sys.stderr) as bar:
        bar.update(done)

        def on_step(step: int, loss: float) -> None:
            bar.label = f"training, loss {loss:.3f}"
            bar.update(1)

        yield on_step


def _evaluate(
    run: Path,
    dataset: Dataset,
    split: str,
    cache: Path,
    checkpoint: str,
    beam: int,
    length_penalty: float,
    max_words: int | None,
) -> Evaluation:
    """Caption a split, and write its scores into the run folder."""
    from caption_rt.search import DecodeOptions
    from caption_train.runs import evaluate, open_run, record_scores

    images = getattr(dataset, split)
    if not images:
        raise OptionsError(f"the data set {dataset.name} has no {split} split")
    trained = open_run(run, checkpoint)
    options = DecodeOptions(beam_size=beam, length_penalty=length_penalty, max_words=max_words or trained.max_words)
    evaluation = evaluate(trained, images, cache, options)
    record_scores(run, split, evaluation, options, checkpoint)
    return evaluation


def _print_scores(evaluation: Evaluation) -> None:
    for name, value in evaluation.scores.items():
        click.echo(f"{name:8} {value:7.3f}")
    click.echo(f"{'photos':8} {len(evaluation.images):7d}")

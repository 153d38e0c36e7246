"""`caption-train`: parses, calls, prints."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from caption_rt import __version__
from caption_rt.console import echo, run_command
from caption_rt.errors import OptionsError, printable
from caption_train.console import quiet_stderr
from caption_train.datasets import Dataset, load_dataset, photos_in

if TYPE_CHECKING:
    from caption_train.runs import Evaluation

logger = logging.getLogger(__name__)

_FOLDER = click.Path(file_okay=False, path_type=Path)
_PATH = click.Path(path_type=Path)
_COUNT = click.IntRange(1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see `caption_rt.console.run_command`."""
    again = "interrupted; give the same command again to go on"
    return run_command(command, "caption-train", arguments, extra="train", interrupted=again)


@click.group(
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100},
)
@click.version_option(__version__, prog_name="caption-train", message="%(prog)s %(version)s")
@click.option("-v", "--verbose", is_flag=True, help="Show what TensorFlow says as well.")
def command(verbose: bool) -> None:
    """Train an image captioner: InceptionV3, Bahdanau attention, GRU ("Show, Attend and Tell").

    \b
      caption-train train Flickr8k runs/first       train, and go on after a stop
      caption-train evaluate Flickr8k runs/first    scores, and captions beside real ones
      caption-export runs/first my-bundle ...       make a bundle of it for caption-rt

    Exit codes: 0 done, 1 disk, 2 options, 3 vocabulary, 4 photo, 6 data set, 7 training, 130 interrupted (Ctrl-C).
    """  # noqa: D301 - \b is click's mark for lines that stay as they are
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("caption_train").setLevel(logging.INFO)
    logging.getLogger("tensorflow").setLevel(logging.INFO if verbose else logging.ERROR)
    # Before TensorFlow is imported, which reads them once. oneDNN is off by default on processors without AVX-512,
    # where it makes training an extractor twice as fast.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0" if verbose else "3")
    os.environ["KERAS_BACKEND"] = "tensorflow"  # there is no other for these models, whatever Keras is set to


def _options(*decorators: Callable[..., Any]) -> Callable[..., Any]:
    """Several click decorators as one, first to last."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for decorator in decorators[::-1]:
            function = decorator(function)
        return function

    return decorate


_data_options = _options(
    click.argument("data", type=_PATH),
    click.argument("run", type=_FOLDER),
    click.option("--images", type=_PATH, help="Folder of the photos; Flickr8k's is found beside its captions."),
    click.option(
        "--max-missing-share",
        type=click.FloatRange(0, 1),
        default=0.0,
        help="Go on as long as no more than this share of the photos is missing.",
    ),
    click.option(
        "--cache", type=_FOLDER, help="Folder of the grid features, which runs may share.  [default: RUN/grids]"
    ),
)


@command.command()
@_data_options
@click.option("--limit", type=click.IntRange(min=2), help="Take so many photos (the tutorial: 6000).  [default: all]")
@click.option(
    "--validation-share",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.2,
    help="Share of the photos to validate on, where the set has no split of its own.",
)
@click.option("--data-seed", type=int, default=0, help="Decides which photos --limit and --validation-share take.")
@click.option(
    "--extractor-weights",
    metavar="imagenet|none|FILE|FOLDER",
    default="imagenet",
    help="What the extractor starts with, and keeps: 'imagenet' (Keras downloads them), 'none' (random: to try things "
    "out), a weights file, or a folder that 'distill' wrote.",
)
@click.option("--width", type=float, help="Width multiplier of InceptionV3.  [default: 1.0, or as FOLDER has it]")
@click.option(
    "--size", type=int, help="Pixels to a side of the photo as it is seen.  [default: 299, or as FOLDER has it]"
)
@click.option(
    "--layer", help="Block whose output is the grid, mixed0 to mixed10.  [default: mixed10, or as FOLDER has it]"
)
@click.option("--vocabulary", type=_COUNT, default=5000, help="Most frequent words kept, beside the special ones.")
@click.option("--max-words", type=_COUNT, default=40, help="Longer captions are cut, in training and afterwards.")
@click.option("--embedding-dim", type=_COUNT, default=256, help="Size of a word's embedding and of a place's features.")
@click.option("--units", type=_COUNT, default=512, help="Units of GRU, attention and first output layer.")
@click.option(
    "--recurrence",
    type=click.Choice(["carry", "reset"]),
    default="carry",
    help="Whether the GRU's state goes on from word to word; 'reset' is what the tutorial's code does.",
)
@click.option("--epochs", type=_COUNT, default=20, help="Passes over all captions.")
@click.option("--batch-size", type=_COUNT, default=64, help="Captions a step.")
@click.option(
    "--learning-rate", type=float, default=1e-3, help="Adam's; the highest one where it falls along a cosine."
)
@click.option(
    "--schedule", type=click.Choice(["cosine", "constant"]), default="cosine", help="'constant' is the tutorial's."
)
@click.option("--dropout", type=float, default=0.3, help="On word embeddings and GRU outputs; the tutorial has 0.")
@click.option("--clip-norm", type=float, default=5.0, help="Gradients are scaled down to this norm.")
@click.option(
    "--checkpoint-steps", type=_COUNT, default=500, help="Steps between checkpoints; epochs end with one too."
)
@click.option("--seed", type=int, default=0, help="Of weights, order and dropout.")
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
    max_missing_share: float,
    cache: Path | None,
    extractor_weights: str,
    until: str,
    **options: Any,
) -> None:
    """Train on the captions of DATA, in the folder RUN; after a stop, the same command goes on.

    DATA is Flickr8k's folder (Flickr8k.token.txt and, if there, the lists of its split) or a COCO caption JSON, whose
    photos --images names. RUN is made if it is not there.

    The stages are grid features, vocabulary, training, and scores on the validation photos. The scores are printed;
    RUN keeps checkpoints, history.jsonl and loss.png.
    """
    choices = {"limit": options["limit"], "seed": options["data_seed"], "validation_share": options["validation_share"]}
    dataset = load_dataset(data, images=images, max_missing_share=max_missing_share, **choices)
    with quiet_stderr():
        from caption_train.runs import prepare, start_run, trainer_of
        from caption_train.training import TrainConfig

    config = TrainConfig(**{field.name: options[field.name] for field in fields(TrainConfig)})
    asked = {name: options[name] for name in ("width", "size", "layer") if options[name] is not None}
    start_run(run, dataset, config, extractor_weights, extractor_options=asked, choices=choices)
    cache = cache or run / "grids"
    if until == "features":
        prepare(run, dataset, cache)
        return
    trainer = trainer_of(run, dataset, cache)
    with _steps(trainer.total_steps, int(trainer.step)) as on_step:
        trainer.run(on_step)
    if until == "scores":
        _print_scores(_evaluate(run, dataset, "validation", cache, "best", {}))


@command.command()
@_data_options
@click.option("--split", type=click.Choice(["train", "validation", "test"]), default="validation", help="Which photos.")
@click.option(
    "--checkpoint",
    type=click.Choice(["best", "last"]),
    default="best",
    help="The one with the lowest validation loss, or the last one.",
)
@click.option("--beam", "beam_size", type=_COUNT, default=1, help="Captions searched side by side; 1 is greedy.")
@click.option(
    "--length-penalty", type=float, default=0.0, help="More favours longer captions (Wu et al. 2016, eq. 14)."
)
@click.option("--max-words", type=_COUNT, help="Cut captions after so many.  [default: as in training]")
@click.option("--show", type=click.IntRange(0), default=5, help="Photos whose captions are shown beside the real ones.")
@click.option("--json", "as_json", is_flag=True, help="Print scores and all captions as one JSON object.")
def evaluate(
    data: Path,
    run: Path,
    images: Path | None,
    max_missing_share: float,
    cache: Path | None,
    split: str,
    checkpoint: str,
    show: int,
    as_json: bool,
    **decoding: Any,
) -> None:
    """Print BLEU-1 to 4, ROUGE-L and CIDEr of RUN on a split of DATA, and generated beside real captions.

    What of DATA belongs to which split is as it was when RUN was trained (--limit, --validation-share, --data-seed).
    """
    with quiet_stderr():
        from caption_train.runs import data_choices
    dataset = load_dataset(data, images=images, max_missing_share=max_missing_share, **data_choices(run))
    evaluation = _evaluate(run, dataset, split, cache or run / "grids", checkpoint, decoding)
    pairs = list(zip(evaluation.images, evaluation.captions, strict=True))
    if as_json:
        rows = [
            {"path": str(image.path), "caption": caption, "references": list(image.captions)}
            for image, caption in pairs
        ]
        echo(json.dumps({"scores": evaluation.scores, "captions": rows}))
        return
    _print_scores(evaluation)
    for image, caption in pairs[:: max(1, len(pairs) // max(1, show))][:show]:
        echo(f"\n{printable(image.path.name)}\n  generated  {caption}")
        for reference in image.captions:
            echo(f"  real       {reference}")


@command.command()
@click.argument("photos", nargs=-1, required=True, type=_PATH)
@click.option("--out", type=_FOLDER, required=True, help="Folder of the run and the finished extractor.")
@click.option("--cache", type=_FOLDER, help="Folder of the teacher's grids.  [default: OUT/teacher]")
@click.option("--exclude", type=_PATH, help="A list of file names, one a line, that must stay unseen.")
@click.option(
    "--teacher-weights", metavar="imagenet|FILE", default="imagenet", help="'imagenet' (downloaded) or a weights file."
)
@click.option("--teacher-layer", default="mixed10", help="Block of the teacher that is reproduced, mixed0 to mixed10.")
@click.option("--width", type=float, default=0.25, help="Width multiplier of the student.")
@click.option("--layer", default="mixed10", help="Block of the student whose output is its grid, mixed0 to mixed10.")
@click.option("--size", type=int, default=299, help="Pixels to a side of the photos, for both.")
@click.option("--epochs", type=_COUNT, default=10, help="Passes over all views.")
@click.option("--views", type=_COUNT, default=2, help="Views of each photo: the whole, and crops.")
@click.option("--batch-size", type=_COUNT, default=64, help="Views a step.")
@click.option("--learning-rate", type=float, default=2e-3, help="The highest; it falls along a cosine.")
@click.option("--checkpoint-steps", type=_COUNT, default=100, help="Steps between checkpoints.")
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

    Give OUT to 'train' as --extractor-weights. After a stop, the same command goes on.
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
        _steps,
    )
    echo(printable(out))


def _lines(path: Path, option: str) -> set[str]:
    try:
        return {line.strip() for line in path.read_text(encoding="utf-8").splitlines()}
    except OSError as exc:
        raise OptionsError(f"{option} {path} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise OptionsError(f"{option} {path} is not UTF-8 text") from exc


@contextlib.contextmanager
def _bar(label: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
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
def _steps(total: int, done: int) -> Iterator[Callable[[int, float], None]]:
    """A progress bar over training steps, with the loss."""
    with _bar("training", total, done) as advance:
        yield lambda step, loss: advance(1, f"training, loss {loss:.3f}")


def _evaluate(
    run: Path, dataset: Dataset, split: str, cache: Path, checkpoint: str, decoding: dict[str, Any]
) -> Evaluation:
    """Caption a split, and write its scores into the run folder."""
    from caption_rt.options import DecodeOptions
    from caption_train.runs import evaluate, open_run, record_scores

    images = getattr(dataset, split)
    if not images:
        raise OptionsError(f"the data set {dataset.name} has no {split} split")
    trained = open_run(run, checkpoint)
    given = {name: value for name, value in decoding.items() if value is not None}
    options = DecodeOptions(**{"max_words": trained.max_words, **given})
    with _bar("captions", len(images)) as advance:
        found = evaluate(trained, images, cache, options, on_photos=lambda count: advance(count, "captions"))
    if not record_scores(trained, dataset, split, found, options):
        logger.warning("not the data that %s was trained on: its scores.json stays as it is", run)
    return found


def _print_scores(evaluation: Evaluation) -> None:
    for name, value in evaluation.scores.items():
        echo(f"{name:8} {value:7.3f}")
    echo(f"{'photos':8} {len(evaluation.images):7d}")

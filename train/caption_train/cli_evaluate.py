"""`caption-train evaluate`, and what `train` prints of a run at its end."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from caption_rt.console import echo
from caption_rt.errors import OptionsError, printable
from caption_train.cli_options import COUNT, PATH, data_options, progress_bar
from caption_train.console import quiet_stderr
from caption_train.datasets import Dataset, load_dataset

if TYPE_CHECKING:
    from caption_train.caption_statistics import CaptionStatistics
    from caption_train.runs import Evaluation

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Findings:
    """What an evaluation found."""

    evaluation: Evaluation
    """Captions and scores."""
    statistics: CaptionStatistics
    """What the captions are like as a whole."""


@click.command()
@data_options
@click.option("--split", type=click.Choice(["train", "validation", "test"]), default="validation", help="Which photos.")
@click.option(
    "--checkpoint",
    type=click.Choice(["best", "last"]),
    default="best",
    help="The best one on the validation photos, or the last one.",
)
@click.option("--beam", "beam_size", type=COUNT, default=1, help="Captions searched side by side; 1 is greedy.")
@click.option(
    "--length-penalty", type=float, default=0.0, help="More favours longer captions (Wu et al. 2016, eq. 14)."
)
@click.option("--max-words", type=COUNT, help="Cut captions after so many.  [default: as in training]")
@click.option("--sample", is_flag=True, help="Draw words by their probability rather than search.")
@click.option("--seed", type=int, help="With --sample: the same number gives the same captions.  [default: 0]")
@click.option("--show", type=click.IntRange(0), default=5, help="Photos whose captions are shown beside the real ones.")
@click.option("--page", type=PATH, help="Write the twenty photos with the worst captions to this HTML file.")
@click.option(
    "--java/--no-java",
    default=True,
    help="Compute METEOR and SPICE as well, where Java and pycocoevalcap's files for them are there.",
)
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
    page: Path | None,
    java: bool,
    as_json: bool,
    **decoding: Any,
) -> None:
    """Print the scores of RUN on a split of DATA, and generated beside real captions.

    The scores are BLEU-1 to 4, ROUGE-L, CIDEr, METEOR and SPICE, as the COCO caption evaluation computes them.

    What of DATA belongs to which split is as it was when RUN was trained (--limit, --validation-share, --data-seed).
    """
    if decoding["seed"] is not None and not decoding["sample"]:
        raise click.UsageError("--seed needs --sample")
    if page is not None:
        _check_page(page)
    with quiet_stderr():
        from caption_train.runs import data_choices
    dataset = load_dataset(data, images=images, max_missing_share=max_missing_share, **data_choices(run))
    found = evaluate_split(run, dataset, split, cache or run / "grids", checkpoint, decoding, java=java)
    if as_json:
        echo(json.dumps(_to_dict(found)))
    else:
        _print(found, show)
    if page is not None:
        _write_page(page, found.evaluation, f"{run.name}, {split} photos")


def _print(found: Findings, show: int) -> None:
    """Print scores, statistics, and the captions of some photos."""
    print_scores(found)
    for line in found.statistics.lines():
        echo(line)
    pairs = list(zip(found.evaluation.images, found.evaluation.captions, strict=True))
    for image, caption in pairs[:: max(1, len(pairs) // max(1, show))][:show]:
        echo(f"\n{printable(image.path.name)}\n  generated  {caption}")
        for reference in image.captions:
            echo(f"  real       {printable(reference)}")


def evaluate_split(
    run: Path,
    dataset: Dataset,
    split: str,
    cache: Path,
    checkpoint: str,
    decoding: dict[str, Any],
    *,
    java: bool = False,
) -> Findings:
    """Caption a split, and write its scores into the run folder.

    Args:
        run: The run folder.
        dataset: The data.
        split: "train", "validation" or "test".
        cache: Folder of the grid features.
        checkpoint: "best" or "last".
        decoding: Of `DecodeOptions`, what was asked for; None is left as it is. The guard is off unless it is among it:
            scores are the model's own.
        java: Whether METEOR and SPICE are computed where they can be; what cannot is logged in one line.
    """
    from caption_rt.options import DecodeOptions
    from caption_train.caption_statistics import describe_captions
    from caption_train.runs import evaluate, open_run, record_scores
    from caption_train.scores import java_scores

    images = getattr(dataset, split)
    if not images:
        raise OptionsError(f"the data set {dataset.name} has no {split} split")
    trained = open_run(run, checkpoint)
    given = {name: value for name, value in decoding.items() if value is not None}
    options = DecodeOptions(**{"max_words": trained.max_words, "guard": False, **given})
    with progress_bar("captions", len(images)) as advance:
        found = evaluate(trained, images, cache, options, on_photos=lambda count: advance(count, "captions"))
    if java:
        more, missing = java_scores(*_sides(found))
        found = replace(found, scores={**found.scores, **more})
        if missing:
            logger.warning("%s", "; ".join(missing))
    if not record_scores(trained, dataset, split, found, options):
        logger.warning("not the data that %s was trained on: its scores.json stays as it is", run)
    training_captions = (caption for image in dataset.train for caption in image.captions)
    return Findings(found, describe_captions(found.captions, trained.vocabulary, training_captions))


def print_scores(found: Findings) -> None:
    """Print the scores, and of how many photos they are, a line each."""
    for name, value in found.evaluation.scores.items():
        echo(f"{name:8} {value:7.3f}")
    echo(f"{'photos':8} {len(found.evaluation.images):7d}")


def _sides(found: Evaluation) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Generated and real captions by photo, as the scorers take them."""
    names = [str(image.path) for image in found.images]
    real = {str(image.path): tuple(image.captions) for image in found.images}
    return dict(zip(names, found.captions, strict=True)), real


def _to_dict(found: Findings) -> dict[str, Any]:
    pairs = zip(found.evaluation.images, found.evaluation.captions, strict=True)
    rows = [
        {"path": str(image.path), "caption": caption, "references": list(image.captions)} for image, caption in pairs
    ]
    return {
        "scores": dict(found.evaluation.scores),
        "statistics": found.statistics.to_dict(),
        "captions": rows,
    }


def _check_page(page: Path) -> None:
    """Find now what would be found when all photos are captioned."""
    if page.is_dir():
        raise OptionsError(f"--page {printable(page)} is a folder: name a file")
    if not page.parent.is_dir():
        raise OptionsError(f"the folder {printable(page.parent)} of the page does not exist: make it first")


def _write_page(path: Path, found: Evaluation, title: str) -> None:
    from caption_train.evaluation_page import Judged, write_worst_page
    from caption_train.scores import cider_of_each

    worth = cider_of_each(*_sides(found))
    photos = [
        Judged(image.path, caption, image.captions, worth[str(image.path)])
        for image, caption in zip(found.images, found.captions, strict=True)
    ]
    write_worst_page(path, photos, title, found.scores)

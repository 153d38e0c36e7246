"""The command `caption-train evaluate`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from caption_rt.console import echo
from caption_rt.errors import OptionsError, printable
from caption_train.cli_options import COUNT, data_options, progress_bar
from caption_train.console import quiet_stderr
from caption_train.datasets import Dataset, load_dataset

if TYPE_CHECKING:
    from caption_train.runs import Evaluation

logger = logging.getLogger(__name__)


@click.command()
@data_options
@click.option("--split", type=click.Choice(["train", "validation", "test"]), default="validation", help="Which photos.")
@click.option(
    "--checkpoint",
    type=click.Choice(["best", "last"]),
    default="best",
    help="The one with the lowest validation loss, or the last one.",
)
@click.option("--beam", "beam_size", type=COUNT, default=1, help="Captions searched side by side; 1 is greedy.")
@click.option(
    "--length-penalty", type=float, default=0.0, help="More favours longer captions (Wu et al. 2016, eq. 14)."
)
@click.option("--max-words", type=COUNT, help="Cut captions after so many.  [default: as in training]")
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
    evaluation = evaluate_split(run, dataset, split, cache or run / "grids", checkpoint, decoding)
    pairs = list(zip(evaluation.images, evaluation.captions, strict=True))
    if as_json:
        rows = [
            {"path": str(image.path), "caption": caption, "references": list(image.captions)}
            for image, caption in pairs
        ]
        echo(json.dumps({"scores": evaluation.scores, "captions": rows}))
        return
    print_scores(evaluation)
    for image, caption in pairs[:: max(1, len(pairs) // max(1, show))][:show]:
        echo(f"\n{printable(image.path.name)}\n  generated  {caption}")
        for reference in image.captions:
            echo(f"  real       {reference}")


def evaluate_split(
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
    with progress_bar("captions", len(images)) as advance:
        found = evaluate(trained, images, cache, options, on_photos=lambda count: advance(count, "captions"))
    if not record_scores(trained, dataset, split, found, options):
        logger.warning("not the data that %s was trained on: its scores.json stays as it is", run)
    return found


def print_scores(evaluation: Evaluation) -> None:
    """Print the scores, and of how many photos they are, a line each."""
    for name, value in evaluation.scores.items():
        echo(f"{name:8} {value:7.3f}")
    echo(f"{'photos':8} {len(evaluation.images):7d}")

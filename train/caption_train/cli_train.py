"""The command `caption-train train`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from caption_train.cli_evaluate import evaluate_split, print_scores
from caption_train.cli_options import COUNT, data_options, training_bar
from caption_train.console import quiet_stderr
from caption_train.datasets import load_dataset


@click.command()
@data_options
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
@click.option("--vocabulary", type=COUNT, default=5000, help="Most frequent words kept, beside the special ones.")
@click.option("--max-words", type=COUNT, default=40, help="Longer captions are cut, in training and afterwards.")
@click.option("--embedding-dim", type=COUNT, default=256, help="Size of a word's embedding and of a place's features.")
@click.option("--units", type=COUNT, default=512, help="Units of GRU, attention and first output layer.")
@click.option(
    "--recurrence",
    type=click.Choice(["carry", "reset"]),
    default="carry",
    help="Whether the GRU's state goes on from word to word; 'reset' is what the tutorial's code does.",
)
@click.option("--epochs", type=COUNT, default=20, help="Passes over all captions.")
@click.option("--batch-size", type=COUNT, default=64, help="Captions a step.")
@click.option(
    "--learning-rate", type=float, default=1e-3, help="Adam's; the highest one where it falls along a cosine."
)
@click.option(
    "--schedule", type=click.Choice(["cosine", "constant"]), default="cosine", help="'constant' is the tutorial's."
)
@click.option("--dropout", type=float, default=0.3, help="On word embeddings and GRU outputs; the tutorial has 0.")
@click.option("--clip-norm", type=float, default=5.0, help="Gradients are scaled down to this norm.")
@click.option("--checkpoint-steps", type=COUNT, default=500, help="Steps between checkpoints; epochs end with one too.")
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
    with training_bar(trainer.total_steps, int(trainer.step)) as on_step:
        trainer.run(on_step)
    if until == "scores":
        print_scores(evaluate_split(run, dataset, "validation", cache, "best", {}))

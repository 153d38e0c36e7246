"""The commands `caption-train train` and `caption-train settings`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from caption_rt.console import echo
from caption_train.cli_evaluate import evaluate_split, print_scores
from caption_train.cli_options import FOLDER, data_options, training_bar
from caption_train.console import quiet_stderr
from caption_train.datasets import load_dataset
from caption_train.settings import CONFIGS, asked_for, shipped


@click.command()
@data_options
@click.option("--limit", type=click.IntRange(min=2), help="Take so many photos (the tutorial: 6000).  [default: all]")
@click.option(
    "--validation-share",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.2,
    help="Share of the photos to validate on, where the set has no split of its own.",
)
@click.option(
    "--validation-limit", type=click.IntRange(1), help="Validate on so many photos at most (MS-COCO has 40,504)."
)
@click.option("--data-seed", type=int, default=0, help="Decides which photos the limits and --validation-share take.")
@click.option(
    "--config",
    metavar="NAME|FILE",
    help="Settings: default, tutorial, paper, or a TOML file with those that differ from the default.  [default: those "
    "of RUN or of RUN0, else default]",
)
@click.option(
    "--set",
    "changes",
    metavar="SECTION.KEY=VALUE",
    multiple=True,
    help="Change a setting, such as training.epochs=3; may be given several times. 'caption-train settings' has them.",
)
@click.option(
    "--start-from",
    type=FOLDER,
    metavar="RUN0",
    help="Begin with the best weights of another run, with its vocabulary and its extractor.",
)
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
    limit: int | None,
    validation_share: float,
    validation_limit: int | None,
    data_seed: int,
    config: str | None,
    changes: tuple[str, ...],
    start_from: Path | None,
    until: str,
) -> None:
    """Train on the captions of DATA, in the folder RUN; after a stop, the same command goes on.

    RUN is made if it is not there. Its settings, one TOML file, are written into it: to go on, --config, --set and
    --start-from need not be given again.

    The stages are grid features, vocabulary, training, and scores on the validation photos. The scores are printed;
    RUN keeps checkpoints, logs, and pictures of how training goes.
    """
    asked_for(config, changes)  # what is wrong here is said before the data are read
    choices: dict[str, Any] = {
        "limit": limit,
        "seed": data_seed,
        "validation_share": validation_share,
        "validation_limit": validation_limit,
    }
    dataset = load_dataset(data, images=images, max_missing_share=max_missing_share, **choices)
    with quiet_stderr():
        from caption_train.distributed import distribution
        from caption_train.stages import prepare, start_run, trained_by_one, trainer_of

    workers = distribution()
    with trained_by_one(run, workers):
        with workers.chief_first():
            settings = start_run(run, dataset, choices=choices, config=config, changes=changes, start_from=start_from)
        cache = cache or run / "grids"
        if until == "features":
            prepare(run, dataset, cache, workers)
            return
        trainer = trainer_of(run, dataset, cache, workers)
        with training_bar(trainer.total_steps, int(trainer.step), settings.training.batch_size) as on_step:
            trainer.run(on_step)
        with workers.chief_first():  # the others wait, so that none is missed while the chief is busy
            if until == "scores" and workers.is_chief:
                options = asdict(settings.evaluation.decoding(settings.captions.max_words))
                print_scores(evaluate_split(run, dataset, "validation", cache, "best", options))


@click.command("settings")
@click.argument("name", type=click.Choice(CONFIGS), default="default")
def show_settings(name: str) -> None:
    """Print the settings NAME: default, tutorial or paper; what each is and where its value comes from.

    The output is a TOML file that 'caption-train train' takes as --config.
    """
    echo(shipped(name).rstrip("\n"))

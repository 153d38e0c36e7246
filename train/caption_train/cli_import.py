"""The command `caption-train import-tutorial`."""

from __future__ import annotations

from pathlib import Path

import click

from caption_rt.console import echo
from caption_rt.errors import printable
from caption_train.cli_options import COUNT, FOLDER, PATH
from caption_train.console import quiet_stderr


@click.command("import-tutorial")
@click.argument("checkpoint", type=PATH)
@click.argument("run", type=FOLDER)
@click.option("--tokenizer", type=PATH, required=True, help="The JSON file of tokenizer.to_json().")
@click.option(
    "--extractor-weights",
    metavar="imagenet|none|FILE|FOLDER",
    default="imagenet",
    help="The tutorial's are 'imagenet' (Keras downloads them); a file of them, or a folder with another extractor.",
)
@click.option("--max-words", type=COUNT, default=50, help="Captions are cut after so many words.")
def import_tutorial(checkpoint: Path, run: Path, tokenizer: Path, extractor_weights: str, max_words: int) -> None:
    """Make a folder RUN of a CHECKPOINT of TensorFlow's image-captioning tutorial.

    CHECKPOINT is ckpt-N of tf.train.Checkpoint(encoder, decoder, optimizer), or the folder with several, whose last one
    is taken. RUN is then what 'caption', 'evaluate' and caption-export take.
    """
    with quiet_stderr():
        from caption_train.importing import import_tutorial as make_run
    make_run(run, checkpoint, tokenizer, extractor_weights, max_words)
    echo(printable(run))

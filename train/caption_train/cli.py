"""`caption-train`: the command, of which each group of commands has a file."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

import click

from caption_rt import __version__
from caption_rt.command_options import OPTION_NAMES
from caption_rt.console import run_command
from caption_train.cli_caption import caption
from caption_train.cli_data import fetch, report
from caption_train.cli_distill import distill
from caption_train.cli_evaluate import evaluate
from caption_train.cli_import import import_tutorial
from caption_train.cli_train import show_settings, train


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see `caption_rt.console.run_command`."""
    again = "interrupted; give the same command again to go on"
    return run_command(command, "caption-train", arguments, extra="train", names=OPTION_NAMES, interrupted=again)


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
      caption-train caption photo.jpg runs/first    a photo's caption, before any export
      caption-export runs/first my-bundle ...       make a bundle of it for caption-rt

    Exit codes: 0 done, 1 disk, 2 options, 3 vocabulary or bundle, 4 photo, 5 a network gives no numbers, 6 data set,
    7 training, 130 interrupted (Ctrl-C).
    """  # noqa: D301 - \b is click's mark for lines that stay as they are
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("caption_train").setLevel(logging.INFO)
    logging.getLogger("tensorflow").setLevel(logging.INFO if verbose else logging.ERROR)
    # Before TensorFlow is imported, which reads them once. oneDNN is off by default on processors without AVX-512,
    # where it makes training an extractor twice as fast.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0" if verbose else "3")
    os.environ["KERAS_BACKEND"] = "tensorflow"  # there is no other for these models, whatever Keras is set to


for _part in (fetch, report, train, show_settings, evaluate, caption, distill, import_tutorial):
    command.add_command(_part)

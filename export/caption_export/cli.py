"""`caption-export`: the command, of which each command has a file."""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Sequence

import click

from caption_export.cli_export import export
from caption_export.cli_graph import graph
from caption_export.cli_inspect import inspect
from caption_export.cli_pack import pack
from caption_export.cli_unpack import unpack
from caption_export.cli_verify import verify
from caption_rt import __version__
from caption_rt.command_options import OPTION_NAMES
from caption_rt.console import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see `caption_rt.console.run_command`."""
    own = {
        parameter.name or "": parameter.opts[0] for parameter in export.params if isinstance(parameter, click.Option)
    }
    names = {**OPTION_NAMES, **own, "teacher_scores": own["teacher"]}
    return run_command(command, "caption-export", arguments, extra="export", names=names)


class _ExportByDefault(click.Group):
    """A group whose commands are the tools around bundles, and which exports where none of them is named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the name of the default command before what is no command's name and no option of the group.

        Raises:
            click.UsageError: A single word stands in the place of a run, and there is nothing of that name.
        """
        own = {name for parameter in self.get_params(ctx) for name in parameter.opts}
        if not args or args[0] not in {*self.commands, *own}:
            if args and args[0].isalpha() and not os.path.lexists(args[0]):
                near = difflib.get_close_matches(args[0], self.commands, 1)
                there = f"the nearest is {near[0]!r}" if near else f"there are {', '.join(self.commands)}"
                raise click.UsageError(f"there is no command and no run {args[0]!r}; of commands {there}", ctx)
            args = [export.name or "", *args]
        return super().parse_args(ctx, args)


@click.group(
    cls=_ExportByDefault,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100},
)
@click.version_option(__version__, prog_name="caption-export", message="%(prog)s %(version)s")
def command() -> None:
    """Turn a trained run into a bundle for caption-rt, and work with bundles.

    \b
      caption-export RUN OUT --photos DIR     the command "export", if none is named
      caption-export inspect BUNDLE           what is in it
      caption-export verify BUNDLE            whether it is what it says, without TensorFlow
      caption-export pack BUNDLE ZIP          the same in one file, and back: unpack ZIP BUNDLE
      caption-export graph BUNDLE FILE        one ONNX file of it, for any language

    Exit codes: 0 done, 1 disk, 2 options, 3 bundle, 4 photo, 5 ONNX Runtime or a self-test, 6 no photos or no data set,
    7 run, 8 not exportable or not equal, 130 interrupted (Ctrl-C).
    """  # noqa: D301 - \b is click's mark for lines that stay as they are
    # Our own progress lines on stderr, and of the libraries only errors.
    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stderr)
    for package in ("caption_export", "caption_train", "caption_rt"):
        logging.getLogger(package).setLevel(logging.INFO)
    # What it cannot convert it logs as an error, and the graph with it in is then refused with our own sentence.
    logging.getLogger("tf2onnx").setLevel(logging.CRITICAL)
    # Before TensorFlow is imported, which reads them once.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["KERAS_BACKEND"] = "tensorflow"  # there is no other for these models, whatever Keras is set to


for _part in (export, graph, inspect, verify, pack, unpack):
    command.add_command(_part)

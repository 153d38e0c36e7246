"""The command `caption-rt`: parses, calls and prints."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import click

import caption_rt
from caption_rt.console import complain, echo, run_command
from caption_rt.errors import ImageError, printable

if TYPE_CHECKING:
    from caption_rt.captioner import Caption, Captioner

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: the command's arguments; None for those of the process.

    Returns:
        The exit code: 0, or that of the first error; see `caption_rt.console.run_command`.
    """
    return run_command(command, "caption-rt", arguments)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("images", metavar="IMAGE...", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object a photo, one a line.")
@click.option("--model", metavar="BUNDLE", help="Folder or zip file of the model; the one that came along by default.")
@click.option("--device", default="auto", metavar="auto|cpu|cuda", help="Where to run; auto takes CUDA if it works.")
@click.option(
    "--beam", type=int, metavar="N", help="Captions searched side by side; 1 is greedy. Default: the model's."
)
@click.option("--max-words", type=int, metavar="N", help="Cut captions after N words. Default: the model's.")
@click.option(
    "--plot", metavar="FILE", help="Write where the model looked for each word (PNG, SVG, PDF); one photo only."
)
@click.option("--self-test", is_flag=True, help="Check that the model gives on this machine what its makers got.")
@click.version_option(caption_rt.__version__, prog_name="caption-rt", message="%(prog)s %(version)s")
def command(
    images: tuple[str, ...],
    as_json: bool,
    model: str | None,
    device: str,
    beam: int | None,
    max_words: int | None,
    plot: str | None,
    self_test: bool,
) -> int:
    """Caption photos.

    Prints the caption of one IMAGE, or a line PATH, tab, CAPTION for each of several. A photo that cannot be read is
    reported on standard error; the others are still captioned.
    """
    if bool(images) == self_test:
        raise click.UsageError("name at least one photo, or --self-test alone")
    if self_test and not (beam is None and max_words is None and plot is None):
        raise click.UsageError("--self-test searches as the bundle states: leave out --beam, --max-words and --plot")
    if plot is not None:
        _check_plot(plot, images)
    # Imported late: --help and --version need neither NumPy nor ONNX Runtime.
    from caption_rt.captioner import Captioner

    captioner = Captioner.load(model, device)
    if self_test:
        return _self_test(captioner, as_json)
    given = {"beam_size": beam, "max_words": max_words}
    options = replace(captioner.default_options, **{name: value for name, value in given.items() if value is not None})
    results = captioner.caption_many(images, options, on_error="return")
    code = 0
    for path, result in zip(images, results, strict=True):
        if isinstance(result, ImageError):
            complain("caption-rt", str(result))
            code = code or result.exit_code
        _print_result(path, result, as_json=as_json, alone=len(images) == 1)
        if plot is not None and not isinstance(result, ImageError):
            result.plot(path, plot)
    return code


def _check_plot(plot: str, images: Sequence[str]) -> None:
    """Refuse what cannot be plotted before the model is loaded."""
    from caption_rt.attention import check_plot_path

    if len(images) != 1:
        raise click.UsageError("--plot takes one photo")
    check_plot_path(plot)


def _print_result(path: str, result: "Caption | ImageError", *, as_json: bool, alone: bool) -> None:
    if as_json:
        if isinstance(result, ImageError):
            error = {"class": type(result).__name__, "message": str(result)}
            record = {"path": path, "status": "error", "caption": None, "error": error}
        else:
            record = {"path": path, "status": "ok", **result.to_dict()}
        # Escaped to ASCII, so that every name, decodable or not, survives every terminal and pipe.
        echo(json.dumps(record))
    elif not isinstance(result, ImageError):
        echo(result.text if alone else f"{printable(path)}\t{result.text}")


def _self_test(captioner: "Captioner", as_json: bool) -> int:
    result = captioner.self_test()
    name = captioner.bundle.manifest.name
    if as_json:
        echo(
            json.dumps(
                {
                    "status": "ok",
                    "model": name,
                    "photos": result.photos,
                    "provider": result.provider,
                    "max_difference": result.max_difference,
                    "tolerance": result.tolerance,
                }
            )
        )
    else:
        echo(
            f"self-test passed: {name}, {result.photos} photos on {result.provider}, log-probabilities within "
            f"{result.max_difference:.1g} ({result.tolerance:.1g} allowed)"
        )
    return 0

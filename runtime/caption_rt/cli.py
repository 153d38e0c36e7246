"""The command `caption-rt`: parses, calls and prints."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import click

import caption_rt
from caption_rt.command_options import OPTION_NAMES, GroupedCommand, is_given, options
from caption_rt.console import echo, run_command
from caption_rt.request import Request
from caption_rt.runs import load_captioner, opened_bundle, run

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: the command's arguments; None for those of the process.

    Returns:
        The exit code: 0; 4 if no photo was captioned, 6 if some were and some not; 130 after Ctrl-C and 143 after
        SIGTERM; or that of an error: see `caption_rt.console.run_command`.
    """
    return run_command(command, "caption-rt", arguments, names=OPTION_NAMES)


@click.command(
    cls=GroupedCommand,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 all captioned, or none found; 4 none captioned, 6 some; 2 wrong usage, 3 the model, "
    "5 the device, 1 all else.",
)
@click.argument("images", metavar="[IMAGE|FOLDER|ADDRESS|-]...", nargs=-1)
@options
@click.version_option(caption_rt.__version__, prog_name="caption-rt", message="%(prog)s %(version)s")
def command(images: tuple[str, ...], **given: Any) -> int:
    """Caption photos: files, all photos in folders, or http(s) addresses.

    "-" reads standard input: the names of these, one a line, or the bytes of one photo. Folders are gone through with
    all that is in them, in the order of names; what is hidden (its name begins with a dot) is passed over.

    Prints the caption of one photo, or a line PATH, tab, CAPTION for each of several. A photo that cannot be read is
    reported; the others are still captioned. With --output, a run that ended early, however it did, goes on where it
    stopped when the same command is given again.
    """
    asked = [name for name in ("self_test", "doctor") if given[name]]
    if len(asked) + bool(images) != 1:
        raise click.UsageError("name at least one photo, or --self-test or --doctor alone")
    if asked:
        _check_alone(given, f"--{asked[0].replace('_', '-')}")
        return _self_test(given) if given["self_test"] else _doctor(given)
    return run(Request.of(images, given))


def _check_alone(given: Mapping[str, Any], name: str) -> None:
    """Refuse options that mean nothing to a test of the installation."""
    used = {"model", "device", "precision", "threads", "as_json", "self_test", "doctor"}
    for option, value in given.items():
        if option not in used and (is_given(value) or (option == "guard" and value is False)):
            raise click.UsageError(
                f"{name} goes with --model, --device, --precision, --threads and --json alone: leave out "
                f"--{option.replace('_name', '').replace('_', '-')}"
            )


def _doctor(given: Mapping[str, Any]) -> int:
    from caption_rt.doctor import examine

    report = examine(given["model"], given["device"], given["threads"], given["precision"])
    if given["as_json"]:
        echo(json.dumps(report.to_dict()))
    else:
        for line in report.lines():
            echo(line)
    return report.exit_code


def _self_test(given: Mapping[str, Any]) -> int:
    with load_captioner(given, opened_bundle(given)) as captioner:
        result = captioner.self_test()
        name = captioner.bundle.manifest.name
    if given["as_json"]:
        values = {
            "status": "ok",
            "model": name,
            "photos": result.photos,
            "provider": result.provider,
            "precision": result.precision,
            "max_difference": result.max_difference,
            "tolerance": result.tolerance,
        }
        echo(json.dumps(values))
    else:
        echo(
            f"self-test passed: {name}, {result.photos} photos on {result.provider} in {result.precision}, "
            f"log-probabilities within {result.max_difference:.1g} ({result.tolerance:.1g} allowed)"
        )
    return 0

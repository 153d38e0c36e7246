"""How this project's commands end: results on stdout, one sentence on stderr, an exit code, never a traceback."""

import contextlib
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import IO

import click

from caption_rt import ctrl_c
from caption_rt.errors import CaptionError, OptionsError, printable, remedy_of

__all__ = ["complain", "drop", "echo", "run_command", "say"]

# What a shell reports for a program that Ctrl-C or a closed pipe ended: 128 + the signal's number.
_INTERRUPTED, _PIPE_CLOSED = 130, 141


def run_command(
    command: click.Command,
    name: str,
    arguments: Sequence[str] | None = None,
    *,
    extra: str | None = None,
    names: Mapping[str, str] | None = None,
    interrupted: str = "interrupted",
) -> int:
    """Run a command and turn whatever ends it into a sentence and an exit code.

    Args:
        command: what click made.
        name: the program's name.
        arguments: the command's arguments; None for those of the process.
        extra: the extra that brings what the command imports, beyond what caption-rt itself needs.
        names: what the command's errors call our parameters, as `CaptionError.renamed` takes it.
        interrupted: what is said after Ctrl-C.

    Returns:
        The exit code: 0; the error's own (see `caption_rt.errors`); 1 where a file or the output cannot be written; 2
        for wrong usage, or where a package is not installed; 130 after Ctrl-C; 141 where the reader of a pipe is gone.
    """
    # Damaged metadata makes Pillow warn. What matters of it comes as an ImageError.
    warnings.filterwarnings("ignore", module="PIL")
    for stream_name in ("stdout", "stderr"):
        # A daemon may start with them closed: what would be printed is lost, and the work is done all the same.
        if getattr(sys, stream_name) is None:
            setattr(sys, stream_name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    streams = sys.stdout, sys.stderr
    for stream in streams:
        # A name or word that the terminal's encoding lacks is printed as an escape rather than ending the run.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    try:
        with ctrl_c.hearing():
            code = command.main(None if arguments is None else list(arguments), name, standalone_mode=False)
            sys.stdout.flush()
            return int(code or 0)
    except CaptionError as exc:
        if ctrl_c.has_come() and isinstance(exc.__cause__, ImportError):
            complain(name, interrupted)
            return _INTERRUPTED
        complain(name, str(exc.renamed(names or {})))
        return exc.exit_code
    except click.UsageError as exc:
        asked = exc.ctx.command_path if exc.ctx else name
        complain(name, f"{exc.format_message().removesuffix('.')} (see {asked} --help)")
        return exc.exit_code
    except (click.Abort, KeyboardInterrupt):
        complain(name, interrupted)
        return _INTERRUPTED
    except ImportError as exc:
        if ctrl_c.has_come():
            complain(name, interrupted)
            return _INTERRUPTED
        if not isinstance(exc, ModuleNotFoundError):
            raise
        package = (exc.name or "").partition(".")[0]
        if package.startswith("caption_"):  # not a missing package but a mistake of ours
            raise
        brings = f"caption-rt[{extra}]" if extra else "caption-rt"
        complain(name, f"{exc.name} is not installed: pip install '{brings}' brings it")
        return OptionsError.exit_code
    except (BrokenPipeError, SystemExit) as exc:
        # click makes an exit with 1 of the one, wherever it came from, and puts streams of its own in place of ours.
        if isinstance(exc, SystemExit) and sys.stdout is streams[0]:
            raise
        sys.stdout, sys.stderr = streams
        drop(sys.stdout)
        return _PIPE_CLOSED
    except OSError as exc:
        reason = exc.strerror or exc
        if exc.filename is None:
            drop(sys.stdout)
        remedy = remedy_of(exc)
        complain(name, f"{exc.filename or 'the output cannot be written'}: {reason}{remedy and ': '}{remedy}")
        return CaptionError.exit_code


def say(name: str, message: str) -> None:
    """Say on stderr how a run goes, on one line.

    Args:
        name: the program's name.
        message: a sentence.
    """
    _tell(f"{name}: {printable(message)}")


def complain(name: str, message: str) -> None:
    """Say on stderr what is wrong, on one line whatever the message holds.

    Args:
        name: the program's name.
        message: a sentence.
    """
    _tell(f"{name}: error: {printable(message)}")


def _tell(line: str) -> None:
    """Print a line on stderr; where that is gone, as a terminal that was closed, nobody misses it."""
    try:
        click.echo(line, err=True)
    except OSError:
        drop(sys.stderr)


def echo(line: str | bytes) -> None:
    """Print results on stdout; where their reader is gone (``| head -1``), end the command quietly.

    Args:
        line: a line of text, without its end; or bytes, which go out as they are.
    """
    try:
        click.echo(line, nl=isinstance(line, str))
    except BrokenPipeError as exc:
        drop(sys.stdout)
        raise click.exceptions.Exit(_PIPE_CLOSED) from exc


def drop(stream: IO[str]) -> None:
    """Send what is still buffered nowhere: Python would try to write it once more at exit, and report that.

    Args:
        stream: standard output or standard error, whose reader is gone.
    """
    # One that an embedding program put there has no file, and nothing to drop.
    with contextlib.suppress(OSError):
        target = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, target)
        os.close(nowhere)

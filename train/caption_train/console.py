"""How the commands of this package end: a sentence on stderr and an exit code, never a traceback."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence

import click

from caption_rt.errors import CaptionError, OptionsError, printable

# What the extra [train] brings, by import name.
_EXTRA = frozenset({"h5py", "keras", "matplotlib", "pycocoevalcap", "tensorflow"})

# What a shell reports for a program that Ctrl-C or a closed pipe ended: 128 + the signal's number.
_INTERRUPTED, _PIPE_CLOSED = 130, 141


def run_command(command: click.Command, name: str, arguments: Sequence[str] | None = None) -> int:
    """Run a command that can be called again to go on.

    Args:
        command: What click made.
        name: The program's.
        arguments: The command's arguments; None for those of the process.

    Returns:
        The exit code: 0; the code of the error (see `caption_rt.errors`, `caption_train.errors`); 1 where the disk
        fails; 2 where the extra is missing; 130 after Ctrl-C.
    """
    # Damaged metadata makes Pillow warn. What matters of it comes as an ImageError.
    warnings.filterwarnings("ignore", module="PIL")
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal's encoding lacks is printed as an escape rather than ending the run.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def complain(message: str) -> None:
        click.echo(f"{name}: error: {printable(message)}", err=True)

    try:
        code = command.main(None if arguments is None else list(arguments), name, standalone_mode=False)
        sys.stdout.flush()
        return int(code or 0)
    except CaptionError as exc:
        complain(str(exc))
        return exc.exit_code
    except click.UsageError as exc:
        complain(f"{exc.format_message()} (see {exc.ctx.command_path if exc.ctx else name} --help)")
        return exc.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo(f"\n{name}: interrupted; give the same command again to go on", err=True)
        return _INTERRUPTED
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] not in _EXTRA:
            raise
        complain(f"{exc.name} is not installed; training needs the extra: pip install 'caption-rt[train]'")
        return OptionsError.exit_code
    except BrokenPipeError:
        # `caption-train evaluate ... | head`: the reader has what it wanted.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except OSError as exc:
        complain(f"{exc.filename or 'the disk'}: {exc.strerror or exc}")
        return CaptionError.exit_code


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Keep back what TensorFlow's libraries say while they load, whatever the log level; shown if loading fails."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        except Exception as exc:
            if not isinstance(exc, ModuleNotFoundError):
                said.seek(0)
                os.write(kept, said.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)

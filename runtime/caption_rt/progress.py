"""What a run tells about itself: counts, the exit code, the file of errors, a bar on a terminal."""

import contextlib
import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import click

from caption_rt.console import drop
from caption_rt.errors import CaptionError, ImageError, OptionsError, printable, remedy_of, shown

if TYPE_CHECKING:
    from click._termui_impl import ProgressBar

__all__ = ["SOME_FAILED", "Bar", "ErrorsFile", "Tally"]

SOME_FAILED = 6
"""The exit code where some photos have their caption and some have none."""

# Reasons that a summary counts apart, and examples that it gives of each.
_REASONS, _EXAMPLES = 12, 3


class Tally:
    """Counts of a run."""

    def __init__(self) -> None:
        """Begin to count, and the time."""
        self.captioned = 0
        """Photos captioned by this run."""
        self.done = 0
        """Photos that had their caption before."""
        self.left = 0
        """Photos beside which something is that is not ours, and was left alone."""
        self.failed = 0
        """Photos without a caption, by this run or an earlier one."""
        self._start = perf_counter()
        self._reasons: dict[str, tuple[int, list[str]]] = {}

    @property
    def total(self) -> int:
        """All photos seen."""
        return self.captioned + self.done + self.left + self.failed

    @property
    def seconds(self) -> float:
        """How long the run takes so far."""
        return perf_counter() - self._start

    @property
    def exit_code(self) -> int:
        """0 if every photo has its caption, by this run or an earlier one; 4 if none has; 6 if some have."""
        if not self.failed:
            return 0
        return SOME_FAILED if self.captioned or self.done else ImageError.exit_code

    def fail(self, path: str, reason: str) -> None:
        """Count a photo without a caption, with the reason that its error states."""
        self.failed += 1
        count, examples = self._reasons.setdefault(reason, (0, []))
        if len(examples) < _EXAMPLES:
            examples.append(shown(path))
        self._reasons[reason] = count + 1, examples

    def lines(self) -> list[str]:
        """The summary, a sentence and a line for each reason, the most frequent first."""
        seconds = self.seconds
        text = f"captioned {_photos(self.captioned)} in {seconds:.1f} s"
        if self.captioned:
            text += f" ({self.captioned / max(seconds, 1e-9):.1f} a second)"
        if self.done:
            text += f"; {self.done} had their caption before"
        if self.left:
            text += f"; {self.left} left alone"
        lines = [f"{text}; {self.failed} failed{':' if self.failed else ''}"]
        reasons = sorted(self._reasons.items(), key=lambda item: -item[1][0])
        if len(reasons) > _REASONS:
            rest = [found for _, found in reasons[_REASONS - 1 :]]
            examples = [name for _, names in rest for name in names][:_EXAMPLES]
            reasons[_REASONS - 1 :] = [(f"{len(rest)} other reasons", (sum(count for count, _ in rest), examples))]
        for reason, (count, examples) in reasons:
            more = ", ..." if count > len(examples) else ""
            lines.append(f"  {count} x {printable(reason)}: {', '.join(examples)}{more}")
        return lines


class ErrorsFile:
    """The bad records of a run as JSON lines, each with its path and `error_fields`; put in its place at the end."""

    def __init__(self, path: Path) -> None:
        """Begin the file under a temporary name; a pipe or device is written as it comes.

        Args:
            path: the file.
        """
        self._path = path
        self._target = Path(os.path.realpath(path))
        self._direct = _is_stream(path)
        self._fresh = self._target if self._direct else self._target.with_name(f".{self._target.name}.part")
        try:
            self._file: IO[bytes] = self._fresh.open("wb")
        except OSError as exc:
            raise self._cannot_write(exc) from exc

    @staticmethod
    def check(path: Path, *, replace: bool) -> None:
        """Refuse a file before anything is loaded or changed.

        Args:
            path: the file.
            replace: a file that is there may be replaced even if it is not one of errors.

        Raises:
            OptionsError: the file is there and holds something else, or its folder is not there.
            CaptionError: its folder is read-only.
        """
        if not path.parent.is_dir():
            raise OptionsError(f"the folder of {printable(path)} does not exist: make it first")
        if path.is_dir():
            raise OptionsError(f"{printable(path)} is a folder: name a file for --errors")
        if not _is_stream(path) and not os.access(Path(os.path.realpath(path)).parent, os.W_OK):
            raise CaptionError(f"the folder of {printable(path)} is read-only: write --errors elsewhere")
        if not (_is_stream(path) or replace or _holds_errors(path)):
            raise OptionsError(f"{printable(path)} holds something else than errors: choose another file for --errors")

    def add(self, path: str, error: str) -> None:
        """Add the error of a photo, given as `caption_rt.outputs.Entry.error`."""
        self._file.write(json.dumps({"path": path, **json.loads(error)}).encode("ascii") + b"\n")

    def close(self) -> None:
        """Put the file in its place.

        Raises:
            CaptionError: it cannot be written.
        """
        try:
            self._file.close()
            if not self._direct:
                os.replace(self._fresh, self._target)
        except OSError as exc:
            with contextlib.suppress(OSError):
                self._fresh.unlink()
            raise self._cannot_write(exc) from exc

    def _cannot_write(self, exc: OSError) -> CaptionError:
        reason = printable(exc.strerror or exc)
        return CaptionError(
            f"the file of errors {shown(self._path)} cannot be written ({reason}): {remedy_of(exc) or 'mend that'}"
        )


class Bar:
    """A progress bar on standard error, with count, rate and time left; nothing where that is no terminal."""

    def __init__(self, total: int | None, *, shown: bool) -> None:
        """Show the bar.

        Args:
            total: how many photos there are; None if that is not known.
            shown: False for no bar.
        """
        self._bar: ProgressBar[Any] | None = None
        self._start = perf_counter()
        self._count = 0
        if shown:
            self._bar = click.progressbar(
                length=total,
                file=sys.stderr,
                show_pos=True,
                show_eta=total is not None,
                item_show_func=lambda _: self._rate(),
            )

    def __enter__(self) -> "Bar":
        """The bar itself."""
        if self._bar is not None:
            self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the bar's line."""
        if self._bar is not None:
            with _not_to_be_seen():
                self._bar.__exit__(kind, exc, traceback)

    def advance(self, count: int) -> None:
        """Move on."""
        self._count += count
        if self._bar is not None:
            with _not_to_be_seen():
                self._bar.update(count)

    def _rate(self) -> str:
        return f"{self._count / max(perf_counter() - self._start, 1e-9):.1f} photos/s"


@contextlib.contextmanager
def _not_to_be_seen() -> Iterator[None]:
    """Go on where the terminal was closed: a bar is no reason to end a run."""
    try:
        yield
    except OSError:
        drop(sys.stderr)


def _photos(count: int) -> str:
    return "1 photo" if count == 1 else f"{count} photos"


def _is_stream(path: Path) -> bool:
    """Whether it is a pipe or device."""
    return path.exists() and not stat.S_ISREG(path.stat().st_mode)


def _holds_errors(path: Path) -> bool:
    """Whether a file is not there, empty, or one of errors."""
    try:
        with path.open("rb") as file:
            first = file.readline(1 << 20)
        return not first or set(json.loads(first)) - {"reason"} == {"path", "class", "message"}
    except FileNotFoundError:
        return True
    except (OSError, ValueError, TypeError):
        return False

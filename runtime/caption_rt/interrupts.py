"""Ctrl-C and what else asks a run to end: the first time in order, the second time at once."""

import contextlib
import os
import signal
import stat
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interrupts"]

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupts:
    """Takes signals while it is entered; outside the main thread it takes none.

    What is ignored stays so, as by ``nohup``.
    """

    def __init__(self, name: str, comfort: str = "") -> None:
        """Prepare.

        Args:
            name: the program's name.
            comfort: what the second signal leaves behind, as part of a sentence.
        """
        self.signal: int | None = None
        """The first signal that came."""
        self._lines = (
            f"{name}: stopping: the photos in work are finished first (Ctrl-C once more stops at once)",
            f"{name}: stopped at once{comfort and '; '}{comfort}",
        )
        self._before: dict[int, Any] = {}

    @property
    def stopped(self) -> bool:
        """Whether the run is to end."""
        return self.signal is not None

    def is_stopped(self) -> bool:
        """The same, to be passed on."""
        return self.stopped

    @property
    def exit_code(self) -> int:
        """What a shell reports for the signal: 128 and its number."""
        return 128 + (self.signal or 0)

    def __enter__(self) -> "Interrupts":
        """Take signals."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # First of all: the second signal may come within these lines.
        again, self.signal = self.signal is not None, self.signal or number
        # On a terminal there is perhaps a bar in the line, which hides the cursor. Past Python's buffers, which may be
        # in use just now.
        start = "\r\x1b[K\x1b[?25h" if os.isatty(2) else ""
        with contextlib.suppress(OSError):  # nobody is there any longer
            os.write(2, f"{start}{self._lines[again]}\n".encode())
        if again:
            os._exit(128 + number)
        _leave_closed_terminals()


def _leave_closed_terminals() -> None:
    """Let what is still printed on a terminal that was closed go nowhere, rather than end the run."""
    for target in (1, 2):
        with contextlib.suppress(OSError):
            # A closed one is a terminal no longer, but still a device.
            if stat.S_ISCHR(os.fstat(target).st_mode) and not os.isatty(target):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, target)
                os.close(nowhere)

"""Ctrl-C while a command begins: no import may forget it."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

__all__ = ["check", "has_come", "hearing"]

_heard: list[int] = []


@contextlib.contextmanager
def hearing() -> Iterator[None]:
    """Note that Ctrl-C came, beside raising KeyboardInterrupt for it.

    Modules written in C report whatever ends their initialisation as an ImportError: NumPy and ONNX Runtime do, and one
    of them forgets why. And what is raised while Python clears a module's lock away is reported, and goes no further.
    Within another `hearing`, outside the main thread, and where somebody else listens, this does nothing.
    """
    listening = signal.getsignal(signal.SIGINT)
    if listening is _hear:
        yield
        return
    _heard.clear()
    if threading.current_thread() is not threading.main_thread() or listening is not signal.default_int_handler:
        yield
        return
    report = sys.unraisablehook

    def report_others(unraisable: Any) -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            report(unraisable)

    signal.signal(signal.SIGINT, _hear)
    sys.unraisablehook = report_others
    try:
        yield
    finally:
        sys.unraisablehook = report
        signal.signal(signal.SIGINT, signal.default_int_handler)


def has_come() -> bool:
    """Whether Ctrl-C came within the last `hearing`."""
    return bool(_heard)


def check() -> None:
    """Raise KeyboardInterrupt if Ctrl-C came, for the case that it has been lost."""
    if has_come():
        raise KeyboardInterrupt


def _hear(number: int, frame: FrameType | None) -> None:
    _heard.append(number)
    raise KeyboardInterrupt

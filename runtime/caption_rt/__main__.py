"""The command `caption-rt` and `python -m caption_rt`: `caption_rt.cli`, with Ctrl-C heard from its first import on."""

import atexit
import os
import sys


def main() -> int:
    """Run the command; the process is to end with what this gives.

    Returns:
        The exit code of `caption_rt.cli.main`, or, before that begins, 130 for Ctrl-C and 2 where a package is missing.
    """
    ending = _Ending()
    ending.code = _run()
    return ending.code


def _run() -> int:
    try:
        from caption_rt.ctrl_c import hearing

        with hearing():
            from caption_rt.cli import main as run

            return run()
    except ModuleNotFoundError as exc:
        if (exc.name or "").startswith("caption_"):  # not a missing package but a mistake of ours
            raise
        sys.stderr.write(f"caption-rt: error: {exc.name} is not installed: pip install 'caption-rt' brings it\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("caption-rt: error: interrupted\n")
        return 130


class _Ending:
    """Ends the process once Python has done all that matters at its end: threads joined, exit handlers called.

    What Python would do after that is to take modules and sessions apart piece by piece, an eighth of the time of a
    photo's caption, and the system takes all of it back anyway.
    """

    def __init__(self) -> None:
        self.code = 1  # of a mistake of ours, with its traceback
        # Handlers are called the last one first, so this one after all others; unless somebody else's was there before.
        if atexit._ncallbacks() == 0:
            atexit.register(self._end)

    def _end(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            try:
                if stream is not None:
                    stream.flush()
            except (OSError, ValueError):  # Python reports it
                return
        os._exit(self.code)


if __name__ == "__main__":
    sys.exit(main())

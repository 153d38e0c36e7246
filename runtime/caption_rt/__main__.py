"""The command `caption-rt` and `python -m caption_rt`: `caption_rt.cli`, with Ctrl-C heard from its first import on."""

import sys


def main() -> int:
    """Run the command.

    Returns:
        The exit code of `caption_rt.cli.main`, or 130 if Ctrl-C comes before that begins.
    """
    try:
        from caption_rt.cli import main as run

        return run()
    except KeyboardInterrupt:
        sys.stderr.write("caption-rt: error: interrupted\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())

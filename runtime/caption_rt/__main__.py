"""The command `caption-rt` and `python -m caption_rt`: `caption_rt.cli`, with Ctrl-C heard from its first import on."""

import sys


def main() -> int:
    """Run the command.

    Returns:
        The exit code of `caption_rt.cli.main`, or, before that begins, 130 for Ctrl-C and 2 where a package is missing.
    """
    try:
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


if __name__ == "__main__":
    sys.exit(main())

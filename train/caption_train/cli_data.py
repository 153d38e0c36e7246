"""`caption-train fetch` and `caption-train report`: data sets before anything is trained. Neither needs TensorFlow."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from caption_rt.console import say
from caption_rt.errors import OptionsError
from caption_train.cli_options import FOLDER, PATH

_PARTS = ("annotations", "train", "val")
_PROGRAM = "caption-train"


@click.command()
@click.argument("name", metavar="coco", type=click.Choice(["coco"]))
@click.argument("folder", type=FOLDER)
@click.option(
    "--year", type=click.Choice(["2014", "2017"]), default="2014", help="Which edition; the tutorial's is 2014."
)
@click.option(
    "--only",
    type=click.Choice(_PARTS),
    multiple=True,
    help="Fetch this alone; may be given more than once.  [default: all three]",
)
@click.option("--mirror", metavar="ADDRESS", help="Fetch from there instead of http://images.cocodataset.org/.")
@click.option(
    "--addresses", type=PATH, help="A TOML file with other addresses, sizes and checksums (see docs/data.md)."
)
@click.option("--keep-archives", is_flag=True, help="Keep the zip files once they are unpacked.")
@click.option("--yes", is_flag=True, help="Do not ask before many gigabytes are fetched.")
def fetch(
    name: str,
    folder: Path,
    year: str,
    only: tuple[str, ...],
    mirror: str | None,
    addresses: Path | None,
    keep_archives: bool,
    yes: bool,
) -> None:
    """Fetch MS-COCO's captions and photos into FOLDER: 20 GB of 2014, or 20 GB of 2017.

    Sizes and SHA-256 are checked, and the archives unpacked. After a stop, the same command goes on where it was. What
    is there already is not fetched again. FOLDER is then what 'train' takes as DATA.
    """
    from caption_train.fetching import check_space, plan, read_archives
    from caption_train.fetching import fetch as run

    archives = read_archives(name, year, only or _PARTS, addresses=addresses, mirror=mirror)
    jobs = plan(archives, folder)
    if not jobs:
        say(_PROGRAM, f"everything is in {folder} already")
        return
    needed, free = check_space(jobs, folder, keep_archives=keep_archives)
    for job in jobs:
        here = f", of which {_size(job.held)} are here" if job.held else ""
        say(_PROGRAM, f"{job.archive.address}: {_size(job.size)}{here}")
    left = sum(max(0, (job.size or 0) - job.held) for job in jobs)
    unknown = " and what is not known" if any(job.size is None for job in jobs) else ""
    say(_PROGRAM, f"to fetch: {_size(left)}{unknown}; it takes {_size(needed)} of the {_size(free)} free in {folder}")
    if not yes:
        if not sys.stdin.isatty():
            raise OptionsError("nobody is there to be asked whether to go on: give --yes to agree")
        if not click.confirm("Go on?", err=True):
            say(_PROGRAM, "nothing was fetched")
            return
    run(jobs, folder, _byte_bar, keep_archives=keep_archives)
    say(_PROGRAM, f"done; next: caption-train train {folder} RUN")


def _size(count: int | None) -> str:
    """A number of bytes for a person."""
    if count is None:
        return "of unknown size"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"


@contextlib.contextmanager
def _byte_bar(label: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over bytes on stderr, where that is a terminal; yields what moves it on."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    shown = f"{label} ({_size(total)})" if total else label
    with click.progressbar(length=total, label=shown, show_percent=True, file=sys.stderr) as bar:
        bar.update(done)
        yield bar.update

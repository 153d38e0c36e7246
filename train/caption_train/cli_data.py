"""`caption-train fetch` and `caption-train report`: data sets before anything is trained. Neither needs TensorFlow."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from caption_rt.console import echo, say
from caption_rt.errors import OptionsError
from caption_train.cli_options import COUNT, FOLDER, PATH, progress_bar

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

    archives = read_archives(name, year, tuple(dict.fromkeys(only)) or _PARTS, addresses=addresses, mirror=mirror)
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
    with_captions = any(folder.glob("annotations/captions_*.json"))
    with_photos = any((folder / f"{part}{year}").is_dir() for part in ("train", "val"))
    say(_PROGRAM, f"done; next: caption-train train {folder} RUN" if with_captions and with_photos else "done")


@click.command()
@click.argument("data", type=PATH)
@click.option("--images", type=PATH, help="Folder of the photos, where it is not found beside the captions.")
@click.option("--limit", type=click.IntRange(min=2), help="Take so many photos, as 'train' does.  [default: all]")
@click.option(
    "--validation-share",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.2,
    help="Share of the photos to validate on, where the set has no split of its own.",
)
@click.option("--validation-limit", type=COUNT, help="Validate on so many photos at most, as 'train' does.")
@click.option("--data-seed", type=int, default=0, help="Decides which photos the limits and --validation-share take.")
@click.option(
    "--max-missing-share",
    type=click.FloatRange(0, 1),
    default=1.0,
    help="Refuse a set of which more than this share of the photos is missing.",
)
@click.option(
    "--vocabulary", type=COUNT, multiple=True, help="Try a vocabulary of so many words; may be given more than once."
)
@click.option("--no-photos", is_flag=True, help="Captions alone; the photos need not be there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def report(
    data: Path,
    images: Path | None,
    limit: int | None,
    validation_share: float,
    validation_limit: int | None,
    data_seed: int,
    max_missing_share: float,
    vocabulary: tuple[int, ...],
    no_photos: bool,
    as_json: bool,
) -> None:
    """Print what the data set DATA is like: counts, lengths, words, duplicates, missing and damaged photos.

    DATA is what 'train' takes. Each photo is read once, unless --no-photos is given.
    """
    from caption_train.data_report import SIZES, as_text
    from caption_train.data_report import report as examine
    from caption_train.datasets import load_dataset

    dataset = load_dataset(
        data,
        images=images,
        limit=limit,
        seed=data_seed,
        validation_share=validation_share,
        max_missing_share=max_missing_share,
        validation_limit=validation_limit,
        find_photos=not no_photos,
    )
    count = 0 if no_photos else len(dataset.train) + len(dataset.validation) + len(dataset.test)
    with progress_bar("photos", count) as advance:
        found = examine(
            dataset, sizes=vocabulary or SIZES, read_photos=not no_photos, on_photo=lambda: advance(1, "photos")
        )
    echo(json.dumps(found) if as_json else as_text(found))


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

"""`caption-export unpack ZIP BUNDLE`: the zip file of a bundle as a folder."""

from __future__ import annotations

from pathlib import Path

import click

from caption_rt.bundle import Bundle, copy_bundle
from caption_rt.console import echo
from caption_rt.errors import printable


@click.command()
@click.argument("archive", metavar="ZIP", type=click.Path(path_type=Path))
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is there.")
def unpack(archive: Path, bundle: Path, overwrite: bool) -> None:
    """Unpack the bundle in the file ZIP into the folder BUNDLE.

    Every file is verified first, and those that its manifest does not list stay behind.
    """
    made = copy_bundle(Bundle.open(archive), bundle, overwrite=overwrite)
    echo(f"{printable(made.path)}: {len(made.manifest.files) + 1} files")

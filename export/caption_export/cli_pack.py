"""`caption-export pack BUNDLE ZIP`: a bundle as one zip file."""

from __future__ import annotations

from pathlib import Path

import click

from caption_rt._amounts import byte_count
from caption_rt.bundle import Bundle
from caption_rt.console import echo
from caption_rt.errors import printable


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("archive", metavar="ZIP", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace a zip file that is there.")
def pack(bundle: Path, archive: Path, overwrite: bool) -> None:
    """Pack the BUNDLE into the file ZIP, which caption-rt opens like the folder.

    The same bundle always becomes the same bytes. Files that its manifest does not list stay behind.
    """
    from caption_export.packing import pack_bundle

    written = pack_bundle(Bundle.open(bundle), archive, overwrite=overwrite)
    echo(f"{printable(written)}: {byte_count(written.stat().st_size)}")

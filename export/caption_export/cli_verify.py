"""`caption-export verify BUNDLE`: a bundle examined without TensorFlow."""

from __future__ import annotations

from pathlib import Path

import click

from caption_export.cli_photos import chosen_photos, limit_photos_option
from caption_rt.bundle import Bundle
from caption_rt.console import echo
from caption_rt.errors import printable


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--photos",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of photos to caption in every precision, beside the bundle's own test images.",
)
@limit_photos_option
@click.pass_context
def verify(context: click.Context, bundle: Path, photos: Path | None, limit_photos: int) -> None:
    """Examine the BUNDLE, a folder or a zip file, as whoever receives it can: without TensorFlow.

    Hashes, every graph (valid, standard operators, nothing outside of the file, inputs and outputs of the manifest),
    what the bundle says of its own verification, and its self-test in every precision. It ends at the first thing that
    is wrong, with exit code 3, 5 or 8.
    """
    from caption_export.verifying import verify_bundle

    paths = chosen_photos(context, photos, limit_photos)
    for check in verify_bundle(Bundle.open(bundle), paths):
        echo(f"{'ok' if check.there else '- '}  {check.part:<18} {check.found}")
    echo(f"\n{printable(bundle)} is what it says")

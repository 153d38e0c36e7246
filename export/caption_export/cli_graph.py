"""`caption-export graph BUNDLE FILE`: a bundle to one ONNX file that captions photos by itself."""

from __future__ import annotations

from pathlib import Path

import click

from caption_export.cli_photos import chosen_photos, limit_photos_option
from caption_rt.bundle import PRECISIONS, Bundle
from caption_rt.console import echo
from caption_rt.errors import printable
from caption_rt.options import DecodeOptions


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="Of the bundle's graphs; fp32 if not given, or what the bundle has in its place.",
)
@click.option("--beam", type=click.IntRange(1, 1000), help="Beam size, 1 is greedy; the bundle's own if not given.")
@click.option("--length-penalty", type=click.FloatRange(0), help="Of the beam; the bundle's own if not given.")
@click.option(
    "--max-words", type=click.IntRange(1, 1000), help="Captions are cut after so many; the bundle's own if not given."
)
@click.option(
    "--photos",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of photos on which it is compared with caption-rt, beside the bundle's own test images.",
)
@limit_photos_option
@click.option("--overwrite", is_flag=True, help="Replace a file that is there.")
@click.pass_context
def graph(
    context: click.Context,
    /,
    bundle: Path,
    file: Path,
    precision: str | None,
    beam: int | None,
    length_penalty: float | None,
    max_words: int | None,
    photos: Path | None,
    limit_photos: int,
    overwrite: bool,
) -> None:
    """Make ONE ONNX FILE of a BUNDLE: photos in, words out, resizing and search inside.

    It needs neither TensorFlow nor caption-rt: ONNX Runtime alone runs it, from any language. Nothing is written where
    its words are not caption-rt's.
    """
    from caption_export.one_graph import (
        build_one_graph,
        check_free,
        self_test_photos,
        verify_one_graph,
        write_one_graph,
    )
    from caption_export.verifying import readable_photos
    from caption_rt.engine import check_precision

    check_free(file, overwrite=overwrite)
    paths = chosen_photos(context, photos, limit_photos)
    opened = Bundle.open(bundle)
    check_precision(opened, precision)
    there = opened.manifest.precisions
    precision = precision or next(name for name in PRECISIONS if name in there)
    own = opened.manifest.decoding
    options = DecodeOptions(
        beam_size=own.beam_size if beam is None else beam,
        length_penalty=own.length_penalty if length_penalty is None else length_penalty,
        max_words=own.max_words if max_words is None else max_words,
        guard=False,
    )
    if length_penalty is not None and options.beam_size == 1:
        raise click.UsageError("--length-penalty is about a beam: add --beam 3, say, or leave it out", context)
    compared = self_test_photos(opened) | readable_photos(paths, opened.manifest.image.size)
    data = build_one_graph(opened, options, precision)
    verify_one_graph(data, opened, options, precision, compared)
    write_one_graph(data, file, overwrite=overwrite)
    search = "greedy search" if options.beam_size == 1 else f"a beam of {options.beam_size}"
    echo(f"{printable(file)}: {precision}, {search}, at most {options.max_words} words; {len(data)} bytes")
    echo(f"the same words as caption-rt on {len(compared)} images")

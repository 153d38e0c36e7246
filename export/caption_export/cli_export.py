"""`caption-export RUN OUT`: a trained run to a verified bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from caption_rt.console import echo
from caption_rt.errors import printable
from caption_train.console import quiet_stderr
from caption_train.datasets import photos_in

if TYPE_CHECKING:
    from caption_export.parity import Report


@click.command()
@click.argument("run", type=click.Path(file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--photos",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder of real photos on which TensorFlow and ONNX Runtime are compared.",
)
@click.option("--limit-photos", type=click.IntRange(1), default=16, help="Take so many of them, by path.")
@click.option(
    "--checkpoint",
    type=click.Choice(["best", "last"]),
    default="best",
    help="The one with the lowest validation loss, or the last one.",
)
@click.option("--name", help="Short name of the model; the name of OUT if not given.")
@click.option("--license", "license_", default="not stated", help="Licence of the weights: SPDX, or a sentence.")
@click.option("--description", default="", help="What it is, in a sentence or two.")
@click.option("--beam", type=click.IntRange(1, 1000), default=1, help="The bundle's default beam size; 1 is greedy.")
@click.option("--length-penalty", type=click.FloatRange(0), default=0.0, help="The bundle's default.")
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is there.")
def export(
    run: Path,
    out: Path,
    photos: Path,
    limit_photos: int,
    checkpoint: str,
    name: str | None,
    license_: str,
    description: str,
    beam: int,
    length_penalty: float,
    overwrite: bool,
) -> None:
    """Convert the trained RUN to ONNX, compare it with TensorFlow, and write the bundle OUT.

    Nothing is written where ONNX Runtime does not give what TensorFlow gives: names, shapes and values of each graph,
    and the words of every photo, greedy and with a beam.
    """
    paths = photos_in(photos)[:limit_photos]
    with quiet_stderr():
        from caption_export.exporting import export_bundle
        from caption_train.runs import open_run
    report = export_bundle(
        open_run(run, checkpoint),
        paths,
        out,
        name=name or out.resolve().name,
        license=license_,
        description=description,
        beam_size=beam,
        length_penalty=length_penalty,
        overwrite=overwrite,
    )
    echo(_table(report))
    echo(f"\n{printable(out)}")


def _table(report: Report) -> str:
    """The verification, a line an output or search."""
    from caption_export.parity import search_name

    rows = [("graph", "output", "largest difference", "allowed", "on")]
    for tensor in report.tensors:
        allowed = f"{tensor.tolerance.absolute:g} + {tensor.tolerance.relative:g} of value"
        rows.append((tensor.graph, tensor.tensor, f"{tensor.max_difference:.2e}", allowed, tensor.photo))
    for search in report.searches:
        counts = f"{search.words} words of {search.captions} images are the same"
        rows.append(
            (search_name(search.options), "log_prob", f"{search.max_difference:.2e}", f"{search.tolerance:g}", counts)
        )
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]) for row in rows
    )

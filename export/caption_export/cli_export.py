"""`caption-export RUN OUT`: a trained run to a verified bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from caption_rt.console import echo
from caption_rt.errors import printable
from caption_rt.manifest import PRECISIONS
from caption_train.console import quiet_stderr
from caption_train.datasets import load_dataset, photos_in
from caption_train.files import read_json

if TYPE_CHECKING:
    from caption_export.parity import Report
    from caption_export.reduced import ReducedReport, Reduction

T = TypeVar("T")

_REDUCING = (
    *("dataset", "images", "calibration", "calibration_photos", "scored_photos"),
    *("max_cider_loss", "min_equal", "min_sqnr"),
)
"""Parameters that only fp16 and int8 have a use for."""


@click.command()
@click.argument("run", type=click.Path(file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--photos",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder of real photos on which TensorFlow and ONNX Runtime are compared.",
)
@click.option("--limit-photos", type=click.IntRange(1), default=50, help="Take so many of them, by path.")
@click.option(
    "--checkpoint",
    type=click.Choice(["best", "last"]),
    default="best",
    help="The one with the best CIDEr of validation photos, or the last one.",
)
@click.option("--name", help="Short name of the model; the name of OUT if not given.")
@click.option("--license", "license_", default="not stated", help="Licence of the weights: SPDX, or a sentence.")
@click.option("--description", default="", help="What it is, in a sentence or two.")
@click.option(
    "--teacher",
    type=click.Path(file_okay=False, path_type=Path),
    help="Run of a captioner on the grid that RUN's extractor was distilled from: its scores stand in the model card.",
)
@click.option(
    "--notes",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Markdown for the model card, with headings: what the model is bad at, say.",
)
@click.option("--beam", type=click.IntRange(1, 1000), default=1, help="The bundle's default beam size; 1 is greedy.")
@click.option("--length-penalty", type=click.FloatRange(0), default=0.0, help="The bundle's default.")
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(PRECISIONS),
    multiple=True,
    default=("fp32",),
    help="What the graphs compute in; may be repeated, and the bundle holds them all then. fp16, int8 need --dataset.",
)
@click.option(
    "--dataset",
    type=click.Path(path_type=Path),
    help="Data set as caption-train takes it, on whose validation photos fp16 and int8 are scored.",
)
@click.option("--images", type=click.Path(file_okay=False, path_type=Path), help="Folder of its photos.")
@click.option(
    "--calibration",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of real photos on which fp16 and int8 choose their ranges, without those that are compared or scored; "
    "by default the data set's training photos.",
)
@click.option("--calibration-photos", type=click.IntRange(1), default=64, help="Take so many, spread evenly.")
@click.option("--scored-photos", type=click.IntRange(2), default=1000, help="Score so many, spread evenly.")
@click.option(
    "--max-cider-loss",
    type=click.FloatRange(0),
    help="The most that CIDEr may fall below fp32's.  [default: 0.01]",
)
@click.option(
    "--min-equal-captions",
    "min_equal",
    type=click.FloatRange(0, 1),
    help="The least share of captions that are those of fp32.  [default: 0.9 of fp16, 0.5 of int8]",
)
@click.option(
    "--min-sqnr",
    type=float,
    help="The least signal to quantisation noise of any output, in dB.  [default: 40 of fp16, 20 of int8]",
)
@click.option(
    "--reduce-range",
    is_flag=True,
    help="Weights of int8 have 7 bits, which every processor multiplies exactly: x86 processors without VNNI do not do "
    "so with 8.",
)
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is there.")
@click.pass_context
def export(
    context: click.Context,
    /,
    run: Path,
    out: Path,
    photos: Path,
    limit_photos: int,
    checkpoint: str,
    name: str | None,
    license_: str,
    description: str,
    teacher: Path | None,
    notes: Path | None,
    beam: int,
    length_penalty: float,
    overwrite: bool,
    **reducing: Any,
) -> None:
    """Convert the trained RUN to ONNX, compare it with TensorFlow, and write the bundle OUT.

    Nothing is written where ONNX Runtime does not give what TensorFlow gives: names, shapes and values of each graph,
    and the words of every photo, greedy and with a beam; or where fp16 or int8 loses more than it may.
    """
    paths, said = photos_in(photos)[:limit_photos], _text(notes)
    reduced = tuple(name for name in PRECISIONS if name in reducing["precisions"] and name != "fp32")
    _check_needed(context, reduced)
    if reduced and reducing["dataset"] is None:
        raise click.UsageError(f"{reduced[0]} is scored on photos with captions: name them with --dataset")
    with quiet_stderr():
        from caption_export.exporting import export_bundle
        from caption_train.runs import SCORES, open_run
    reduction = _reduction(run, reduced, paths, **reducing) if reduced else None
    found = export_bundle(
        open_run(run, checkpoint),
        paths,
        out,
        name=name or out.resolve().name,
        license=license_,
        description=description,
        teacher_scores=read_json(teacher / SCORES) if teacher is not None else None,
        notes=said,
        beam_size=beam,
        length_penalty=length_penalty,
        overwrite=overwrite,
        fp32="fp32" in reducing["precisions"],
        reduction=reduction,
    )
    echo(_table(found.report))
    for report in found.reduced:
        for line in _summary(report):
            echo(line)
    echo(f"\n{printable(out)}")


def _text(path: Path | None) -> str:
    """What a file of text says; nothing if there is none.

    Raises:
        click.BadParameter: It cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8") if path is not None else ""
    except OSError as exc:
        raise click.BadParameter(f"{printable(path)} cannot be read: {exc.strerror or exc}") from exc
    except UnicodeDecodeError as exc:
        raise click.BadParameter(f"{printable(path)} is not UTF-8: {exc}") from exc


def _check_needed(context: click.Context, reduced: tuple[str, ...]) -> None:
    """See that no option was given that nothing would come of.

    Raises:
        click.UsageError: One was.
    """
    idle = {} if reduced else dict.fromkeys(_REDUCING, "fp16 and int8")
    if "int8" not in reduced:
        idle["reduce_range"] = "int8"
    for parameter in context.command.params:
        name = parameter.name or ""
        if name in idle and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"{parameter.opts[0]} is about {idle[name]}: add --precision int8, or leave it out", context
            )


def _reduction(
    run: Path,
    reduced: tuple[str, ...],
    compared: Sequence[Path],
    *,
    dataset: Path,
    images: Path | None,
    calibration: Path | None,
    calibration_photos: int,
    scored_photos: int,
    max_cider_loss: float | None,
    min_equal: float | None,
    min_sqnr: float | None,
    reduce_range: bool,
    **_: Any,
) -> Callable[[int], Reduction]:
    """What reduced precisions are made and measured with; the photos are read when their size is known."""
    from caption_export.exporting import read_photos
    from caption_export.reduced import LIMITS, Reduction, Scored
    from caption_train.runs import data_choices

    given = {"max_cider_loss": max_cider_loss, "min_equal": min_equal, "min_sqnr": min_sqnr}
    changes = {name: value for name, value in given.items() if value is not None}
    limits = {name: replace(LIMITS[name], **changes) for name in reduced}
    # What of the data set was trained on is as it was then: nothing of it may be scored.
    data = load_dataset(dataset, images=images, **data_choices(run))
    real = {image.path: image.captions for image in _spread(data.validation, scored_photos)}
    found = photos_in(calibration) if calibration is not None else tuple(image.path for image in data.train)
    taken = {path.resolve() for path in (*compared, *real)}
    others = [path for path in found if path.resolve() not in taken]
    if not others:
        raise click.UsageError(
            "every photo that ranges could be chosen on is compared or scored: name others with --calibration"
        )
    ranged = _spread(others, calibration_photos)

    def read(size: int) -> Reduction:
        scored = read_photos(list(real), size, name=str)
        captions = {printable(path): texts for path, texts in real.items()}
        references = {photo.name: captions[photo.name] for photo in scored}
        return Reduction(
            reduced,
            read_photos(ranged, size),
            Scored(scored, references),
            limits,
            weight_bits=7 if reduce_range else 8,
        )

    return read


def _spread(items: Sequence[T], count: int) -> list[T]:
    """So many of them, evenly spread; all, if there are no more."""
    kept = min(count, len(items))
    return [items[index * len(items) // kept] for index in range(kept)]


def _summary(report: ReducedReport) -> Iterator[str]:
    """A reduced precision on one line, and one more a search."""
    from caption_export.parity import search_name

    name, value = min(report.sqnr.items(), key=lambda item: item[1])
    yield f"{report.precision}: least signal to noise {value:.1f} dB ({name})"
    for search in report.searches:
        yield (
            f"{report.precision}, {search_name(search.options)}: {search.equal:.1%} of {search.captions} captions as "
            f"in fp32, CIDEr {search.scores['CIDEr']:.4f} ({search.fp32['CIDEr']:.4f}), "
            f"BLEU-4 {search.scores['BLEU-4']:.2f} ({search.fp32['BLEU-4']:.2f})"
        )


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

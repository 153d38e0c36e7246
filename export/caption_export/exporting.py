"""A run to a bundle: convert, compare, describe, and only then write."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from caption_export.card import CardFacts, model_card
from caption_export.errors import ExportError
from caption_export.graphs import ExportedGraph, build_graphs
from caption_export.parity import BEAM_SIZES, Photo, verify
from caption_export.pipelines import TensorFlowPipeline
from caption_export.reduced import ReducedReport, Reducer, Reduction
from caption_export.selftest import selftest_json, selftest_photos, selftest_pngs
from caption_export.stated import VERIFICATION_FILE
from caption_export.verification import Verification
from caption_rt import __version__
from caption_rt.bundle import (
    SELFTEST_FILE,
    VOCABULARY_FILE,
    DecodingSpec,
    GridSpec,
    ImageSpec,
    check_target,
    write_bundle,
)
from caption_rt.errors import CaptionError, ImageError, OptionsError, Parameter, printable
from caption_rt.image import read_photo
from caption_rt.options import DecodeOptions
from caption_train.runs import Run

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"

_FEW_PHOTOS = 50  # below that, the user is told that more would find more

_PACKAGES = ("tensorflow", "keras", "tf2onnx", "onnx", "onnxruntime-gpu", "onnxruntime", "numpy", "Pillow")


def export_bundle(
    run: Run,
    photos: Sequence[Path],
    out: Path,
    *,
    name: str,
    license: str,
    description: str = "",
    teacher_scores: Mapping[str, Any] | None = None,
    notes: str = "",
    beam_size: int = 1,
    length_penalty: float = 0.0,
    overwrite: bool = False,
    fp32: bool = True,
    reduction: Callable[[int], Reduction] | None = None,
) -> Verification:
    """Export a trained run, verify it, and write the bundle; nothing is written if anything differs.

    The same run, photos and versions give the same bytes.

    Args:
        run: From `caption_train.runs.open_run`.
        photos: Real photos to compare TensorFlow and ONNX Runtime on; those that cannot be read are passed over with
            a warning.
        out: Folder of the bundle.
        name: Short name of the model.
        license: Licence of the weights: an SPDX identifier or a sentence.
        description: A sentence or two; made from the training facts if empty.
        teacher_scores: Scores by split of a captioner on the grid of the network that the extractor was distilled from,
            to stand beside the run's own in the model card.
        notes: Markdown for the model card, such as what the model is bad at.
        beam_size: The bundle's default; 1 is greedy.
        length_penalty: The bundle's default; see `caption_rt.options.DecodeOptions`.
        overwrite: Replace a bundle that is there.
        fp32: Whether the graphs in float32, which are made and compared in any case, are in the bundle.
        reduction: What else is in it, given S of the extractor in pixels.

    Returns:
        What was compared, and how close it came.

    Raises:
        ExportError: The run cannot be converted, no photo can be read, ONNX Runtime differs from TensorFlow, or a
            reduced precision loses more than it may.
        OptionsError: A decoding default is out of its range, or there are `teacher_scores` and no teacher.
        BundleError: There is already something at `out`.
        CaptionError: The bundle cannot be written.
    """
    _check_place(out, overwrite)  # minutes before `write_bundle` would say so
    if teacher_scores and "distillation" not in run.facts.get("extractor", {}):
        raise OptionsError(
            Parameter("teacher_scores"), " belongs to a distilled extractor, and this run's is none: leave it out"
        )
    default = DecodeOptions(beam_size=beam_size, length_penalty=length_penalty, max_words=run.max_words)
    pngs, size = selftest_pngs(), run.extractor_config.size
    real = read_photos(photos, size)
    if len(real) < _FEW_PHOTOS:
        logger.warning("compared on %d real photos: more of them find more", len(real))
    compared = [*real, *selftest_photos(pngs, size)]
    graphs = build_graphs(run)
    logger.info("comparing with TensorFlow on %d images, the self-test's %d among them", len(compared), len(pngs))
    reference = TensorFlowPipeline(run)
    report = verify(reference, graphs, compared, searches_with(default), run.vocabulary)
    selftest = selftest_json(reference, pngs, size, run.max_words, run.vocabulary)
    precisions = {"fp32": graphs} if fp32 else {}
    reduced: tuple[ReducedReport, ...] = ()
    if reduction is not None:
        precisions, reduced = _reduced(run, graphs, compared, selftest, default, reduction(size), precisions)
    verification = Verification(report, reduced, len(pngs))
    rows, columns, channels = run.extractor.output_shape[1:]
    grid, scores, versions = GridSpec(rows, columns, channels), scores_of_checkpoint(run), made_with()
    card = CardFacts(
        name=name,
        license=license,
        size=size,
        grid=grid,
        precisions=tuple(precisions),
        model=run.model.config,
        parameters=sum(int(np.prod(w.shape)) for network in (run.extractor, run.model) for w in network.weights),
        decoding=default,
        training=run.facts,
        scores=scores,
        teacher_scores=teacher_scores or {},
        notes=notes,
        versions=versions,
        verification=verification,
    )
    write_bundle(
        out,
        name=name,
        description=description or _description(run),
        license=license,
        precisions={
            precision: {name: graph.spec for name, graph in made.items()} for precision, made in precisions.items()
        },
        image=ImageSpec(size),
        grid=grid,
        recurrence=run.model.config.recurrence,
        special_ids=run.vocabulary.special_ids,
        decoding=DecodingSpec(beam_size, length_penalty, run.max_words),
        training=run.facts,
        scores=scores,
        versions=versions,
        contents={
            **{graph.spec.file: graph.data for made in precisions.values() for graph in made.values()},
            VOCABULARY_FILE: _json(run.vocabulary.to_json()),
            SELFTEST_FILE: _json(selftest),
            VERIFICATION_FILE: _json(verification.to_json()),
            CARD_FILE: model_card(card).encode(),
        },
        overwrite=overwrite,
    )
    return verification


def _check_place(out: Path, overwrite: bool) -> None:
    """See that a bundle can come to its place.

    Raises:
        BundleError: There is something already that is not to be replaced, or is no bundle.
        CaptionError: It cannot be written.
    """
    check_target(out, overwrite=overwrite)
    above = next(folder for folder in out.absolute().parents if os.path.lexists(folder))
    if not above.is_dir():
        raise CaptionError(f"the bundle {printable(out)} cannot be written: {printable(above)} is not a folder")
    if not os.access(above, os.W_OK):
        raise CaptionError(f"the bundle {printable(out)} cannot be written: {printable(above)} is read-only")


def _reduced(
    run: Run,
    graphs: Mapping[str, ExportedGraph],
    compared: Sequence[Photo],
    selftest: dict[str, Any],
    search: DecodeOptions,
    reduction: Reduction,
    precisions: dict[str, dict[str, ExportedGraph]],
) -> tuple[dict[str, dict[str, ExportedGraph]], tuple[ReducedReport, ...]]:
    """The precisions with the reduced ones; what their self-test allows is put into the self-test's object."""
    own = len(selftest["inputs"])  # the last of the photos that are compared
    # A beam may hide what greedy search shows, and the other way round; the bundle is used with either.
    searches = list(dict.fromkeys([replace(search, beam_size=1, length_penalty=0.0), _as_searched(search)]))
    reducer = Reducer(
        graphs, compared[:-own], compared[-own:], selftest["expected"], searches, run.vocabulary, reduction
    )
    made = {precision: reducer.make(precision) for precision in reduction.precisions}
    for precision, (_, report) in made.items():
        selftest["tolerance"][f"{precision}_word_log_prob"] = report.selftest_tolerance
    of_reduced = {precision: graphs_of for precision, (graphs_of, _) in made.items()}
    return {**precisions, **of_reduced}, tuple(report for _, report in made.values())


def read_photos(paths: Sequence[Path], size: int, name: Callable[[Path], str] = lambda path: path.name) -> list[Photo]:
    """Read the photos to compare on, as the runtime reads them.

    Args:
        paths: Image files.
        size: S of the extractor, in pixels.
        name: What messages call a photo.

    Raises:
        ExportError: None of them can be read.
    """
    photos = []
    for path in paths:
        try:
            photos.append(Photo(printable(name(path)), read_photo(path, size)))
        except ImageError as exc:
            logger.warning("passed over: %s", exc)
    if not photos:
        raise ExportError("no real photo can be read: the export is verified on at least one")
    return photos


def searches_with(default: DecodeOptions) -> list[DecodeOptions]:
    """The searches to compare captions with: greedy, a beam, and the bundle's default where it is another."""
    searches = [replace(default, beam_size=size, length_penalty=0.0) for size in BEAM_SIZES]
    return list(dict.fromkeys([*searches, _as_searched(default)]))


def _as_searched(options: DecodeOptions) -> DecodeOptions:
    """Without a length penalty where there is one caption alone, which it is no matter of."""
    return replace(options, length_penalty=0.0) if options.beam_size == 1 else options


def scores_of_checkpoint(run: Run) -> dict[str, Any]:
    """The run's scores by split, without those that another checkpoint got, or the best one of an earlier step."""
    checkpoint = run.facts.get("checkpoint", {})
    wanted = {"checkpoint": checkpoint.get("which"), "step": checkpoint.get("step")}
    return {
        split: record
        for split, record in run.scores.items()
        if not isinstance(record, Mapping)
        or all(value is None or record.get(name, value) == value for name, value in wanted.items())
    }


def made_with() -> dict[str, str]:
    """Versions of everything that has a part in a bundle, by package."""
    versions = {"caption-rt": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        # Of the two builds of ONNX Runtime one is there; tensorflow-cpu and the like have another name.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _description(run: Run) -> str:
    dataset = run.facts.get("dataset", {}).get("name")
    return "Describes a photo in one English sentence" + (f"; trained on {dataset}." if dataset else ".")


def _json(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()

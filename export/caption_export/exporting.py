"""A run to a bundle: convert, compare, describe, and only then write."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from caption_export.card import CardFacts, model_card
from caption_export.errors import ExportError
from caption_export.graphs import build_graphs
from caption_export.parity import BEAM_SIZES, Photo, Report, verify
from caption_export.pipelines import TensorFlowPipeline
from caption_export.selftest import selftest_json, selftest_photos, selftest_pngs
from caption_rt import __version__
from caption_rt.bundle import (
    SELFTEST_FILE,
    VOCABULARY_FILE,
    DecodingSpec,
    GridSpec,
    ImageSpec,
    write_bundle,
)
from caption_rt.errors import BundleError, ImageError, printable
from caption_rt.image import read_photo
from caption_rt.options import DecodeOptions
from caption_train.runs import Run

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"

_PACKAGES = ("tensorflow", "keras", "tf2onnx", "onnx", "onnxruntime-gpu", "onnxruntime", "numpy", "Pillow")


def export_bundle(
    run: Run,
    photos: Sequence[Path],
    out: Path,
    *,
    name: str,
    license: str,
    description: str = "",
    beam_size: int = 1,
    length_penalty: float = 0.0,
    overwrite: bool = False,
) -> Report:
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
        beam_size: The bundle's default; 1 is greedy.
        length_penalty: The bundle's default; see `caption_rt.options.DecodeOptions`.
        overwrite: Replace a bundle that is there.

    Returns:
        What was compared, and how close it came.

    Raises:
        ExportError: The run cannot be converted, no photo can be read, or ONNX Runtime differs from TensorFlow.
        BundleError: There is already something at `out`.
        CaptionError: The bundle cannot be written.
    """
    if not overwrite and os.path.lexists(out):  # minutes before `write_bundle` would say so
        raise BundleError(f"{printable(out)} exists already: ask for it to be overwritten, or name another folder")
    default = DecodeOptions(beam_size=beam_size, length_penalty=length_penalty, max_words=run.max_words)
    pngs, size = selftest_pngs(), run.extractor_config.size
    compared = [*read_photos(photos, size), *selftest_photos(pngs, size)]
    graphs = build_graphs(run)
    logger.info("comparing with TensorFlow on %d images, the self-test's %d among them", len(compared), len(pngs))
    reference = TensorFlowPipeline(run)
    report = verify(reference, graphs, compared, searches_with(default), run.vocabulary)
    rows, columns, channels = run.extractor.output_shape[1:]
    grid, scores, versions = GridSpec(rows, columns, channels), scores_of_checkpoint(run), made_with()
    card = CardFacts(
        name=name,
        license=license,
        size=size,
        grid=grid,
        model=run.model.config,
        parameters=sum(int(np.prod(w.shape)) for network in (run.extractor, run.model) for w in network.weights),
        decoding=default,
        training=run.facts,
        scores=scores,
        versions=versions,
        report=report,
    )
    write_bundle(
        out,
        name=name,
        description=description or _description(run),
        license=license,
        precisions={"fp32": {graph.name: graph.spec for graph in graphs.values()}},
        image=ImageSpec(size),
        grid=grid,
        recurrence=run.model.config.recurrence,
        special_ids=run.vocabulary.special_ids,
        decoding=DecodingSpec(beam_size, length_penalty, run.max_words),
        training=run.facts,
        scores=scores,
        versions=versions,
        contents={
            **{graph.spec.file: graph.data for graph in graphs.values()},
            VOCABULARY_FILE: _json(run.vocabulary.to_json()),
            SELFTEST_FILE: _json(selftest_json(reference, pngs, size, run.max_words, run.vocabulary)),
            CARD_FILE: model_card(card).encode(),
        },
        overwrite=overwrite,
    )
    return report


def read_photos(paths: Sequence[Path], size: int) -> list[Photo]:
    """Read the photos to compare on, as the runtime reads them.

    Args:
        paths: Image files.
        size: S of the extractor, in pixels.

    Raises:
        ExportError: None of them can be read.
    """
    photos = []
    for path in paths:
        try:
            photos.append(Photo(printable(path.name), read_photo(path, size)))
        except ImageError as exc:
            logger.warning("passed over: %s", exc)
    if not photos:
        raise ExportError("no real photo can be read: the export is verified on at least one")
    return photos


def searches_with(default: DecodeOptions) -> list[DecodeOptions]:
    """The searches to compare captions with: greedy, a beam, and the bundle's default where it is another."""
    searches = [replace(default, beam_size=size, length_penalty=0.0) for size in BEAM_SIZES]
    return searches if default in searches else [*searches, default]


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

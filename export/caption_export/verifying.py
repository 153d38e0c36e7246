"""A bundle examined by whoever has it: everything of its verification that needs neither TensorFlow nor the run.

What TensorFlow gave for the self-test's images is in the bundle, and so is what its export found; both are held against
the graphs that are really there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from caption_export.errors import ExportError
from caption_export.stated import VERIFICATION_FILE, stated_verification
from caption_export.structure import GraphReport, check_model
from caption_rt._amounts import byte_count
from caption_rt._fields import Fields
from caption_rt.bundle import Bundle
from caption_rt.caption import Caption
from caption_rt.captioner import Captioner
from caption_rt.errors import BundleError, ImageError, printable
from caption_rt.image import read_photo

logger = logging.getLogger(__name__)

BATCH_SIZES = (1, 2, 7)
"""Photos that are captioned together; the words must not depend on it."""
LOG_PROB_TOLERANCE = 1e-3
"""What a caption's log-probability may differ by from one batch size to another; absolute, in nats."""


class Check(NamedTuple):
    """Something that was examined and is as it should be, or is not there."""

    part: str
    """What: "files", "fp32 encoder", "verification.json", "int8 self-test"."""
    found: str
    """How it is, in a sentence for a person."""
    there: bool = True
    """Whether there was something to examine."""


def verify_bundle(bundle: Bundle, photos: Sequence[Path] = ()) -> Iterator[Check]:
    """Examine an open bundle on the CPU.

    Args:
        bundle: Opened, so its files are those of its manifest and stand alone.
        photos: Real photos to caption in every precision; those that cannot be read are passed over with a warning.

    Yields:
        Each check that is passed, when it is.

    Raises:
        ExportError: A graph is not valid, ``verification.json`` is about other graphs, no photo can be read, or words
            depend on how many photos are captioned together.
        BundleError: A file has changed since the bundle was opened, or the self-test cannot be read.
        EngineError: ONNX Runtime cannot run a graph, or the self-test is not passed.
    """
    manifest = bundle.manifest
    size = byte_count(sum(spec.size for spec in manifest.files.values()))
    yield Check("files", f"{len(manifest.files)} of {size}, each of the size and SHA-256 that the manifest states")
    reports: dict[str, dict[str, GraphReport]] = {}
    for precision, graphs in manifest.precisions.items():
        reports[precision] = {}
        for name, spec in graphs.items():
            report = reports[precision][name] = check_model(name, bundle.read(spec.file), spec)
            what = (
                f"valid ONNX of opset {report.opset}, {report.nodes} nodes, all standard operators, no data elsewhere"
            )
            yield Check(f"{precision} {name}", what)
    yield _stated(bundle, reports)
    read = readable_photos(photos, manifest.image.size)
    first: list[Caption] = []
    for precision in manifest.precisions:
        with Captioner(bundle, "cpu", precision=precision) as captioner:
            result = captioner.self_test()
            yield Check(
                f"{precision} self-test",
                f"{result.photos} images, log-probabilities within {result.max_difference:.2g} of TensorFlow's "
                f"({result.tolerance:g} allowed)",
            )
            if read:
                captions = _captions(captioner, read, every_size=not first)
                yield Check(f"{precision} photos", _compared(captions, first, next(iter(manifest.precisions))))
                first = first or captions


def _stated(bundle: Bundle, reports: Mapping[str, Mapping[str, GraphReport]]) -> Check:
    """What the bundle says of its own verification, held against its graphs.

    Raises:
        ExportError: It is about other graphs.
    """
    try:
        record = stated_verification(bundle)
        if record is None:
            return Check(VERIFICATION_FILE, "not there: the bundle does not say what its export found", there=False)
        stated = {graph: facts for precision in reports for graph, facts in _graphs(record, precision)}
        images = record.integer("photos")
        if "selftest_images" in record.names():  # before, they were among the photos
            images += record.integer("selftest_images")
    except BundleError as exc:
        raise ExportError(
            f"{VERIFICATION_FILE} does not say what an export found ({exc}): export the model again"
        ) from exc
    for precision, graphs in reports.items():
        for name, report in graphs.items():
            if stated.get((precision, name)) != (report.size, report.opset, report.operators):
                raise ExportError(
                    f"{VERIFICATION_FILE} is about another {name} graph in {precision} than the one in the bundle: "
                    "export the model again"
                )
    compared = "which" if "fp32" in reports else "made of those in float32, not in this bundle, which"
    found = f"about these graphs, {compared} its export compared with TensorFlow on {images} images"
    return Check(VERIFICATION_FILE, found)


def _graphs(record: Fields, precision: str) -> Iterator[tuple[tuple[str, str], tuple[int, int, Mapping[str, int]]]]:
    """By precision and name, what of a graph can be held against its file."""
    graphs = record.inner(precision).inner("graphs")
    for name in graphs.names():
        graph = graphs.inner(name)
        yield (precision, name), (graph.integer("bytes"), graph.integer("opset"), graph.mapping("operators"))


def readable_photos(paths: Sequence[Path], size: int) -> dict[str, NDArray[np.uint8]]:
    """Photos by their paths, uint8 [S, S, 3]; those that cannot be read are passed over with a warning.

    Raises:
        ExportError: There are some, and none can be read.
    """
    photos = {}
    for path in paths:
        try:
            photos[printable(path)] = read_photo(path, size)
        except ImageError as exc:
            logger.warning("passed over: %s", exc)
    if paths and not photos:
        raise ExportError("no photo can be read: name a folder of real photos")
    return photos


def _captions(captioner: Captioner, photos: Mapping[str, NDArray[np.uint8]], *, every_size: bool) -> list[Caption]:
    """The photos' captions, which must be the same at every batch size.

    In fewer bits a rounding that depends on the batch size may become a whole step, so there it is not asked for.

    Raises:
        ExportError: They are not, or a log-probability is no number.
    """
    captions: list[Caption] = []
    for size in BATCH_SIZES[: None if every_size and captioner.precision == "fp32" else 1]:
        pixels = list(photos.values())
        found = [
            caption
            for start in range(0, len(pixels), size)
            for caption in captioner.caption_pixels(pixels[start : start + size], captioner.default_options)
        ]
        captions = captions or found
        for name, one, other in zip(photos, captions, found, strict=True):
            # Written so that a number that is none fails as well.
            if one.tokens != other.tokens or not abs(one.log_prob - other.log_prob) <= LOG_PROB_TOLERANCE:
                raise ExportError(
                    f"{name} gets {other.text!r} ({other.log_prob:.4f}) with {size} photos at once, and {one.text!r} "
                    f"({one.log_prob:.4f}) alone: the graphs mix up the photos of a batch"
                )
    return captions


def _compared(captions: Sequence[Caption], first: Sequence[Caption], precision: str) -> str:
    if not first:
        sizes = ", ".join(map(str, BATCH_SIZES))
        alike = f", the same words {sizes} at a time" if precision == "fp32" else ""
        return f"{len(captions)} captioned{alike}"
    equal = sum(one.tokens == other.tokens for one, other in zip(captions, first, strict=True))
    return f"{len(captions)} captioned, {equal} with the same words as in {precision}"

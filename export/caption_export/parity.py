"""Does ONNX Runtime do what TensorFlow does? Stage by stage, then from the pixels to the words; a difference raises.

Each stage is given TensorFlow's own inputs, so that a difference is found in the graph that makes it. The decoder is
compared on the states it really meets: those of TensorFlow's greedy captions of the photos, word after word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from caption_export.errors import ExportError
from caption_export.graphs import ExportedGraph
from caption_export.pipelines import (
    Arrays,
    OnnxPipeline,
    Pipeline,
    PipelineStepper,
    best_captions,
    search,
)
from caption_export.structure import GraphReport, check_structure
from caption_rt.bundle import GRAPH_TENSORS, TensorSpec
from caption_rt.options import DecodeOptions
from caption_rt.strategies import Hypothesis
from caption_rt.vocabulary import Vocabulary

BATCH_SIZES = (1, 2, 7)
"""Sizes of the first axis that every graph is run with; with the last one, all photos go through."""
BEAM_SIZES = (1, 3)
"""The searches that captions are compared with: greedy, and a beam."""


@dataclass(frozen=True)
class Tolerance:
    """How far ONNX Runtime may be from TensorFlow's value v, element by element: ``absolute + relative * |v|``."""

    absolute: float
    """In the tensor's own unit."""
    relative: float
    """Share of the value."""


TOLERANCES: Mapping[str, Tolerance] = {
    "grid": Tolerance(5e-4, 5e-4),
    "features": Tolerance(1e-4, 1e-4),
    "keys": Tolerance(1e-4, 1e-4),
    "initial_state": Tolerance(1e-5, 1e-5),
    "log_probs": Tolerance(1e-4, 1e-4),
    "next_state": Tolerance(2e-5, 2e-5),
    "attention": Tolerance(1e-5, 1e-5),
}
"""The bounds of each output, each graph given the same inputs on both sides.

Single precision with sums in another order: of full width, the grid differs by 2e-5 and the state by 1e-6.
"""

LOG_PROB_TOLERANCE = 1e-3
"""Bound of a whole caption's log-probability, from the pixels on; absolute, in nats."""


@dataclass(frozen=True)
class Photo:
    """A photo to compare on."""

    name: str
    """What messages call it."""
    pixels: NDArray[np.uint8]
    """uint8 [S, S, 3], as `caption_rt.image.read_photo` gives it."""


@dataclass(frozen=True)
class TensorReport:
    """An output that stayed within its tolerance."""

    graph: str
    tensor: str
    max_difference: float
    """Largest absolute difference of all elements."""
    photo: str
    """The photo it was found on."""
    tolerance: Tolerance


@dataclass(frozen=True)
class SearchReport:
    """Captions from the pixels on, with the same words on both sides."""

    options: DecodeOptions
    """How was searched."""
    captions: int
    """How many captions: one a photo."""
    words: int
    """How many words they have together."""
    max_difference: float
    """Largest absolute difference of a caption's log-probability, in nats."""
    tolerance: float
    """What it may be."""


@dataclass(frozen=True)
class Report:
    """What was compared, and how close it came."""

    photos: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    graphs: tuple[GraphReport, ...]
    tensors: tuple[TensorReport, ...]
    searches: tuple[SearchReport, ...]


def verify(
    reference: Pipeline,
    graphs: Mapping[str, ExportedGraph],
    photos: Sequence[Photo],
    searches: Sequence[DecodeOptions],
    vocabulary: Vocabulary,
) -> Report:
    """Compare the exported graphs with the networks they came from.

    Args:
        reference: The networks in TensorFlow.
        graphs: What `caption_export.graphs.build_graphs` made of them.
        photos: At least one.
        searches: How to caption them in the end; the decoder is compared along the greedy captions of at most as many
            words as the first one allows.
        vocabulary: For the special ids, and to show words that differ.

    Returns:
        What was compared.

    Raises:
        ExportError: On the first difference, saying which graph, tensor and photo, and how far.
    """
    if not photos:
        raise ExportError("there is no photo to compare TensorFlow and ONNX Runtime on")
    checked = tuple(check_structure(graph) for graph in graphs.values())
    exported = OnnxPipeline(graphs)
    tensors = [
        report
        for stage in stages(reference, graphs, photos, vocabulary, searches[0].max_words)
        for report in _compare_stage(stage, reference, exported)
    ]
    captions = [_compare_captions(reference, exported, photos, options, vocabulary) for options in searches]
    return Report(tuple(photo.name for photo in photos), BATCH_SIZES, checked, tuple(tensors), tuple(captions))


@dataclass(frozen=True)
class Stage:
    """One graph with everything to run it on."""

    graph: ExportedGraph
    labels: list[str]
    """What messages call each row of the inputs."""
    take: Callable[[NDArray[np.int64]], Arrays]
    """Inputs of some rows. A row of the decoder has its photo's features, so all at once would take gigabytes."""


def stages(
    reference: Pipeline,
    graphs: Mapping[str, ExportedGraph],
    photos: Sequence[Photo],
    vocabulary: Vocabulary,
    max_words: int,
) -> Iterator[Stage]:
    """The three graphs with the inputs that a pipeline itself has for them.

    Args:
        reference: Where the inputs come from.
        graphs: The three graphs by name.
        photos: At least one.
        vocabulary: For the special ids.
        max_words: The decoder's inputs are those along greedy captions of at most so many words.
    """
    names = [photo.name for photo in photos]
    images = np.stack([photo.pixels for photo in photos])
    extractor = Stage(graphs["extractor"], names, lambda rows: {"images": images[rows]})
    yield extractor
    grid = run_rows(reference, extractor, np.arange(len(names)), BATCH_SIZES[-1])["grid"]
    yield Stage(graphs["encoder"], names, lambda rows: {"grid": grid[rows]})
    stepper = PipelineStepper(reference, grid)
    search(stepper, DecodeOptions(max_words=max_words), vocabulary)
    tokens, states, photo_of = (np.concatenate(arrays) for arrays in zip(*stepper.steps, strict=True))
    labels = [
        f"{names[photo]}, word {word}"
        for word, (_, _, photos_of_step) in enumerate(stepper.steps, start=1)
        for photo in photos_of_step
    ]
    yield Stage(
        graphs["decoder"],
        labels,
        lambda rows: {
            "token": tokens[rows],
            "state": states[rows],
            "features": stepper.encoded["features"][photo_of[rows]],
            "keys": stepper.encoded["keys"][photo_of[rows]],
        },
    )


def _compare_stage(stage: Stage, reference: Pipeline, exported: Pipeline) -> list[TensorReport]:
    """Every output of a graph, on all rows and at all batch sizes."""
    everything = np.arange(len(stage.labels))
    wanted = run_rows(reference, stage, everything, BATCH_SIZES[-1])
    reports: dict[str, TensorReport] = {}
    for size in BATCH_SIZES:
        # The small batches once, the largest until every row was in one; what lacks is filled up from the beginning.
        count = -(-len(everything) // size) * size if size == BATCH_SIZES[-1] else size
        rows = np.resize(everything, count)
        found = run_rows(exported, stage, rows, size)
        labels = [stage.labels[row] for row in rows]
        for spec in stage.graph.spec.outputs:
            report = _compare(stage.graph.name, spec, found[spec.name], wanted[spec.name][rows], labels)
            reports[spec.name] = max(reports.get(spec.name, report), report, key=lambda x: x.max_difference)
    return list(reports.values())


def run_rows(pipeline: Pipeline, stage: Stage, rows: NDArray[np.int64], size: int) -> Arrays:
    """One stage on some rows, `size` at a time (the last time perhaps fewer).

    Args:
        pipeline: What runs it.
        stage: The graph and its inputs.
        rows: Which of them, int64 [rows].
        size: How many together.

    Returns:
        The graph's outputs by name, [rows, ...].
    """
    name = stage.graph.name
    parts = [pipeline.run(name, stage.take(rows[start : start + size])) for start in range(0, len(rows), size)]
    return {output: np.concatenate([part[output] for part in parts]) for output in GRAPH_TENSORS[name][1]}


def _compare(
    graph: str, spec: TensorSpec, found: NDArray[Any], wanted: NDArray[Any], labels: Sequence[str]
) -> TensorReport:
    """One output, row by row.

    Args:
        graph: Its graph.
        spec: Which output.
        found: ONNX Runtime's values [rows, ...].
        wanted: TensorFlow's.
        labels: What to call each row.

    Raises:
        ExportError: Another dtype or shape, a value that is not finite, or a difference beyond the tolerance.
    """
    where = f"the {graph} graph: output {spec.name}"
    shape = (len(labels), *spec.shape[1:])
    if found.dtype != spec.dtype or found.shape != shape:
        raise ExportError(f"{where} is {found.dtype} {list(found.shape)}, not {spec.dtype} {list(shape)}")
    if wanted.shape != shape:
        raise ExportError(f"{where} is {list(wanted.shape)} in TensorFlow, not {list(shape)}")
    tolerance = TOLERANCES[spec.name]
    flat = (len(labels), -1)
    for side, values in (("TensorFlow", wanted), ("ONNX Runtime", found)):
        finite = np.isfinite(values).reshape(flat).all(axis=1)
        if not finite.all():
            raise ExportError(f"{where} is not finite in {side} on {labels[int(np.argmin(finite))]}")
    difference = np.abs(found.astype(np.float64) - wanted)
    excess = (difference - tolerance.absolute - tolerance.relative * np.abs(wanted)).reshape(flat).max(axis=1)
    differences = difference.reshape(flat).max(axis=1)
    row = int(np.argmax(excess))
    if excess[row] > 0:
        raise ExportError(
            f"{where} differs from TensorFlow by up to {differences[row]:.3g} on {labels[row]}; allowed are "
            f"{tolerance.absolute:g} + {tolerance.relative:g} of the value"
        )
    row = int(np.argmax(differences))
    return TensorReport(graph, spec.name, float(differences[row]), labels[row], tolerance)


def _compare_captions(
    reference: Pipeline, exported: Pipeline, photos: Sequence[Photo], options: DecodeOptions, vocabulary: Vocabulary
) -> SearchReport:
    """Captions from the pixels on.

    Raises:
        ExportError: Other words, or a log-probability beyond the tolerance.
    """
    images = np.stack([photo.pixels for photo in photos])
    how = search_name(options)
    pairs = list(
        zip(
            photos,
            best_captions(reference, images, options, vocabulary),
            best_captions(exported, images, options, vocabulary),
            strict=True,
        )
    )
    for photo, wanted, found in pairs:
        if found.tokens != wanted.tokens or found.ended != wanted.ended:
            raise ExportError(
                f"{photo.name} gets other words with {how}: {_shown(wanted, vocabulary)} from TensorFlow, "
                f"{_shown(found, vocabulary)} from ONNX Runtime"
            )
        if not abs(found.log_prob - wanted.log_prob) <= LOG_PROB_TOLERANCE:
            raise ExportError(
                f"{photo.name}: the caption's log-probability with {how} is {wanted.log_prob:.6f} in TensorFlow and "
                f"{found.log_prob:.6f} in ONNX Runtime; allowed is a difference of {LOG_PROB_TOLERANCE:g}"
            )
    return SearchReport(
        options,
        len(pairs),
        sum(len(wanted.tokens) for _, wanted, _ in pairs),
        max(abs(found.log_prob - wanted.log_prob) for _, wanted, found in pairs),
        LOG_PROB_TOLERANCE,
    )


def search_name(options: DecodeOptions) -> str:
    """What a person calls a search."""
    if options.beam_size == 1:
        return "greedy search"
    penalty = f" and length penalty {options.length_penalty:g}" if options.length_penalty else ""
    return f"a beam of {options.beam_size}{penalty}"


def _shown(hypothesis: Hypothesis, vocabulary: Vocabulary) -> str:
    return f"{vocabulary.decode(hypothesis.tokens)!r} ({hypothesis.log_prob:.4f}, {hypothesis.ended})"

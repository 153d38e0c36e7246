"""What values the tensors of a graph take on real photos, and the ranges that 8 bits are best spent on.

Three ways of choosing a range are known: all that was seen, all but a percentile, and the one that loses the least
information (Migacz 2017, "8-bit Inference with TensorRT"). Which is best depends on the network, so an export tries
them all and measures.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnxruntime.quantization.calibrate import HistogramCollector

from caption_export.graphs import ExportedGraph
from caption_rt.bundle import GraphSpec, TensorSpec
from caption_rt.engine import Graph

BINS = 2048
"""Of each tensor's histogram, which reaches from minus to plus its largest absolute value."""
METHODS = ("min-max", "percentile 99.999", "percentile 99.99", "percentile 99.9", "entropy")
"""Ways to choose a range, by the names that reports give them."""

FAR = 4.0
"""What goes so many times beyond the median photo is not what a tensor's range is for.

Some extractors answer one photo in a hundred with values hundreds of times as large as all others. One of them among
the photos that ranges are chosen on would leave the others a few of the 256 steps, and it is more than any percentile
of values: it has its share in all tensors behind.
"""

# With the collector's own 128 bins for 128 steps, no range but the whole one would be tried.
_ENTROPY_BINS, _ENTROPY_STEPS = 512, 128

Range = tuple[float, float]


@dataclass(frozen=True)
class Seen:
    """The values of one tensor."""

    lowest: float
    highest: float
    counts: NDArray[np.int64]
    """int64 [`BINS`], from minus to plus the largest absolute value."""
    extreme: float
    """The largest absolute value on any photo, those that are left out among them."""

    @property
    def largest(self) -> float:
        """The largest absolute value."""
        return max(-self.lowest, self.highest)


def observe(graph: ExportedGraph, batches: Iterable[Sequence[NDArray[Any]]]) -> dict[str, Seen]:
    """Run a graph on real inputs and count the values of every float tensor in it.

    Args:
        graph: The graph in float32.
        batches: Arrays in the order of the graph's inputs, each time; gone through once. What is far beyond the others
            (see `FAR`) is left out by batches.

    Returns:
        What was seen, by the tensors' names, the inputs among them.

    Raises:
        EngineError: ONNX Runtime fails.
    """
    data, spec = _with_outputs(graph)
    opened = Graph(data, spec)
    seen: dict[str, list[Seen]] = {}
    tensors = (*spec.inputs, *spec.outputs)
    for batch in batches:
        for tensor, values in zip(tensors, (*batch, *opened.run(*batch)), strict=True):
            if tensor.dtype == "float32":
                seen.setdefault(tensor.name, []).append(_count(values))
    return {name: _typical(of_batches) for name, of_batches in seen.items()}


def choose_range(seen: Seen, method: str) -> Range:
    """The range of a tensor that its 8 bits are for; what lies beyond is cut off.

    Args:
        seen: What values it takes.
        method: One of `METHODS`.
    """
    if method == "min-max":
        return seen.lowest, seen.highest
    edges = np.linspace(-seen.largest, seen.largest, BINS + 1)
    if method == "entropy":
        counts = seen.counts.reshape(_ENTROPY_BINS, -1).sum(axis=1)
        collector = HistogramCollector("entropy", False, _ENTROPY_BINS, _ENTROPY_STEPS, None, None)
        whole = np.float32(seen.lowest), np.float32(seen.highest)
        low, high = collector.get_entropy_threshold(
            (counts, edges[:: BINS // _ENTROPY_BINS].astype(np.float32), *whole), _ENTROPY_STEPS
        )
        return float(low), float(high)
    beyond = (1 - float(method.split()[1]) / 100) * seen.counts.sum()
    below, above = np.cumsum(seen.counts), np.cumsum(seen.counts[::-1])[::-1]
    low, high = edges[:-1][below > beyond][0], edges[1:][above > beyond][-1]
    return max(float(low), seen.lowest), min(float(high), seen.highest)


def _typical(of_batches: Sequence[Seen]) -> Seen:
    """All batches together but those that are far beyond the others."""
    beyond = FAR * float(np.median([seen.largest for seen in of_batches]))
    together = functools.reduce(_together, (seen for seen in of_batches if seen.largest <= beyond))
    return replace(together, extreme=max(seen.largest for seen in of_batches))


def _count(values: NDArray[np.float32]) -> Seen:
    lowest, highest = float(values.min()), float(values.max())
    reach = max(-lowest, highest)
    # np.histogram takes seconds for what this does in milliseconds.
    scale = BINS / (2 * reach) if reach else 0.0
    bins = np.minimum(((values.ravel() + reach) * scale).astype(np.int32), BINS - 1)
    return Seen(lowest, highest, np.bincount(bins, minlength=BINS), reach)


def _together(first: Seen, second: Seen) -> Seen:
    """Both as one; the histogram that reaches less far is put into the bins of the other."""
    wide, narrow = (first, second) if first.largest >= second.largest else (second, first)
    centres = (np.arange(BINS) + 0.5) * (2 * narrow.largest / BINS) - narrow.largest
    scale = BINS / (2 * wide.largest) if wide.largest else 0.0
    bins = np.minimum(((centres + wide.largest) * scale).astype(np.int64), BINS - 1)
    counts = wide.counts + np.bincount(bins, weights=narrow.counts, minlength=BINS).astype(np.int64)
    extreme = max(first.extreme, second.extreme)
    return Seen(min(first.lowest, second.lowest), max(first.highest, second.highest), counts, extreme)


def _with_outputs(graph: ExportedGraph) -> tuple[bytes, GraphSpec]:
    """The graph with every float tensor as an output that a node computes.

    But for what a ReLU alone takes: in 8 bits the range cuts it off where the ReLU would.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(graph.data))
    taken: dict[str, list[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            taken.setdefault(name, []).append(node.op_type)
    tensors = {info.name: info.type.tensor_type for info in (*model.graph.value_info, *model.graph.output)}
    specs = []
    for name in (name for node in model.graph.node for name in node.output if taken.get(name) != ["Relu"]):
        if tensors[name].elem_type != TensorProto.FLOAT:
            continue
        axes = tuple(axis.dim_value or f"{name}_{place}" for place, axis in enumerate(tensors[name].shape.dim))
        specs.append(TensorSpec(name, "float32", axes))
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(x.name, TensorProto.FLOAT, list(x.shape)) for x in specs)
    return bytes(model.SerializeToString()), replace(graph.spec, outputs=tuple(specs))

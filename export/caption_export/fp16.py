"""Half precision for GPUs: weights and sums of 16 bits, float32 at the edges and wherever the range needs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx
from onnx import ModelProto
from onnxruntime.transformers.float16 import convert_float_to_float16

from caption_export.calibration import Seen
from caption_export.canonical import canonical_model
from caption_export.graphs import ExportedGraph

LARGEST = 65504 / 4
"""A node that gives or takes more than this on calibration photos stays in float32: other photos give more still."""

# Logarithms of probabilities are sums over thousands of exponentials, and differences of them decide.
_IN_FLOAT32 = ("LogSoftmax", "Softmax")


def halve(graph: ExportedGraph, seen: Mapping[str, Seen]) -> tuple[ExportedGraph, list[str]]:
    """A graph in 16 bits.

    Args:
        graph: The graph in float32.
        seen: From `caption_export.calibration.observe`.

    Returns:
        The same graph with a file name of its own, and the names of the nodes that stay in float32. The same arguments
        give the same bytes.
    """
    model = onnx.load_model_from_string(graph.data)
    kept = in_float32(model, seen)
    # It changes the list of operators that it is given.
    halved = convert_float_to_float16(model, keep_io_types=True, node_block_list=kept, op_block_list=[])
    spec = replace(graph.spec, file=f"{graph.name}-fp16.onnx")
    return ExportedGraph(graph.name, canonical_model(halved, graph.name, spec), spec), kept


def in_float32(model: ModelProto, seen: Mapping[str, Seen]) -> list[str]:
    """The nodes of a graph that 16 bits are too few for.

    Args:
        model: The graph in float32.
        seen: From `caption_export.calibration.observe`.
    """
    beyond = {name for name, values in seen.items() if values.extreme > LARGEST}
    kept = []
    for node in model.graph.node:
        if node.op_type in _IN_FLOAT32 or not beyond.isdisjoint((*node.input, *node.output)):
            kept.append(node.name)
    return [*kept, *_before_first_product(model)]


def _before_first_product(model: ModelProto) -> list[str]:
    """What scales a photo's pixels, before the first convolution."""
    names: list[str] = []
    for node in model.graph.node:
        if node.op_type in ("Conv", "MatMul"):
            return names if any(x.op_type == "Conv" for x in model.graph.node) else []
        names.append(node.name)
    return []

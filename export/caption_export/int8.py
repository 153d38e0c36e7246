"""Whole numbers of 8 bits in place of float32, with ranges that are fixed beforehand.

Activations are unsigned and weights signed, by output channel: processors multiply these fastest, and an activation
behind a ReLU has no sign to keep. But x86 processors without VNNI add two products of an unsigned and a signed number
in 16 bits, where 2 * 255 * 127 does not fit and 2 * 255 * 64 does: for these, weights can have 7 bits. docs/export.md
has what either does to captions.

All of the extractor is in 8 bits but its ends; of encoder and decoder, the products with weights and the embedding.

No range is found while the graph runs (ONNX's DynamicQuantizeLinear): such a range is one for the whole batch, so that
a photo's caption would depend on the photos beside it. docs/export.md has what that cost.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np
import onnx
from onnx import ModelProto, helper, numpy_helper
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import QuantizationMode

from caption_export.calibration import Range, Seen, choose_range
from caption_export.canonical import canonical_model
from caption_export.graphs import ExportedGraph

_EVERYWHERE = ("Add", "AveragePool", "Concat", "Conv", "MaxPool", "Relu", "Reshape", "Transpose")
_PRODUCTS = ("Gather", "MatMul")


def quantise(
    graph: ExportedGraph, seen: Mapping[str, Seen], method: str, in_float: Collection[str] = (), weight_bits: int = 8
) -> ExportedGraph:
    """A graph in 8 bits.

    Args:
        graph: The graph in float32.
        seen: From `caption_export.calibration.observe`.
        method: One of `caption_export.calibration.METHODS`.
        in_float: Names of nodes that stay as they are.
        weight_bits: 8, or 7, which are -64 to 64.

    Returns:
        The same graph with a file name of its own. The same arguments give the same bytes.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(graph.data))
    ranges = {name: choose_range(values, method) for name, values in seen.items()}
    change = _everywhere if graph.name == "extractor" else _products
    changed = change(model, ranges, in_float, reduce_range=weight_bits == 7)
    spec = replace(graph.spec, file=f"{graph.name}-int8.onnx")
    return ExportedGraph(graph.name, canonical_model(changed, graph.name, spec), spec)


def quantisable(graph: ExportedGraph) -> list[str]:
    """The nodes of a graph that `quantise` puts into 8 bits, and that could be kept in float one by one."""
    model = onnx.load_model_from_string(graph.data)
    weights = {constant.name for constant in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in ("Concat", "Conv", "Gather") or (node.op_type == "MatMul" and node.input[1] in weights)
        if graph.name == "extractor" or node.op_type in _PRODUCTS
    ]


def last_nodes(graph: ExportedGraph) -> list[str]:
    """What only gathers and turns what an extractor's branches gave: in float it costs nothing, and loses nothing."""
    model = onnx.load_model_from_string(graph.data)
    made_by = {name: node for node in model.graph.node for name in node.output}
    names, tensor = [], model.graph.output[0].name
    while tensor in made_by and made_by[tensor].op_type in ("Concat", "Reshape", "Transpose"):
        names.append(made_by[tensor].name)
        tensor = made_by[tensor].input[0]
    return names


def _everywhere(
    model: ModelProto, ranges: dict[str, Range], in_float: Collection[str], *, reduce_range: bool
) -> ModelProto:
    """Pairs of QuantizeLinear and DequantizeLinear around every operator, which runtimes fuse with it."""
    for node in model.graph.node:
        if node.op_type == "Relu":  # whose input is not looked at: its range is that of the output, cut off there
            ranges.setdefault(node.input[0], ranges[node.output[0]])
    tensors = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in ranges.items()
    }
    # A ReLU behind a node in float is in float too: nothing is saved by 8 bits in between.
    outputs = {name for node in model.graph.node if node.name in in_float for name in node.output}
    relus = {node.name for node in model.graph.node if node.op_type == "Relu" and node.input[0] in outputs}
    # Sums with a constant only bring pixels into their range.
    constants = {constant.name for constant in model.graph.initializer}
    shifts = {node.name for node in model.graph.node if node.op_type == "Add" and constants & {*node.input}}
    quantizer = QDQQuantizer(
        model,
        per_channel=True,
        reduce_range=reduce_range,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, tensors),
        nodes_to_quantize=[],
        nodes_to_exclude=sorted({*in_float, *relus, *shifts}),
        op_types_to_quantize=list(_EVERYWHERE),
        extra_options={},
    )
    quantizer.quantize_model()
    changed: ModelProto = quantizer.model.model
    return changed


def _products(
    model: ModelProto, ranges: Mapping[str, Range], in_float: Collection[str], *, reduce_range: bool
) -> ModelProto:
    """Products as MatMulInteger, and what they give in float again.

    ONNX Runtime's quantiser writes them with ranges that are found while the graph runs; these are fixed afterwards.
    (As QuantizeLinear and DequantizeLinear around a MatMul, ONNX Runtime 1.31 turns the weights back into floats at
    each word, which takes 15 times as long as the whole step in float32.)
    """
    quantizer = ONNXQuantizer(
        model,
        per_channel=True,
        reduce_range=reduce_range,
        mode=QuantizationMode.IntegerOps,
        static=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=None,
        nodes_to_quantize=[],
        nodes_to_exclude=sorted(in_float),
        op_types_to_quantize=list(_PRODUCTS),
        extra_options={"MatMulConstBOnly": True},
    )
    quantizer.quantize_model()
    changed: ModelProto = quantizer.model.model
    for node in changed.graph.node:
        if node.op_type != "DynamicQuantizeLinear":
            continue
        quantised, scale_name, zero_name = node.output
        low, high = ranges[node.input[0]]
        low, high = min(low, 0.0), max(high, 0.0)  # so that zero, which padding gives, is one of the 256 values
        scale = np.float32((high - low) / 255 or 1)
        zero = np.uint8(np.clip(np.round(-low / scale), 0, 255))
        changed.graph.initializer.extend(
            [numpy_helper.from_array(np.array(scale), scale_name), numpy_helper.from_array(np.array(zero), zero_name)]
        )
        node.CopyFrom(
            helper.make_node("QuantizeLinear", [node.input[0], scale_name, zero_name], [quantised], name=node.name)
        )
    return changed

"""What can be said of an ONNX graph without running it: names, dtypes, axes, operators, and that it stands alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx
from onnx import AttributeProto, ModelProto, TensorProto, ValueInfoProto

from caption_export.canonical import DTYPES, OPSET, operators
from caption_export.errors import ExportError
from caption_rt.bundle import GraphSpec, TensorSpec
from caption_rt.errors import printable

if TYPE_CHECKING:  # it imports TensorFlow, and a graph of a bundle is looked at without
    from caption_export.graphs import ExportedGraph

_LEFT_FROM_TRAINING = ("BatchNormalization", "Dropout")


@dataclass(frozen=True)
class GraphReport:
    """A graph that passed."""

    name: str
    """"extractor", "encoder" or "decoder"."""
    size: int
    """Bytes."""
    opset: int
    """ONNX operator set."""
    operators: dict[str, int]
    """How many nodes of each kind."""

    @property
    def nodes(self) -> int:
        """How many nodes in all."""
        return sum(self.operators.values())


def check_structure(graph: ExportedGraph) -> GraphReport:
    """See that a graph is what its specification says, valid, and nothing but standard inference operators.

    Raises:
        ExportError: Naming the graph and the tensor or node.
    """
    return check_model(graph.name, graph.data, graph.spec)


def check_model(name: str, data: bytes, spec: GraphSpec) -> GraphReport:
    """See the same of a graph that is a file's bytes.

    Args:
        name: "extractor", "encoder" or "decoder".
        data: The serialised ONNX model.
        spec: What it must be.

    Raises:
        ExportError: Naming the graph and the tensor or node.
    """
    where = f"the {name} graph"
    try:
        model = onnx.load_model_from_string(data)
    except Exception as exc:  # protobuf's errors have no common root below Exception
        raise ExportError(f"{where} is not an ONNX model: {printable(exc)}") from exc
    _check_tensors(where, "input", model.graph.input, spec.inputs)
    _check_tensors(where, "output", model.graph.output, spec.outputs)
    for constant in model.graph.initializer:
        if constant.data_location == TensorProto.EXTERNAL or constant.external_data:
            raise ExportError(f"{where} keeps the data of {printable(constant.name)} outside the file")
    opset = _check_operators(where, model)
    try:
        # Names, types and shapes of everything inside, by inference from the operators' own definitions.
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as exc:
        raise ExportError(f"{where} is not valid ONNX: {printable(exc)}") from exc
    return GraphReport(name, len(data), opset, operators(model))


def _check_tensors(where: str, kind: str, found: Sequence[ValueInfoProto], wanted: Sequence[TensorSpec]) -> None:
    names, expected = [tensor.name for tensor in found], [tensor.name for tensor in wanted]
    if names != expected:
        raise ExportError(f"{where} has the {kind}s {_listed(names)}, not {_listed(expected)}")
    for tensor, spec in zip(found, wanted, strict=True):
        what = f"{where}: {kind} {spec.name}"
        element = tensor.type.tensor_type.elem_type
        if element != DTYPES[spec.dtype]:
            raise ExportError(f"{what} is {TensorProto.DataType.Name(element).lower()}, not {spec.dtype}")
        axes = [axis.dim_param or axis.dim_value for axis in tensor.type.tensor_type.shape.dim]
        if axes and isinstance(axes[0], int):
            raise ExportError(f"{what}: the first axis is fixed at {axes[0]}, but must take any number")
        if axes != list(spec.shape):
            raise ExportError(f"{what} has the axes {axes}, not {list(spec.shape)}")


def _check_operators(where: str, model: ModelProto) -> int:
    """Standard operators of one set, no control flow, nothing from training; returns the set's version."""
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    if opsets != {"": OPSET}:
        raise ExportError(f"{where} uses the operator sets {opsets}, not ONNX's own {OPSET} alone")
    for node in model.graph.node:
        what = f"{where}: node {printable(node.name)} ({node.op_type})"
        if node.domain:
            raise ExportError(f"{what} is of the domain {printable(node.domain)}, not a standard operator")
        if any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in node.attribute):
            raise ExportError(f"{what} is control flow")
        if node.op_type in _LEFT_FROM_TRAINING:
            raise ExportError(f"{what} is left over from training")
    return OPSET


def _listed(names: Sequence[str]) -> str:
    return ", ".join(printable(name) for name in names) or "none"

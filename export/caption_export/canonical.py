"""One form for one graph: the same computation always becomes the same bytes.

What tf2onnx writes depends on how many functions the process has traced before (names such as ``gru_cell_1/MatMul_3:0``
and ``unk__597``) and on the order in which Python walks its sets. Here every node is found again from the outputs
backwards, in the order of its inputs, and named by that order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from caption_export.errors import ExportError
from caption_rt.bundle import GraphSpec, TensorSpec

OPSET = 18
"""Operator set of the graphs: the highest that tf2onnx writes."""
IR_VERSION = 8
"""Version of the ONNX file format, the one that came with opset 18: older runtimes refuse a newer one."""
PRODUCER = "caption-export"

DTYPES: Mapping[str, int] = {
    "uint8": TensorProto.UINT8,
    "float32": TensorProto.FLOAT,
    "int64": TensorProto.INT64,
}
"""A manifest's dtype to ONNX's element type."""


def canonical_model(model: ModelProto, name: str, spec: GraphSpec) -> bytes:
    """Rebuild a graph with our names, our order, and the contract's axes.

    Nodes that no output needs are gone, equal initialisers are stored once, and nothing of the converter's own
    (documentation strings, shapes of inner tensors, operator sets without a node) is left.

    Args:
        model: What tf2onnx made. Its inputs and outputs have the contract's names already.
        name: The graph's name: "extractor", "encoder" or "decoder".
        spec: Names, dtypes and shapes of inputs and outputs.

    Returns:
        The serialised ONNX model.

    Raises:
        ExportError: An output is missing, or the graph has control flow or operators from outside the standard.
    """
    rebuilt = _Rebuilt(model.graph, name, spec)
    for tensor in spec.outputs:
        rebuilt.add(tensor.name)
    graph = helper.make_graph(
        rebuilt.nodes,
        name,
        [_value_info(tensor) for tensor in spec.inputs],
        [_value_info(tensor) for tensor in spec.outputs],
        initializer=rebuilt.initializers,
    )
    made = helper.make_model(
        graph, producer_name=PRODUCER, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )
    return bytes(made.SerializeToString(deterministic=True))


def operators(model: ModelProto) -> dict[str, int]:
    """How many nodes of each operator a graph has, in alphabetical order."""
    return dict(sorted(Counter(node.op_type for node in model.graph.node).items()))


class _Rebuilt:
    """Nodes and initialisers of a graph, found from its outputs backwards."""

    def __init__(self, graph: GraphProto, name: str, spec: GraphSpec) -> None:
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self._name = name
        self._made_by = {output: node for node in graph.node for output in node.output}
        self._constants = {constant.name: constant for constant in graph.initializer}
        self._kept = {tensor.name for tensor in (*spec.inputs, *spec.outputs)}
        self._names = {tensor.name: tensor.name for tensor in spec.inputs}
        self._stored: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def add(self, output: str) -> None:
        """Add everything that computes a tensor; depth first, without recursion, since networks are deep."""
        stack = [output]
        while stack:
            name = stack[-1]
            if name in self._names or not name:
                stack.pop()
            elif name in self._constants:
                self._store(name, numpy_helper.to_array(self._constants[name]))
                stack.pop()
            elif name not in self._made_by:
                raise ExportError(f"the {self._name} graph: nothing computes {name}")
            elif waiting := [x for x in self._made_by[name].input if x and x not in self._names]:
                stack.extend(reversed(waiting))
            else:
                self._place(self._made_by[name])
                stack.pop()

    def _place(self, node: NodeProto) -> None:
        # What tf2onnx cannot convert it leaves in the graph as it was in TensorFlow, and only logs.
        if node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op_type, OPSET):
            operator = ".".join(filter(None, (node.domain, node.op_type)))
            raise ExportError(f"the {self._name} graph has the operator {operator}, which is not standard ONNX")
        if any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in node.attribute):
            raise ExportError(f"the {self._name} graph has control flow: {node.op_type}")
        if node.op_type == "Constant":
            self._store(node.output[0], _constant_value(node, self._name))
            return
        own = f"{node.op_type.lower()}_{len(self.nodes)}"
        for index, output in enumerate(node.output):
            self._names[output] = output if output in self._kept else f"{own}.{index}" if index else own
        placed = helper.make_node(
            node.op_type, [self._names.get(x, "") for x in node.input], [self._names[x] for x in node.output], name=own
        )
        placed.attribute.extend(sorted(node.attribute, key=lambda attribute: attribute.name))
        self.nodes.append(placed)

    def _store(self, name: str, array: NDArray[np.generic]) -> None:
        """An initialiser; one that is there already is used again."""
        array = np.ascontiguousarray(array).reshape(array.shape)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._stored:
            self._stored[key] = f"constant_{len(self.initializers)}"
            self.initializers.append(numpy_helper.from_array(array, self._stored[key]))
        self._names[name] = self._stored[key]


def _constant_value(node: NodeProto, graph_name: str) -> NDArray[np.generic]:
    for attribute in node.attribute:
        if attribute.name == "value":
            return numpy_helper.to_array(attribute.t)
    raise ExportError(f"the {graph_name} graph has a Constant without a tensor")


def _value_info(tensor: TensorSpec) -> ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, DTYPES[tensor.dtype], list(tensor.shape))

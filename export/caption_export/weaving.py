"""Building ONNX graphs by hand: nodes that name themselves, and whole models put inside.

A bundle's graphs are woven into one (`caption_export.one_graph`): their tensors get new names, their initialisers move
to the outermost graph, and what a loop would compute anew at each turn is computed before it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from caption_export.errors import ExportError

__all__ = ["Weaver", "tensor_info"]

Axes = Sequence[int | str | None]

_DTYPES: Mapping[str, int] = {
    "uint8": TensorProto.UINT8,
    "int64": TensorProto.INT64,
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "bool": TensorProto.BOOL,
    "string": TensorProto.STRING,
}


def tensor_info(name: str, dtype: str, axes: Axes) -> ValueInfoProto:
    """The declaration of a tensor.

    Args:
        name: Of the tensor.
        dtype: "uint8", "int64", "float32", "float64", "bool" or "string".
        axes: A size, a name, or None for an axis of which nothing is known.
    """
    return helper.make_tensor_value_info(name, _DTYPES[dtype], list(axes))


class Weaver:
    """A graph in the making, or the body of a loop in one.

    Constants are stored once, in the outermost graph, which the bodies see.

    Args:
        outer: The graph in which this one is a body; None for the outermost.
        prefix: Before the names of the tensors that nodes give.
    """

    def __init__(self, outer: Weaver | None = None, prefix: str = "") -> None:
        """Begin without nodes."""
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self._root: Weaver = self if outer is None else outer._root
        self._prefix = prefix
        self._stored: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output.

        Args:
            operator: Of ONNX's own set.
            inputs: Names of tensors; "" for one that is left out.
            attributes: Of the operator.

        Returns:
            The name of its output.
        """
        return self.add_several(1, operator, *inputs, **attributes)[0]

    def add_several(self, count: int, operator: str, *inputs: str, **attributes: Any) -> list[str]:
        """Add a node with several outputs; see `add`."""
        name = f"{self._prefix}{operator.lower()}_{len(self.nodes)}"
        outputs = [name, *(f"{name}.{index}" for index in range(1, count))]
        self.nodes.append(helper.make_node(operator, inputs, outputs, name=name, **attributes))
        return outputs

    def constant(self, value: NDArray[Any] | Sequence[Any] | float | bool, dtype: str) -> str:
        """The name of a constant; equal ones are one.

        Args:
            value: Anything that NumPy makes an array of.
            dtype: See `tensor_info`.
        """
        array = np.asarray(value, object if dtype == "string" else dtype)
        content = "\0".join(array.tolist()).encode() if dtype == "string" else array.tobytes()
        root, key = self._root, (dtype, array.shape, content)
        if key not in root._stored:
            root._stored[key] = f"constant_{len(root._stored)}"
            root.initializers.append(numpy_helper.from_array(array, root._stored[key]))
        return root._stored[key]

    def int64(self, *values: int) -> str:
        """The name of a constant int64 [number of values]."""
        return self.constant(values, "int64")

    def filled(self, shape: str, value: float | bool, dtype: str) -> str:
        """A tensor of a shape (int64 [axes]) with the same value everywhere."""
        one = helper.make_tensor("value", _DTYPES[dtype], [1], [value])
        return self.add("ConstantOfShape", shape, value=one)

    def cast(self, tensor: str, dtype: str) -> str:
        """A tensor in another dtype."""
        return self.add("Cast", tensor, to=_DTYPES[dtype])

    def name(self, tensor: str, name: str) -> None:
        """Give a tensor a name of our own, as the outputs of a graph have."""
        self.nodes.append(helper.make_node("Identity", [tensor], [name], name=f"{self._prefix}{name}"))

    def inline(
        self,
        model: ModelProto,
        prefix: str,
        inputs: Mapping[str, str],
        *,
        before: Weaver | None = None,
        fixed: Collection[str] = (),
    ) -> dict[str, str]:
        """Put a whole model in.

        Args:
            model: The model.
            prefix: Before the names of its tensors, which must not clash with those of another.
            inputs: The tensor for each of its inputs.
            before: The graph outside of the loop whose body this is. What depends on constants and `fixed` alone goes
                there, to be computed once.
            fixed: Names of inputs of the model that are the same at each turn of the loop.

        Returns:
            The tensor of each of its outputs.

        Raises:
            ExportError: The model has control flow, whose bodies see names of their own.
        """
        graph, names = model.graph, dict(inputs)
        still = {*fixed, *(constant.name for constant in graph.initializer), ""}
        for constant in graph.initializer:
            moved = TensorProto()
            moved.CopyFrom(constant)
            moved.name = names[constant.name] = prefix + constant.name
            self._root.initializers.append(moved)
        for node in graph.node:
            if any(attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for attribute in node.attribute):
                raise ExportError(f"the {graph.name} graph has control flow: {node.op_type}")
            placed = NodeProto()
            placed.CopyFrom(node)
            names.update({output: prefix + output for output in node.output if output})
            placed.name = prefix + (node.name or next(filter(None, node.output)))
            placed.input[:] = [names[name] if name else "" for name in node.input]
            placed.output[:] = [names[name] if name else "" for name in node.output]
            outside = before is not None and still.issuperset(node.input)
            if outside:
                still.update(node.output)
            (before if before is not None and outside else self).nodes.append(placed)
        return {output.name: names[output.name] for output in graph.output}

    def graph(self, name: str, inputs: Sequence[ValueInfoProto], outputs: Sequence[ValueInfoProto]) -> GraphProto:
        """The graph as it stands."""
        return helper.make_graph(self.nodes, name, inputs, outputs, initializer=self.initializers)

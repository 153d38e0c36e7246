"""What ONNX Runtime says of a graph's inputs and outputs, held against what the bundle's manifest states."""

from collections.abc import Sequence
from typing import Any

from caption_rt.errors import BundleError, printable
from caption_rt.manifest import TensorSpec

__all__ = ["check_tensors"]

_DTYPES = {
    "tensor(uint8)": "uint8",
    "tensor(float)": "float32",
    "tensor(int64)": "int64",
    # These two have no part in a bundle, but in the one graph that the exporter makes of it.
    "tensor(bool)": "bool",
    "tensor(string)": "string",
}


def check_tensors(file: str, kind: str, specs: tuple[TensorSpec, ...], actual: Sequence[Any]) -> None:
    """See that a graph's real inputs or outputs are those of the manifest, in any order.

    Args:
        file: the graph's file.
        kind: "input" or "output".
        specs: what the manifest states.
        actual: what ONNX Runtime says of the graph, each with a `name`, a `type` and a `shape`.

    Raises:
        BundleError: they differ.
    """
    found = {node.name: node for node in actual}
    if sorted(found) != sorted(spec.name for spec in specs):
        raise BundleError(
            f"{file} has the {kind}s {printable(', '.join(sorted(found)))}, not those of its manifest: export the "
            "model again"
        )
    for spec in specs:
        node = found[spec.name]
        # A free axis is a name, or None where the graph has no name for it.
        shape = tuple(axis if isinstance(axis, int) else None for axis in node.shape)
        wanted = tuple(axis if isinstance(axis, int) else None for axis in spec.shape)
        if shape != wanted or _DTYPES.get(node.type) != spec.dtype:
            raise BundleError(
                f"{file}: the {kind} {spec.name} is {printable(node.type)} {printable(list(node.shape))}, "
                f"and its manifest states {spec.dtype} {list(spec.shape)}: export the model again"
            )

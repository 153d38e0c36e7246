"""What an ONNX file says of itself, read before ONNX Runtime is given it: inputs, outputs, and data in other files.

ONNX Runtime opens whatever files a graph names as the place of its weights, and takes one special name for an address
in this process's memory. A graph of a bundle holds its weights itself, and this is looked for here, where no ONNX
library is installed: by walking over the protobuf file, from message to message, without reading a weight. Field
numbers are those of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto), the encoding is that of
https://protobuf.dev/programming-guides/encoding/. Where protobuf's own parsers are lenient in ways that no exporter
uses, this one refuses, so that there is nothing that it and ONNX Runtime could read differently.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeAlias

from caption_rt.errors import BundleError, printable
from caption_rt.manifest import GraphSpec, TensorSpec

__all__ = ["CHILDREN", "check_graph_file"]

CHILDREN: Mapping[str, Mapping[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        **{5: "TensorProto", 10: "TensorProto", 22: "SparseTensorProto", 23: "SparseTensorProto"},
        **{6: "GraphProto", 11: "GraphProto"},
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
}
"""By message, the fields by which a tensor is reached, and the messages that these hold."""

_GRAPH, _INPUT, _OUTPUT = 7, 11, 12  # of ModelProto; of GraphProto
_TENSOR_NAME, _EXTERNAL_DATA, _DATA_LOCATION = 8, 13, 14  # of TensorProto

_VARINT, _FIXED_64, _LENGTH, _FIXED_32 = 0, 1, 2, 5  # wire types; 3 and 4 were groups, which ONNX does not have
_MESSAGES = 100  # protobuf's own limit of messages within messages
# InceptionV3 has 5,000 fields. Whatever has a hundred times as many is made to keep its reader busy.
_FIELDS = 500_000

_DTYPES = {1: "float32", 2: "uint8", 7: "int64"}  # TensorProto.DataType
_MADE_FOR_ONE_RUNTIME = b"ORTM"  # at byte 4: ONNX Runtime's own format, which it would take instead


class _Field(NamedTuple):
    number: int
    wire_type: int
    value: int
    """Of a varint."""
    start: int
    """Where a message, a text or an array begins."""
    end: int
    """Where the field ends."""


_Stated: TypeAlias = tuple[str, tuple[int | None, ...] | None]
"""An input's or output's dtype and shape: None for a free axis, and for a shape that is not stated."""


class _Malformed(Exception):
    """No protobuf file, or none that an exporter would write."""


def check_graph_file(data: bytes, spec: GraphSpec) -> None:
    """See that an ONNX file stands alone and has the inputs and outputs that the manifest states.

    Args:
        data: the file's bytes.
        spec: what the manifest states.

    Raises:
        BundleError: it is no ONNX file, keeps the data of a tensor elsewhere, or its inputs and outputs are others.
    """
    try:
        if data[4:8] == _MADE_FOR_ONE_RUNTIME:
            raise _Malformed("it is in ONNX Runtime's own format")
        file = _File(data)
        elsewhere = file.tensor_elsewhere()
        if elsewhere is not None:
            raise BundleError(
                f"{spec.file} keeps the data of {printable(elsewhere)[:100]} outside of the file, and a graph of a "
                "bundle holds all of its data itself"
            )
        _compare(spec.file, "input", spec.inputs, file.tensors(_INPUT))
        _compare(spec.file, "output", spec.outputs, file.tensors(_OUTPUT))
    except _Malformed as exc:
        raise BundleError(f"{spec.file} is not an ONNX file: {exc}") from exc


class _File:
    """An ONNX file of which nothing is believed."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._left = _FIELDS

    def tensor_elsewhere(self) -> str | None:
        """The name of a tensor, anywhere in the file, whose data is not in the file; None where there is none."""
        waiting = [("ModelProto", 0, len(self._data), 1)]
        while waiting:
            kind, start, end, depth = waiting.pop()
            if depth > _MESSAGES:
                raise _Malformed(f"it has more than {_MESSAGES} messages within one another")
            children = CHILDREN.get(kind, {})
            for field in self._fields(start, end):
                if kind == "TensorProto":
                    # Any place but the file itself, whichever values it may have in later versions of ONNX.
                    if field.number == _EXTERNAL_DATA or (field.number == _DATA_LOCATION and field.value):
                        return self._text(self._all(start, end), _TENSOR_NAME) or "a tensor"
                elif field.number in children:
                    if field.wire_type != _LENGTH:
                        raise _Malformed(f"field {field.number} is no message")
                    waiting.append((children[field.number], field.start, field.end, depth + 1))
        return None

    def tensors(self, field: int) -> dict[str, _Stated]:
        """The graph's inputs or outputs: by name, their dtypes and shapes.

        Args:
            field: which of them: the field's number in GraphProto.
        """
        graph = self._one(self._all(0, len(self._data)), _GRAPH)
        if graph is None:
            raise _Malformed("it has no graph")
        found: dict[str, _Stated] = {}
        for info in self._inside(graph).get(field, []):
            fields = self._inside(info)  # ValueInfoProto: name = 1, type = 2
            name = self._text(fields, 1)
            if name in found:
                raise _Malformed(f"{printable(name)} is stated twice")
            found[name] = self._type(self._one(fields, 2))
        return found

    def _type(self, type_: _Field | None) -> _Stated:
        """TypeProto: tensor_type = 1; its elem_type = 1 and shape = 2; TensorShapeProto: dim = 1."""
        kinds = self._inside(type_)
        tensor = self._inside(self._one(kinds, 1))
        element, shape = self._one(tensor, 1, _VARINT), self._one(tensor, 2)
        # Beside a tensor only a name of its kind, denotation = 6: of two kinds protobuf would take the last.
        if element is None or not kinds.keys() <= {1, 6}:
            return "no tensor", None
        dtype = _DTYPES.get(element.value, f"of ONNX's type {element.value}")
        if shape is None:
            return dtype, None
        return dtype, tuple(self._axis(axis) for axis in self._inside(shape).get(1, []))

    def _axis(self, dimension: _Field) -> int | None:
        """TensorShapeProto.Dimension: dim_value = 1, or dim_param = 2, or neither."""
        fields = self._inside(dimension)
        size = self._one(fields, 1, _VARINT)
        if size is not None and 2 in fields:
            raise _Malformed("an axis has both a size and a name")
        return None if size is None else size.value

    def _inside(self, message: _Field | None) -> dict[int, list[_Field]]:
        """A message's fields by their numbers."""
        if message is None:
            return {}
        if message.wire_type != _LENGTH:
            raise _Malformed(f"field {message.number} is no message")
        return self._all(message.start, message.end)

    def _all(self, start: int, end: int) -> dict[int, list[_Field]]:
        found: dict[int, list[_Field]] = {}
        for field in self._fields(start, end):
            found.setdefault(field.number, []).append(field)
        return found

    def _one(self, fields: Mapping[int, list[_Field]], number: int, wire_type: int = _LENGTH) -> _Field | None:
        """A field that may be there once: if it were there twice, protobuf would join them or take the last."""
        found = fields.get(number, [])
        if len(found) > 1 or any(field.wire_type != wire_type for field in found):
            raise _Malformed(f"field {number} is not stated as ONNX states it")
        return found[0] if found else None

    def _text(self, fields: Mapping[int, list[_Field]], number: int) -> str:
        field = self._one(fields, number)
        return "" if field is None else self._data[field.start : field.end].decode("utf-8", "backslashreplace")

    def _fields(self, position: int, end: int) -> Iterator[_Field]:
        """The fields of the message between two positions."""
        while position < end:
            self._left -= 1
            if self._left < 0:
                raise _Malformed(f"it has more than {_FIELDS} fields")
            tag, position = self._varint(position, end)
            number, wire_type, value = tag >> 3, tag & 7, 0
            if not 0 < number < 1 << 29:
                raise _Malformed(f"a field has the number {number}")
            start = position
            if wire_type == _VARINT:
                value, position = self._varint(position, end)
            elif wire_type == _LENGTH:
                length, start = self._varint(position, end)
                position = start + length
            elif wire_type in (_FIXED_32, _FIXED_64):
                position += 4 if wire_type == _FIXED_32 else 8
            else:
                raise _Malformed(f"field {number} is of the unknown wire type {wire_type}")
            if position > end:
                raise _Malformed("it ends in the middle")
            yield _Field(number, wire_type, value, start, position)

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        """A number, seven bits a byte with the lowest first, and where it ends."""
        value = shift = 0
        while position < end and shift < 70:
            byte = self._data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, position
            shift += 7
        raise _Malformed("it ends in the middle" if position >= end else "a number is longer than ten bytes")


def _compare(
    file: str,
    kind: str,
    specs: tuple[TensorSpec, ...],
    found: Mapping[str, _Stated],
) -> None:
    if sorted(found) != sorted(spec.name for spec in specs):
        raise BundleError(
            f"{file} has the {kind}s {printable(', '.join(sorted(found)))[:300]}, not those of its manifest"
        )
    for spec in specs:
        dtype, shape = found[spec.name]
        wanted = tuple(axis if isinstance(axis, int) else None for axis in spec.shape)
        if (dtype, shape) != (spec.dtype, wanted):
            stated = "without a shape" if shape is None else ["any" if axis is None else axis for axis in shape]
            raise BundleError(
                f"{file}: the {kind} {spec.name} is {dtype} {stated}, and its manifest states "
                f"{spec.dtype} {list(spec.shape)}"
            )

"""ONNX graphs of one node, written by hand: each is a dozen protobuf fields, so no ONNX library is needed.

Field numbers are those of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto), the encoding that of
https://protobuf.dev/programming-guides/encoding/.
"""

__all__ = ["DATA", "PICKED", "ROWS", "gather_model", "product_model"]

DATA = "data"
"""Input: float32 [n, ...]."""
ROWS = "rows"
"""Input: int64 [k], each from 0 to n - 1."""
PICKED = "picked"
"""Output: float32 [k, ...]."""

# As an exporter of 2021 would have written it: every ONNX Runtime that the package allows reads these.
_IR_VERSION, _OPSET = 7, 13
_FLOAT, _UINT8, _INT8, _INT32, _INT64 = 1, 2, 3, 6, 7  # TensorProto.DataType


def gather_model() -> bytes:
    """Gather: picks rows of a tensor of any rank where it lies.

    The graphs of a bundle know nothing of the search: which hypotheses go on is decided on the host, and their rows of
    features, keys and states are picked on the device.

    Returns:
        The ONNX file. Without the attribute `axis` it is 0: rows.
    """
    return _model("Gather", {DATA: _FLOAT, ROWS: _INT64}, {PICKED: _FLOAT})


def product_model() -> bytes:
    """MatMulInteger: "unsigned", uint8 [n, k], times "signed", int8 [k, m], is "product", int32 [n, m].

    Returns:
        The ONNX file.
    """
    return _model("MatMulInteger", {"unsigned": _UINT8, "signed": _INT8}, {"product": _INT32})


def _model(operator: str, inputs: dict[str, int], outputs: dict[str, int]) -> bytes:
    """A graph of one operator; its tensors' element types are given, their shapes left open."""
    # NodeProto: input = 1, output = 2, op_type = 4.
    names = b"".join(_text(1, name) for name in inputs) + b"".join(_text(2, name) for name in outputs)
    # GraphProto: node = 1, name = 2, input = 11, output = 12.
    graph = (
        _message(1, names + _text(4, operator))
        + _text(2, operator)
        + b"".join(_message(11, _tensor(*tensor)) for tensor in inputs.items())
        + b"".join(_message(12, _tensor(*tensor)) for tensor in outputs.items())
    )
    # ModelProto: ir_version = 1, graph = 7, opset_import = 8; OperatorSetIdProto: version = 2.
    return _number(1, _IR_VERSION) + _message(7, graph) + _message(8, _number(2, _OPSET))


def _tensor(name: str, element_type: int) -> bytes:
    """ValueInfoProto: name = 1, type = 2; TypeProto: tensor_type = 1; its elem_type = 1."""
    return _text(1, name) + _message(2, _message(1, _number(1, element_type)))


def _number(field: int, value: int) -> bytes:
    return bytes([field << 3]) + _varint(value)


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode())


def _message(field: int, content: bytes) -> bytes:
    return bytes([field << 3 | 2]) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the top bit says that more follow."""
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])

"""An ONNX graph of one node, Gather, that picks rows of a tensor where it lies: written by hand.

The graphs of a bundle know nothing of the search: which hypotheses go on is decided on the host, and their rows of
features, keys and states are picked on the device. The graph is a dozen protobuf fields, so no ONNX library is needed.
Field numbers are those of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto), the encoding that of
https://protobuf.dev/programming-guides/encoding/.
"""

__all__ = ["DATA", "PICKED", "ROWS", "gather_model"]

DATA = "data"
"""Input: float32 [n, ...]."""
ROWS = "rows"
"""Input: int64 [k], each from 0 to n - 1."""
PICKED = "picked"
"""Output: float32 [k, ...]."""

# As an exporter of 2021 would have written it: every ONNX Runtime that the package allows reads these.
_IR_VERSION, _OPSET = 7, 13
_FLOAT, _INT64 = 1, 7  # TensorProto.DataType


def gather_model() -> bytes:
    """The ONNX file. The shapes of its tensors are left open, so that it takes data of any rank."""
    # NodeProto: input = 1, output = 2, op_type = 4. Without the attribute `axis` it is 0: rows.
    node = _text(1, DATA) + _text(1, ROWS) + _text(2, PICKED) + _text(4, "Gather")
    # GraphProto: node = 1, name = 2, input = 11, output = 12.
    graph = (
        _message(1, node)
        + _text(2, "gather")
        + _message(11, _tensor(DATA, _FLOAT))
        + _message(11, _tensor(ROWS, _INT64))
        + _message(12, _tensor(PICKED, _FLOAT))
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

"""ONNX files as the runtime sees them before ONNX Runtime does: against the onnx package, and made to deceive."""

import time

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from caption_rt._graph_file import CHILDREN, check_graph_file
from caption_rt.bundle import Bundle, GraphSpec, TensorSpec
from caption_rt.errors import BundleError

SPEC = GraphSpec("graph.onnx", (TensorSpec("x", "float32", ("n", 3)),), (TensorSpec("y", "float32", ("n", 3)),))


def tensor(name, *, external=False):
    made = numpy_helper.from_array(np.ones(3, np.float32), name)
    if external:
        made.ClearField("raw_data")
        made.data_location = TensorProto.EXTERNAL
        made.external_data.add(key="location", value="/etc/passwd")
    return made


def info(name, dtype=TensorProto.FLOAT, shape=("n", 3)):
    return helper.make_tensor_value_info(name, dtype, shape)


def model(*, nodes=(), initializers=(), inputs=(), outputs=()):
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "c"], ["y"]), *nodes],
        "graph",
        [*(inputs or [info("x")])],
        [*(outputs or [info("y")])],
        [tensor("c"), *initializers],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def refused(data, spec=SPEC):
    with pytest.raises(BundleError) as caught:
        check_graph_file(data if isinstance(data, bytes) else data.SerializeToString(), spec)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_every_way_to_a_tensor_is_walked():
    """Whatever a later onnx adds to its messages must be looked into as well."""
    reaching, before = {"TensorProto"}, set()
    messages = {d.name: d for d in onnx.onnx_ml_pb2.DESCRIPTOR.message_types_by_name.values()}
    while reaching != before:
        before = set(reaching)
        for name, message in messages.items():
            if any(f.message_type is not None and f.message_type.name in reaching for f in message.fields):
                reaching.add(name)
    wanted = {
        name: {
            f.number: f.message_type.name
            for f in messages[name].fields
            if f.message_type and f.message_type.name in reaching
        }
        for name in sorted(reaching - {"TensorProto"})
    }
    assert {name: dict(fields) for name, fields in CHILDREN.items()} == wanted
    fields = messages["TensorProto"].fields_by_name
    assert (fields["name"].number, fields["external_data"].number, fields["data_location"].number) == (8, 13, 14)


def test_good_graphs_pass(tiny_bundle):
    check_graph_file(model().SerializeToString(), SPEC)
    bundle = Bundle.open(tiny_bundle)
    for graph in bundle.manifest.precisions["fp32"].values():
        check_graph_file(bundle.read(graph.file), graph)


def branches(branch):
    return helper.make_node("If", ["condition"], ["z"], then_branch=branch, else_branch=branch)


def subgraph(*nodes, initializers=()):
    return helper.make_graph([*nodes], "inner", [], [info("z", shape=(3,))], [*initializers])


def function(made):
    node = helper.make_node("Constant", [], ["z"], value=tensor("hidden", external=True))
    made.functions.append(helper.make_function("own", "F", [], ["z"], [node], [helper.make_opsetid("", 18)]))
    return made


def training(made):
    made.training_info.add().initialization.CopyFrom(subgraph(initializers=[tensor("hidden", external=True)]))
    return made


def sparse(made):
    weights = made.graph.sparse_initializer.add(dims=[3])
    weights.values.CopyFrom(tensor("hidden", external=True))
    weights.indices.CopyFrom(numpy_helper.from_array(np.arange(3)))
    return made


EXTERNAL = {
    "initializer": lambda: model(initializers=[tensor("hidden", external=True)]),
    "sparse initializer": lambda: sparse(model()),
    "constant": lambda: model(nodes=[helper.make_node("Constant", [], ["z"], value=tensor("hidden", external=True))]),
    "branch": lambda: model(nodes=[branches(subgraph(initializers=[tensor("hidden", external=True)]))]),
    "branch of a branch": lambda: model(
        nodes=[branches(subgraph(branches(subgraph(initializers=[tensor("hidden", external=True)]))))]
    ),
    "function": lambda: function(model()),
    "training": lambda: training(model()),
}


@pytest.mark.parametrize("where", EXTERNAL)
def test_data_outside_of_the_file_is_found_wherever_it_is_named(where):
    assert "graph.onnx keeps the data of hidden outside of the file" in refused(EXTERNAL[where]())


def test_each_half_of_a_reference_to_other_data_is_enough():
    for half in ("external_data", "data_location"):
        made = tensor("hidden", external=True)
        made.ClearField(half)
        assert "keeps the data of hidden outside" in refused(model(initializers=[made]))
    # ONNX Runtime's own name for an address in memory, in a tensor without a name.
    made = tensor("", external=True)
    made.external_data[0].value = "*/_ORT_MEM_ADDR_/*"
    assert "keeps the data of a tensor outside" in refused(model(initializers=[made]))
    # protobuf cuts the number that says "external", 1, to 32 bits, and takes the last of several.
    plain = tensor("hidden").SerializeToString()
    for location in (b"\x70\x81\x80\x80\x80\x10", b"\x70\x00\x70\x01"):
        parsed = TensorProto.FromString(plain + location)
        assert parsed.data_location == TensorProto.EXTERNAL
        graph = model().graph.SerializeToString() + field(5, plain + location)
        assert "keeps the data of hidden outside" in refused(field(7, graph))


def varint(value):
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def field(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: model(inputs=[info("z")]), "has the inputs z, not those of its manifest"),
        (lambda: model(inputs=[info("x"), info("z")]), "has the inputs x, z, not those"),
        (lambda: model(outputs=[info("y"), info("c")]), "has the outputs c, y, not those"),
        (lambda: model(inputs=[info("x", shape=("n", 4))]), "the input x is float32 ['any', 4], and its manifest"),
        (lambda: model(inputs=[info("x", shape=(1, 3))]), "x is float32 [1, 3], and its manifest states float32"),
        (lambda: model(inputs=[info("x", shape=("n", "c"))]), "x is float32 ['any', 'any'], and"),
        (lambda: model(inputs=[info("x", shape=("n", 3, 1))]), "x is float32 ['any', 3, 1], and"),
        (lambda: model(inputs=[info("x", shape=("n", -3))]), "x is float32 ['any', 18446744073709551613], and"),
        (lambda: model(inputs=[info("x", shape=None)]), "x is float32 without a shape, and"),
        (lambda: model(outputs=[info("y", TensorProto.FLOAT16)]), "the output y is of ONNX's type 10 ['any', 3], and"),
        (lambda: model(inputs=[onnx.ValueInfoProto(name="x")]), "x is no tensor without a shape, and"),
        (lambda: model(inputs=[info("x"), info("x")]), "is not an ONNX file: x is stated twice"),
        (lambda: onnx.ModelProto(ir_version=8), "is not an ONNX file: it has no graph"),
    ],
)
def test_inputs_and_outputs_are_those_of_the_manifest(made, message):
    assert message in refused(made())


def test_what_protobuf_would_join_is_refused():
    whole = model().SerializeToString()
    # A second graph, whose inputs and weights protobuf would add to those of the first.
    assert "field 7 is not stated as ONNX states it" in refused(whole + field(7, b""))
    assert len(onnx.load_from_string(whole + field(7, field(11, field(1, b"z")))).graph.input) == 2
    shape = field(2, field(1, b"\x08\x03"))
    kinds = {"twice": field(1, b"\x08\x01" + shape) * 2, "another kind": field(1, b"\x08\x01" + shape) + field(4, b"")}
    for kind in kinds.values():
        graph = field(7, field(11, field(1, b"x") + field(2, kind)))
        assert "not stated as ONNX states it" in refused(graph) or "x is no tensor" in refused(graph)
    both = field(1, b"\x08\x01" + field(2, field(1, b"\x08\x03\x12\x01n")))
    assert "both a size and a name" in refused(field(7, field(11, field(1, b"x") + field(2, both))))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it has no graph"),
        (b"<html>not found</html>", "is not an ONNX file"),
        (b"\x08", "it ends in the middle"),
        (b"\x3a\x05ab", "it ends in the middle"),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "it ends in the middle"),
        (b"\xff" * 20, "a number is longer than ten bytes"),
        (b"\x00\x00", "a field has the number 0"),
        (b"\x3b\x3c", "field 7 is of the unknown wire type 3"),
        (b"\x38\x01", "field 7 is no message"),
        (field(7, b"\x58\x01"), "field 11 is no message"),
        (b"\x1c\x00\x00\x00ORTM" + bytes(20), "it is in ONNX Runtime's own format"),
    ],
)
def test_what_is_no_onnx_file_says_so(data, message):
    assert message in refused(data)


def test_a_graph_cut_or_changed_anywhere_passes_or_is_refused():
    data = model(nodes=[branches(subgraph())]).SerializeToString()
    opset = onnx.load_from_string(data).opset_import[0].ByteSize() + 2  # the last field, which the check does not need
    for length in range(len(data) - opset):
        refused(data[:length])
    generator = np.random.default_rng(1)
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] = generator.integers(256)
        try:
            check_graph_file(bytes(changed), SPEC)
        except BundleError:
            continue


def test_what_is_made_to_keep_the_reader_busy_is_refused_in_time():
    start = time.monotonic()
    deep = b""
    for _ in range(200):
        deep = field(1, field(5, field(6, deep)))  # a node, an attribute, a graph
    assert "more than 100 messages within one another" in refused(field(7, deep))
    many = field(7, b"\x0a\x00" * 1_000_000)
    assert "more than 500000 fields" in refused(many)
    assert time.monotonic() - start < 30

from dataclasses import replace

import keras
import numpy as np
import onnx
import pytest
import tensorflow as tf

from caption_export.canonical import canonical_model, operators
from caption_export.errors import ExportError
from caption_export.graphs import build_graph, build_graphs, fold_dense, graph_specs
from caption_rt.bundle import GraphSpec, TensorSpec
from caption_rt.engine import Graph
from caption_rt.vocabulary import Vocabulary
from caption_train.inception import ExtractorConfig, build_extractor
from caption_train.model import CaptionModel

pytestmark = pytest.mark.tf


def model_of(graph):
    return onnx.load_model_from_string(graph.data)


def shapes(tensors):
    return {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}


def test_graphs_have_the_tensors_of_the_contract(graphs):
    assert list(graphs) == ["extractor", "encoder", "decoder"]
    found = {name: (shapes(g.spec.inputs), shapes(g.spec.outputs)) for name, g in graphs.items()}
    assert found == {
        "extractor": ({"images": ("uint8", ("n", 75, 75, 3))}, {"grid": ("float32", ("n", 9, 64))}),
        "encoder": (
            {"grid": ("float32", ("n", 9, 64))},
            {
                "features": ("float32", ("n", 9, 10)),
                "keys": ("float32", ("n", 9, 12)),
                "initial_state": ("float32", ("n", 12)),
            },
        ),
        "decoder": (
            {
                "token": ("int64", ("m",)),
                "state": ("float32", ("m", 12)),
                "features": ("float32", ("m", 9, 10)),
                "keys": ("float32", ("m", 9, 12)),
            },
            {
                "log_probs": ("float32", ("m", 25)),
                "next_state": ("float32", ("m", 12)),
                "attention": ("float32", ("m", 9)),
            },
        ),
    }
    for name, graph in graphs.items():
        model = model_of(graph)
        assert graph.spec.file == f"{name}.onnx"
        for values, specs in ((model.graph.input, graph.spec.inputs), (model.graph.output, graph.spec.outputs)):
            axes = [(v.name, tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim)) for v in values]
            assert axes == [(spec.name, spec.shape) for spec in specs]


@pytest.mark.parametrize("carry", [True, False], ids=["carry", "reset"])
def test_the_decoder_is_a_plain_step(graphs, reset_graphs, carry):
    assert operators(model_of((graphs if carry else reset_graphs)["decoder"])) == {
        "Add": 8 if carry else 5,
        "Concat": 1,
        "Gather": 1,
        "LogSoftmax": 1,
        "MatMul": 5,  # state, attention scores, context, GRU inputs, and fc1 with fc2 in one
        "Mul": 2,
        "Sigmoid": 2,
        "Softmax": 1,
        "Split": 2 if carry else 1,
        "Squeeze": 2,
        "Sub": 1,
        "Tanh": 2,
        "Unsqueeze": 2,
    }


def test_the_encoder_computes_features_and_keys_once_a_photo(run, graphs):
    found = operators(model_of(graphs["encoder"]))
    assert (found["MatMul"], found["Relu"]) == ({"zeros": 2, "mean": 3}[run.model.config.initial_state], 1)
    assert "Reshape" not in found


def test_inception_folds_to_94_convolutions_and_2_transposes(run):
    config = ExtractorConfig(width=0.05, size=139)
    extractor = build_extractor(config)
    model = CaptionModel(replace(run.model.config, places=9, channels=extractor.output_shape[-1]))
    graph = build_graph(replace(run, extractor=extractor, extractor_config=config, model=model), "extractor")
    assert operators(model_of(graph)) == {
        "Add": 1,
        "AveragePool": 9,
        "Cast": 1,
        "Concat": 11,  # the two forks of an 8x8 block are joined with its other branches at once
        "Conv": 94,
        "MaxPool": 4,
        "Mul": 1,
        "Relu": 94,
        "Reshape": 1,
        "Transpose": 2,
    }


def test_a_second_conversion_gives_the_same_bytes(run, graphs):
    keras.layers.Dense(3)(np.zeros((1, 2), np.float32))  # moves the counters that names come from
    assert {name: g.data for name, g in build_graphs(run).items()} == {name: g.data for name, g in graphs.items()}


def test_nothing_of_the_converter_is_left_in_the_file(graphs):
    for graph in graphs.values():
        model = model_of(graph)
        assert (model.producer_name, model.ir_version) == ("caption-export", 8)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
        assert not model.metadata_props
        assert not model.graph.value_info
        assert not any(word in graph.data for word in (b"tf2onnx", b"unk__", b"StatefulPartitionedCall"))


def test_equal_constants_are_stored_once_and_all_are_used(graphs):
    for graph in graphs.values():
        model = model_of(graph)
        kinds = [(x.data_type, tuple(x.dims), x.raw_data) for x in model.graph.initializer]
        assert len(set(kinds)) == len(kinds)
        assert {x.name for x in model.graph.initializer} <= {name for node in model.graph.node for name in node.input}


def test_two_dense_layers_fold_into_one():
    rng = np.random.default_rng(0)
    k1, b1, k2, b2 = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 4), (4,), (4, 3), (3,)))
    x = rng.normal(size=(6, 5)).astype(np.float32)
    kernel, bias = fold_dense([k1, b1], [k2, b2])
    assert (kernel.dtype, kernel.shape, bias.shape) == (np.float32, (5, 3), (3,))
    np.testing.assert_allclose(x @ kernel + bias, (x @ k1 + b1) @ k2 + b2, atol=1e-5)


def test_a_reset_state_reaches_the_attention_alone(reset_graphs):
    """In the tutorial's code the GRU starts at zero: with uniform attention the state makes no difference."""
    graph = reset_graphs["decoder"]
    session = Graph(graph.data, graph.spec)
    rng = np.random.default_rng(3)
    features = np.repeat(rng.normal(size=(1, 1, 10)), 9, axis=1).astype(np.float32)  # the same wherever one looks
    keys, token = rng.normal(size=(1, 9, 12)).astype(np.float32), np.array([5])
    one, other = (session.run(token, np.full((1, 12), x, np.float32), features, keys) for x in (-1, 1))
    np.testing.assert_allclose(one[0], other[0], atol=1e-5)
    assert np.abs(one[2] - other[2]).max() > 0.01


def test_a_vocabulary_of_another_size_is_refused(run):
    other = replace(run, vocabulary=Vocabulary.build(["one two three"]))
    with pytest.raises(ExportError, match=r"^the vocabulary has 7 words, but the model was made for 25$"):
        graph_specs(other)


def test_an_extractor_with_another_grid_is_refused(run):
    config = ExtractorConfig(width=0.1, size=75, layer="mixed0")
    other = replace(run, extractor=build_extractor(config), extractor_config=config)
    expected = r"^the extractor gives 7x7 places of 32 channels, but the model was made for 9 places of 64$"
    with pytest.raises(ExportError, match=expected):
        build_graph(other, "encoder")


def test_an_operator_without_onnx_counterpart_is_refused(run):
    class Unusual(keras.layers.Layer):
        def call(self, x):
            return tf.cast(tf.raw_ops.Betainc(a=tf.abs(x) + 1, b=tf.abs(x) + 1, x=tf.sigmoid(x)), tf.float32)

    extractor = keras.Sequential([run.extractor, Unusual()])
    with pytest.raises(
        ExportError, match=r"^the extractor graph has the operator Betainc, which is not standard ONNX$"
    ):
        build_graph(replace(run, extractor=extractor), "extractor")


def made(nodes, *, initializers=()):
    spec = GraphSpec("x.onnx", (TensorSpec("x", "float32", ("n", 2)),), (TensorSpec("y", "float32", ("n", 2)),))
    info = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 2]) for name in "xy"]
    graph = onnx.helper.make_graph(nodes, "g", info[:1], info[1:], initializer=initializers)
    return onnx.helper.make_model(graph), spec


def test_canonical_form_does_not_depend_on_names_or_order():
    node, two = onnx.helper.make_node, onnx.numpy_helper.from_array
    one, spec = made(
        [node("Add", ["x", "k"], ["s"]), node("Abs", ["x"], ["dead"]), node("Mul", ["s", "k2"], ["y"])],
        initializers=[two(np.ones(2, np.float32), "k"), two(np.ones(2, np.float32), "k2")],
    )
    constant = node("Constant", [], ["const:0"], value=two(np.ones(2, np.float32)))
    other, _ = made(
        [constant, node("Add", ["x", "const:0"], ["Add__7:0"]), node("Mul", ["Add__7:0", "const:0"], ["y"])]
    )
    data = canonical_model(one, "extractor", spec)
    assert data == canonical_model(other, "extractor", spec)
    model = onnx.load_model_from_string(data)
    assert [(n.name, list(n.input), list(n.output)) for n in model.graph.node] == [
        ("add_0", ["x", "constant_0"], ["add_0"]),
        ("mul_1", ["add_0", "constant_0"], ["y"]),
    ]
    assert len(model.graph.initializer) == 1


def test_canonical_form_refuses_what_the_contract_does_not_allow():
    node = onnx.helper.make_node
    model, spec = made([node("Abs", ["x"], ["z"])])
    with pytest.raises(ExportError, match=r"^the extractor graph: nothing computes y$"):
        canonical_model(model, "extractor", spec)
    model, spec = made([node("Gelu", ["x"], ["y"], domain="com.microsoft")])
    with pytest.raises(ExportError, match=r"the operator com\.microsoft\.Gelu, which is not standard ONNX$"):
        canonical_model(model, "extractor", spec)
    info = onnx.helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, ["n", 2])
    body = onnx.helper.make_graph([node("Abs", ["x"], ["b"])], "body", [], [info])
    condition = onnx.numpy_helper.from_array(np.array(True), "c")
    model, spec = made([node("If", ["c"], ["y"], then_branch=body, else_branch=body)], initializers=[condition])
    with pytest.raises(ExportError, match=r"has control flow: If$"):
        canonical_model(model, "extractor", spec)

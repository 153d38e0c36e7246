from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from caption_export import parity
from caption_export.errors import ExportError
from caption_export.graphs import build_graph
from caption_export.parity import BATCH_SIZES, TOLERANCES, Tolerance, verify
from caption_export.pipelines import OnnxPipeline, TensorFlowPipeline, best_captions
from caption_export.structure import check_structure
from caption_rt.options import DecodeOptions

pytestmark = pytest.mark.tf

SEARCHES = [DecodeOptions(max_words=6), DecodeOptions(beam_size=3, max_words=6)]


@pytest.fixture
def check(reference, compared, run):
    """Verify graphs against the run that carries its state."""
    return lambda graphs: verify(reference, graphs, compared, SEARCHES, run.vocabulary)


@pytest.fixture
def spoilt(graphs):
    """The graphs with one of them changed by a function of its ONNX model."""

    def of(name, change):
        model = onnx.load_model_from_string(graphs[name].data)
        change(model)
        return {**graphs, name: replace(graphs[name], data=model.SerializeToString())}

    return of


def change_constant(index, change):
    """Apply a function to the initialiser that the graph's n-th node takes as its second input."""

    def apply(model):
        name = model.graph.node[index].input[1]
        (constant,) = (x for x in model.graph.initializer if x.name == name)
        array = numpy_helper.to_array(constant).copy()
        constant.CopyFrom(numpy_helper.from_array(change(array), name))

    return apply


def one_value(value):
    def change(array):
        array.reshape(-1)[3] = value
        return array

    return change


def node_of(model, kind):
    return next(index for index, node in enumerate(model.graph.node) if node.op_type == kind)


@pytest.mark.parametrize("recurrence", ["carry", "reset"])
def test_exported_graphs_are_equal(reference, graphs, reset_run, reset_graphs, run, compared, recurrence):
    if recurrence == "reset":
        reference, graphs = TensorFlowPipeline(reset_run), reset_graphs
    report = verify(reference, graphs, compared, SEARCHES, run.vocabulary)
    assert report.photos == ("astronaut.jpg", "chelsea.jpg", "coffee.jpg")
    assert report.batch_sizes == (1, 2, 7)
    assert [(tensor.graph, tensor.tensor) for tensor in report.tensors] == [
        ("extractor", "grid"),
        ("encoder", "features"),
        ("encoder", "keys"),
        ("encoder", "initial_state"),
        ("decoder", "log_probs"),
        ("decoder", "next_state"),
        ("decoder", "attention"),
    ]
    for tensor in report.tensors:
        assert tensor.max_difference < 5e-5, tensor
    # Rounding in single precision, and something of it: the two sides are not the same program.
    assert max(tensor.max_difference for tensor in report.tensors) > 0
    assert [(search.options, search.captions) for search in report.searches] == [(options, 3) for options in SEARCHES]
    assert all(search.words > 3 and search.max_difference < 1e-4 for search in report.searches)
    assert [graph.name for graph in report.graphs] == ["extractor", "encoder", "decoder"]
    assert [graph.size for graph in report.graphs] == [len(graph.data) for graph in graphs.values()]
    assert report.graphs[2].nodes == sum(report.graphs[2].operators.values()) == (30 if recurrence == "carry" else 26)
    assert report.tensors[0].tolerance == Tolerance(5e-4, 5e-4)


def test_the_state_from_the_mean_feature_is_the_encoders(graphs, mean_run, compared):
    reference = TensorFlowPipeline(mean_run)
    graphs = {**graphs, "encoder": build_graph(mean_run, "encoder")}
    report = verify(reference, graphs, compared, SEARCHES, mean_run.vocabulary)
    differences = {tensor.tensor: tensor.max_difference for tensor in report.tensors}
    assert 0 < differences["initial_state"] < 1e-6
    assert max(differences.values()) < 5e-5
    grid = reference.run("extractor", {"images": np.stack([photo.pixels for photo in compared])})["grid"]
    state = reference.run("encoder", {"grid": grid})["initial_state"]
    assert state.std(axis=0).min() > 1e-4  # each photo has its own


def test_the_photos_of_these_tests_get_different_captions(reference, compared, run):
    """Otherwise equal words would say little."""
    images = np.stack([photo.pixels for photo in compared])
    for options in SEARCHES:
        captions = best_captions(reference, images, options, run.vocabulary)
        assert len({caption.tokens for caption in captions}) == 3


@pytest.mark.parametrize("batch", [1, 2, 5, 7])
def test_every_graph_takes_any_batch(graphs, reference, compared, batch):
    exported = OnnxPipeline(graphs)
    images = np.stack([photo.pixels for photo in compared])[np.arange(batch) % 3]
    grid = exported.run("extractor", {"images": images})["grid"]
    encoded = exported.run("encoder", {"grid": grid})
    inputs = {"token": np.full(batch, 4), "state": encoded["initial_state"]}
    inputs |= {name: encoded[name] for name in ("features", "keys")}
    found, wanted = (side.run("decoder", inputs) for side in (exported, reference))
    assert (grid.shape, encoded["keys"].shape, found["log_probs"].shape) == (
        (batch, 9, 64),
        (batch, 9, 12),
        (batch, 25),
    )
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-5, rtol=1e-5)


def test_a_changed_weight_of_the_extractor_is_refused(check, spoilt):
    def change(model):
        change_constant(node_of(model, "Conv"), lambda kernel: kernel * 1.05)(model)

    expected = (
        r"^the extractor graph: output grid differs from TensorFlow by up to [0-9.]+ on (astronaut|chelsea|coffee)\.jpg"
        r"; allowed are 0\.0005 \+ 0\.0005 of the value$"
    )
    with pytest.raises(ExportError, match=expected) as caught:
        check(spoilt("extractor", change))
    assert caught.value.exit_code == 8


def test_a_changed_weight_of_the_encoder_is_refused(check, spoilt):
    expected = (
        r"^the encoder graph: output features differs from TensorFlow by up to \S+ on \w+\.jpg; allowed are 0\.0001"
    )
    with pytest.raises(ExportError, match=expected):
        check(spoilt("encoder", change_constant(0, lambda kernel: kernel + np.float32(0.01))))


def test_a_changed_weight_of_the_decoder_is_refused(check, spoilt):
    def change(model):
        last = max(index for index, node in enumerate(model.graph.node) if node.op_type == "MatMul")
        change_constant(last, one_value(2.0))(model)

    with pytest.raises(
        ExportError,
        match=r"^the decoder graph: output log_probs differs from TensorFlow by up to \S+ on \w+\.jpg, word [1-6];",
    ):
        check(spoilt("decoder", change))


def test_a_value_that_is_not_finite_is_refused(check, spoilt):
    with pytest.raises(
        ExportError, match=r"^the encoder graph: output features is not finite in ONNX Runtime on astronaut\.jpg$"
    ):
        check(spoilt("encoder", change_constant(0, one_value(np.inf))))


def test_other_words_are_refused(check, spoilt, monkeypatch):
    """With tolerances that let any value pass, the words still do not."""
    monkeypatch.setattr(parity, "TOLERANCES", dict.fromkeys(TOLERANCES, Tolerance(np.inf, 0)))

    def change(model):
        last = max(index for index, node in enumerate(model.graph.node) if node.op_type == "Add")
        change_constant(last, lambda bias: bias[::-1].copy())(model)

    with pytest.raises(
        ExportError,
        match=r"^astronaut\.jpg gets other words with greedy search: '[a-z ]+' \(-[0-9.]+, (end|max_words)\) from "
        r"TensorFlow, '[a-z ]*' \(-[0-9.]+, (end|max_words)\) from ONNX Runtime$",
    ):
        check(spoilt("decoder", change))


def test_another_log_probability_of_the_same_words_is_refused(check, spoilt, monkeypatch):
    monkeypatch.setattr(parity, "TOLERANCES", dict.fromkeys(TOLERANCES, Tolerance(np.inf, 0)))

    def change(model):
        last = max(index for index, node in enumerate(model.graph.node) if node.op_type == "Add")
        change_constant(last, lambda bias: bias * np.float32(1.005))(model)

    with pytest.raises(ExportError, match=r"^astronaut\.jpg: the caption's log-probability with greedy search is -"):
        check(spoilt("decoder", change))


def test_without_a_photo_nothing_is_verified(reference, graphs, run):
    with pytest.raises(ExportError, match=r"^there is no photo to compare"):
        verify(reference, graphs, [], SEARCHES, run.vocabulary)


def rename_output(model):
    for node in model.graph.node:
        node.output[:] = ["context" if name == "attention" else name for name in node.output]
        node.input[:] = ["context" if name == "attention" else name for name in node.input]
    model.graph.output[2].name = "context"


def fix_batch(model):
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def other_places(model):
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 4


def other_dtype(model):
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT32


def external(model):
    constant = model.graph.initializer[0]
    constant.data_location = TensorProto.EXTERNAL
    constant.external_data.add(key="location", value="/etc/passwd")


def other_opset(model):
    model.opset_import[0].version = 17


def second_opset(model):
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def custom_operator(model):
    model.graph.node[0].domain = "com.example"


def training_operator(model):
    node = helper.make_node("Dropout", ["features"], ["unused"], name="dropout_0")
    model.graph.node.append(node)


def control_flow(model):
    body = helper.make_graph([], "body", [], [])
    model.graph.node.append(helper.make_node("If", ["c"], ["unused"], name="if_0", then_branch=body, else_branch=body))


def invalid(model):
    model.graph.node[0].input[0] = "nowhere"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "decoder",
            rename_output,
            r"the decoder graph has the outputs log_probs, next_state, context, not log_probs, next_state, attention",
        ),
        (
            "extractor",
            fix_batch,
            "the extractor graph: input images: the first axis is fixed at 1, but must take any number",
        ),
        (
            "encoder",
            other_places,
            r"the encoder graph: output features has the axes \['n', 4, 10\], not \['n', 9, 10\]",
        ),
        ("decoder", other_dtype, "the decoder graph: input token is int32, not int64"),
        ("encoder", external, "the encoder graph keeps the data of constant_0 outside the file"),
        ("encoder", other_opset, r"the encoder graph uses the operator sets \{'': 17\}, not ONNX's own 18 alone"),
        ("encoder", second_opset, r"the encoder graph uses the operator sets \{'': 18, 'com.microsoft': 1\}, not .*"),
        (
            "encoder",
            custom_operator,
            r"the encoder graph: node matmul_0 \(MatMul\) is of the domain com.example, not .*",
        ),
        ("encoder", training_operator, r"the encoder graph: node dropout_0 \(Dropout\) is left over from training"),
        ("encoder", control_flow, r"the encoder graph: node if_0 \(If\) is control flow"),
        ("encoder", invalid, "the encoder graph is not valid ONNX: .*nowhere.*"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_graph_of_another_structure_is_refused(check, spoilt, name, change, message):
    with pytest.raises(ExportError, match=rf"(?s)^{message}$"):
        check(spoilt(name, change))


def test_what_is_no_graph_is_refused(graphs):
    with pytest.raises(ExportError, match=r"^the encoder graph is not an ONNX model: "):
        check_structure(replace(graphs["encoder"], data=b"\xff\xff not a protobuf"))


def test_a_batch_that_is_fixed_inside_is_refused(check, spoilt):
    """The declared axes are right, but a reshape in the middle allows one photo only."""

    def change(model):
        index = node_of(model, "Reshape")
        constant = numpy_helper.from_array(np.array([1, 9, 64], np.int64), "shape")
        model.graph.initializer.append(constant)
        model.graph.node[index].input[1] = "shape"

    expected = r"^the extractor graph cannot be opened: extractor\.onnx: the output grid is .* \[1, 9, 64\]"
    with pytest.raises(ExportError, match=expected):
        check(spoilt("extractor", change))


def test_a_graph_that_takes_even_batches_alone_is_refused(check, spoilt):
    """Nothing but a run with a batch of 1 shows it."""

    def change(model):
        for name, shape in (("pairs", [-1, 2, 9, 64]), ("single", [-1, 9, 64])):
            model.graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), name))
        model.graph.node[0].input[0] = "again"
        model.graph.node.insert(0, helper.make_node("Reshape", ["grid", "pairs"], ["paired"], name="a"))
        model.graph.node.insert(1, helper.make_node("Reshape", ["paired", "single"], ["again"], name="b"))

    with pytest.raises(ExportError, match=r"^the encoder graph fails with a first axis of 1: ONNX Runtime failed in "):
        check(spoilt("encoder", change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda grid: grid[:, :8], r"float32 \[1, 8, 64\], not float32 \[1, 9, 64\]"),
        (lambda grid: grid.astype(np.float16), r"float16 \[1, 9, 64\], not float32 \[1, 9, 64\]"),
    ],
    ids=["shape", "dtype"],
)
def test_outputs_of_another_shape_or_dtype_are_refused(check, graphs, monkeypatch, change, message):
    """ONNX Runtime sees most of this when it loads a graph; the arrays are looked at all the same."""

    class Other(OnnxPipeline):
        def run(self, graph, inputs):
            outputs = super().run(graph, inputs)
            return {"grid": change(outputs["grid"])} if graph == "extractor" else outputs

    monkeypatch.setattr(parity, "OnnxPipeline", Other)
    with pytest.raises(ExportError, match=rf"^the extractor graph: output grid is {message}$"):
        check(graphs)


def test_all_photos_go_through_the_largest_batch(reference, graphs, compared, run, monkeypatch):
    """A graph that is wrong on one photo alone, the eighth of eight, does not pass."""
    photos = [replace(compared[0], name=f"{i}.jpg") for i in range(7)] + [replace(compared[1], name="last.jpg")]

    class WrongOnLast(OnnxPipeline):
        def run(self, graph, inputs):
            outputs = dict(super().run(graph, inputs))
            if graph == "extractor":
                wrong = (inputs["images"] == photos[-1].pixels).all(axis=(1, 2, 3))
                outputs["grid"] = outputs["grid"] + wrong[:, None, None].astype(np.float32)
            return outputs

    monkeypatch.setattr(parity, "OnnxPipeline", WrongOnLast)
    assert BATCH_SIZES[-1] < len(photos)
    with pytest.raises(ExportError, match=r"^the extractor graph: output grid differs .* by up to 1 on last\.jpg;"):
        verify(reference, graphs, photos, SEARCHES, run.vocabulary)

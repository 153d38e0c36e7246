"""A residual extractor in 8 bits: its sums are in 8 bits as well, or half of its time would go to turning numbers."""

from types import SimpleNamespace

import keras
import numpy as np
import onnx
import pytest

from caption_export.calibration import observe
from caption_export.graphs import ExportedGraph, _convert, _extractor
from caption_export.int8 import last_nodes, quantise
from caption_export.reduced import sqnr
from caption_rt.bundle import GraphSpec, TensorSpec
from caption_rt.engine import Graph
from caption_train.inception import ExtractorConfig, build_extractor

pytestmark = pytest.mark.tf

SIZE = 75


@pytest.fixture(scope="module")
def graph() -> ExportedGraph:
    keras.utils.set_random_seed(2)
    extractor = build_extractor(ExtractorConfig(0.25, SIZE, "stage3"))
    rows, columns, channels = extractor.output_shape[1:]
    images = TensorSpec("images", "uint8", ("n", SIZE, SIZE, 3))
    spec = GraphSpec("extractor.onnx", (images,), (TensorSpec("grid", "float32", ("n", rows * columns, channels)),))
    function = _extractor(SimpleNamespace(extractor=extractor))
    return ExportedGraph("extractor", _convert("extractor", function, spec), spec)


def photos(seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (16, 5, 5, 3), np.uint8)
    return noise.repeat(SIZE // 5, axis=1).repeat(SIZE // 5, axis=2)


def test_sums_are_in_8_bits(graph: ExportedGraph) -> None:
    reduced = quantise(graph, observe(graph, [[photos(0)]]), "min-max", last_nodes(graph))
    nodes = onnx.load_model_from_string(reduced.data).graph.node
    made_by = {name: node for node in nodes for name in node.output}
    sums = [node for node in nodes if node.op_type == "Add" and {*node.input} <= made_by.keys()]
    assert len(sums) == 10  # one a block
    for node in sums:
        assert [made_by[name].op_type for name in node.input] == ["DequantizeLinear"] * 2
    wanted, found = (Graph(x.data, x.spec).run(photos(1))[0] for x in (graph, reduced))
    assert sqnr(wanted, found) > 20

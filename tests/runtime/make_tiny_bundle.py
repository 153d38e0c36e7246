"""Makes the tiny bundle that the runtime's tests run on: a real captioner of a few kB, without TensorFlow.

    python tests/runtime/make_tiny_bundle.py tests/data/tiny_bundle

The network has the structure of the full one (grid, attention, GRU, words) with few and odd sizes: the grid has more
columns than rows, and the special ids are not 0 to 3, so that code which mixes them up fails. It is written down twice:
as ONNX graphs, and in NumPy (`Network`), from which the self-test's expected values and the tests' references come.
Weights are multiples of 1/64 from a frozen generator, and PNG and ONNX bytes do not depend on library versions, so that
every run gives the same files.
"""

import base64
import json
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from caption_rt.bundle import (
    GRAPH_TENSORS,
    DecodingSpec,
    GraphSpec,
    GridSpec,
    ImageSpec,
    TensorSpec,
    write_bundle,
)
from caption_rt.vocabulary import Vocabulary

SIZE, ROWS, COLUMNS, CHANNELS = 32, 2, 3, 5
PLACES = ROWS * COLUMNS
KERNEL = (16, 10)  # 32 px give 2 rows and 3 columns of kernels that do not overlap
FEATURES, KEYS, UNITS, EMBEDDING = 6, 4, 7, 3
WORDS = (
    *("a", "<end>", "cat", "dog", "<pad>", "sits", "on", "the", "<start>", "grass", "runs", "<unk>"),
    *("with", "red", "ball", "in"),
)
MAX_WORDS = 8

Array = NDArray[Any]


def _weights() -> dict[str, Array]:
    # RandomState's streams are frozen by NumPy's policy, unlike those of default_rng.
    random = np.random.RandomState(20)

    def draw(scale: float, *shape: int) -> Array:
        return (np.round(random.normal(0, scale, shape) * 64) / 64).astype(np.float32)

    return {
        "filters": draw(0.12, CHANNELS, 3, *KERNEL),
        "filter_bias": draw(0.1, CHANNELS),
        "fc": draw(0.8, CHANNELS, FEATURES),
        "fc_bias": draw(0.2, FEATURES),
        "w1": draw(0.8, FEATURES, KEYS),
        "initial": draw(0.8, FEATURES, UNITS),
        "w2": draw(0.8, UNITS, KEYS),
        "v": draw(1.5, KEYS, 1),
        "embedding": draw(1.0, len(WORDS), EMBEDDING),
        "gates_in": draw(0.9, FEATURES + EMBEDDING, 3 * UNITS),
        "gates_state": draw(0.9, UNITS, 3 * UNITS),
        "gates_bias": draw(0.2, 3 * UNITS),
        "out": draw(1.2, UNITS, len(WORDS)),
        "out_bias": draw(0.3, len(WORDS)),
    }


class Network:
    """The tiny network in NumPy, in float64, one photo and one word at a time: the reference of the tests."""

    def __init__(self) -> None:
        self.weights = {name: array.astype(np.float64) for name, array in _weights().items()}

    def grid(self, image: Array) -> Array:
        """The grid [P, C] of a photo, uint8 [S, S, 3]."""
        scaled = image.astype(np.float64) / 127.5 - 1
        height, width = KERNEL
        places = []
        for row in range(ROWS):
            for column in range(COLUMNS):
                patch = scaled[row * height : (row + 1) * height, column * width : (column + 1) * width]
                places.append(np.einsum("ckhw,hwk->c", self.weights["filters"], patch))
        return np.tanh(np.array(places) + self.weights["filter_bias"])

    def encode(self, grid: Array) -> tuple[Array, Array, Array]:
        """Features [P, E], keys [P, A] and initial state [U] of a grid."""
        features = np.maximum(grid @ self.weights["fc"] + self.weights["fc_bias"], 0)
        return features, features @ self.weights["w1"], np.tanh(features.mean(axis=0) @ self.weights["initial"])

    def step(self, token: int, state: Array, features: Array, keys: Array) -> tuple[Array, Array, Array]:
        """Log-probabilities [V], next state [U] and attention [P] after a token."""
        weights = self.weights
        scores = (np.tanh(keys + state @ weights["w2"]) @ weights["v"])[:, 0]
        attention = np.exp(scores - scores.max())
        attention /= attention.sum()
        given = np.concatenate([attention @ features, weights["embedding"][token]])
        update, reset, new = np.split(given @ weights["gates_in"] + weights["gates_bias"], 3)
        state_update, state_reset, state_new = np.split(state @ weights["gates_state"], 3)
        gate = 1 / (1 + np.exp(-(update + state_update)))
        candidate = np.tanh(new + state_new / (1 + np.exp(-(reset + state_reset))))
        next_state = gate * state + (1 - gate) * candidate
        logits = next_state @ weights["out"] + weights["out_bias"]
        return logits - np.log(np.exp(logits).sum()), next_state, attention

    def greedy(self, image: Array, max_words: int = MAX_WORDS) -> dict[str, Any]:
        """The greedy caption of a photo: token ids, log-probabilities, attention [words, P] and whether it ended."""
        vocabulary = Vocabulary(WORDS)
        features, keys, state = self.encode(self.grid(image))
        token, tokens, word_log_probs, attentions, log_prob = vocabulary.start_id, [], [], [], 0.0
        for _ in range(max_words):
            log_probs, state, attention = self.step(token, state, features, keys)
            log_probs[[vocabulary.pad_id, vocabulary.start_id, vocabulary.unk_id]] = -np.inf
            token = int(log_probs.argmax())
            log_prob += float(log_probs[token])
            if token == vocabulary.end_id:
                break
            tokens.append(token)
            word_log_probs.append(float(log_probs[token]))
            attentions.append(attention)
        return {
            "token_ids": tokens,
            "log_prob": log_prob,
            "word_log_probs": word_log_probs,
            "attention": np.array(attentions).reshape(-1, PLACES),
            "ended": token == vocabulary.end_id,
        }


def _graph(name: str, nodes: list[onnx.NodeProto], spec: GraphSpec, constants: dict[str, Array]) -> bytes:
    types = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT, "int64": TensorProto.INT64}

    def infos(tensors: tuple[TensorSpec, ...]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(t.name, types[t.dtype], list(t.shape)) for t in tensors]

    initializers = [numpy_helper.from_array(array, constant) for constant, array in constants.items()]
    graph = helper.make_graph(nodes, name, infos(spec.inputs), infos(spec.outputs), initializers)
    # Both versions are stated, because the defaults grow with the onnx package.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8, producer_name="tiny")
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


def _specs() -> dict[str, GraphSpec]:
    sizes: dict[str, tuple[str, list[int]]] = {
        "images": ("uint8", [SIZE, SIZE, 3]),
        "grid": ("float32", [PLACES, CHANNELS]),
        "features": ("float32", [PLACES, FEATURES]),
        "keys": ("float32", [PLACES, KEYS]),
        "initial_state": ("float32", [UNITS]),
        "token": ("int64", []),
        "state": ("float32", [UNITS]),
        "log_probs": ("float32", [len(WORDS)]),
        "next_state": ("float32", [UNITS]),
        "attention": ("float32", [PLACES]),
    }

    def tensors(names: tuple[str, ...], axis: str) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name, sizes[name][0], (axis, *sizes[name][1])) for name in names)

    return {
        graph: GraphSpec(
            f"{graph}.onnx",
            tensors(inputs, "m" if graph == "decoder" else "n"),
            tensors(outputs, "m" if graph == "decoder" else "n"),
        )
        for graph, (inputs, outputs) in GRAPH_TENSORS.items()
    }


def _int64(*values: int) -> Array:
    return np.array(values, dtype=np.int64)


def _extractor(spec: GraphSpec, weights: dict[str, Array]) -> bytes:
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "scale"], ["scaled"]),
        helper.make_node("Sub", ["scaled", "one"], ["centred"]),
        helper.make_node("Transpose", ["centred"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "filters", "filter_bias"], ["seen"], kernel_shape=KERNEL, strides=KERNEL),
        helper.make_node("Tanh", ["seen"], ["bounded"]),
        helper.make_node("Transpose", ["bounded"], ["places"], perm=[0, 2, 3, 1]),
        helper.make_node("Reshape", ["places", "grid_shape"], ["grid"]),
    ]
    constants = {name: weights[name] for name in ("filters", "filter_bias")}
    constants |= {"scale": np.array(1 / 127.5, np.float32), "one": np.array(1, np.float32)}
    constants |= {"grid_shape": _int64(-1, PLACES, CHANNELS)}
    return _graph("extractor", nodes, spec, constants)


def _encoder(spec: GraphSpec, weights: dict[str, Array]) -> bytes:
    nodes = [
        helper.make_node("MatMul", ["grid", "fc"], ["dense"]),
        helper.make_node("Add", ["dense", "fc_bias"], ["biased"]),
        helper.make_node("Relu", ["biased"], ["features"]),
        helper.make_node("MatMul", ["features", "w1"], ["keys"]),
        helper.make_node("ReduceMean", ["features", "place_axis"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "initial"], ["unbounded"]),
        helper.make_node("Tanh", ["unbounded"], ["initial_state"]),
    ]
    constants = {name: weights[name] for name in ("fc", "fc_bias", "w1", "initial")} | {"place_axis": _int64(1)}
    return _graph("encoder", nodes, spec, constants)


def _decoder(spec: GraphSpec, weights: dict[str, Array]) -> bytes:
    nodes = [
        helper.make_node("MatMul", ["state", "w2"], ["query"]),
        helper.make_node("Unsqueeze", ["query", "place_axis"], ["query_row"]),
        helper.make_node("Add", ["keys", "query_row"], ["sums"]),
        helper.make_node("Tanh", ["sums"], ["energies"]),
        helper.make_node("MatMul", ["energies", "v"], ["score_column"]),
        helper.make_node("Squeeze", ["score_column", "last_axis"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["attention"], axis=-1),
        helper.make_node("Unsqueeze", ["attention", "place_axis"], ["attention_row"]),
        helper.make_node("MatMul", ["attention_row", "features"], ["context_row"]),
        helper.make_node("Squeeze", ["context_row", "place_axis"], ["context"]),
        helper.make_node("Gather", ["embedding", "token"], ["word"]),
        helper.make_node("Concat", ["context", "word"], ["given"], axis=1),
        helper.make_node("MatMul", ["given", "gates_in"], ["gates_given"]),
        helper.make_node("Add", ["gates_given", "gates_bias"], ["gates_biased"]),
        helper.make_node("Split", ["gates_biased"], ["update", "reset", "new"], axis=1, num_outputs=3),
        helper.make_node("MatMul", ["state", "gates_state"], ["gates_of_state"]),
        helper.make_node(
            "Split", ["gates_of_state"], ["state_update", "state_reset", "state_new"], axis=1, num_outputs=3
        ),
        helper.make_node("Add", ["update", "state_update"], ["update_sum"]),
        helper.make_node("Sigmoid", ["update_sum"], ["gate"]),
        helper.make_node("Add", ["reset", "state_reset"], ["reset_sum"]),
        helper.make_node("Sigmoid", ["reset_sum"], ["reset_gate"]),
        helper.make_node("Mul", ["reset_gate", "state_new"], ["kept_new"]),
        helper.make_node("Add", ["new", "kept_new"], ["new_sum"]),
        helper.make_node("Tanh", ["new_sum"], ["candidate"]),
        # gate * state + (1 - gate) * candidate
        helper.make_node("Sub", ["state", "candidate"], ["difference"]),
        helper.make_node("Mul", ["gate", "difference"], ["kept"]),
        helper.make_node("Add", ["kept", "candidate"], ["next_state"]),
        helper.make_node("MatMul", ["next_state", "out"], ["raw_logits"]),
        helper.make_node("Add", ["raw_logits", "out_bias"], ["logits"]),
        helper.make_node("LogSoftmax", ["logits"], ["log_probs"], axis=-1),
    ]
    names = ("w2", "v", "embedding", "gates_in", "gates_state", "gates_bias", "out", "out_bias")
    constants = {name: weights[name] for name in names} | {"place_axis": _int64(1), "last_axis": _int64(-1)}
    return _graph("decoder", nodes, spec, constants)


def selftest_images() -> dict[str, Array]:
    """Photos of the self-test, uint8 [S, S, 3]: two patterns, already of the size of the network's input."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    slope = np.stack([rows * 8, columns * 8, 255 - rows * 4 - columns * 4], axis=-1)
    board = np.where(((rows // 8 + columns // 8) % 2 == 0)[..., None], [250, 40, 10], [0, 90, 220])
    return {"slope": slope.astype(np.uint8), "board": board.astype(np.uint8)}


def _png(image: Array) -> bytes:
    """A PNG file of an image, uncompressed, so that its bytes do not depend on a version of zlib."""
    raw = b"".join(b"\0" + row.tobytes() for row in image)
    stored = (
        b"\x78\x01\x01" + struct.pack("<HH", len(raw), len(raw) ^ 0xFFFF) + raw + struct.pack(">I", zlib.adler32(raw))
    )

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", stored) + chunk(b"IEND", b"")


def _selftest() -> dict[str, Any]:
    network = Network()
    inputs, expected = [], []
    for name, image in selftest_images().items():
        result = network.greedy(image)
        inputs.append({"name": name, "png_base64": base64.b64encode(_png(image)).decode()})
        expected.append(
            {
                "token_ids": result["token_ids"],
                "log_prob": round(result["log_prob"], 6),
                "word_log_probs": [round(value, 6) for value in result["word_log_probs"]],
            }
        )
    options = {"beam_size": 1, "length_penalty": 0.0, "max_words": MAX_WORDS}
    return {"inputs": inputs, "expected": expected, "options": options, "tolerance": {"log_prob": 1e-3}}


def make(folder: Path) -> None:
    """Write the tiny bundle into a folder, over one that is there."""
    specs, weights, vocabulary = _specs(), _weights(), Vocabulary(WORDS)
    readme = "# tiny\n\nA captioner with random weights made by a script of the tests. Its captions mean nothing.\n"
    write_bundle(
        folder,
        name="tiny",
        description="A captioner of a few kB with random weights, for tests.",
        license="Apache-2.0",
        precisions={"fp32": specs},
        image=ImageSpec(SIZE),
        grid=GridSpec(ROWS, COLUMNS, CHANNELS),
        recurrence="carry",
        special_ids=vocabulary.special_ids,
        decoding=DecodingSpec(beam_size=1, length_penalty=0.0, max_words=MAX_WORDS),
        training={"data": "none: random weights"},
        scores={},
        versions={"make_tiny_bundle": "1"},
        contents={
            "extractor.onnx": _extractor(specs["extractor"], weights),
            "encoder.onnx": _encoder(specs["encoder"], weights),
            "decoder.onnx": _decoder(specs["decoder"], weights),
            "vocabulary.json": (json.dumps(vocabulary.to_json(), indent=1) + "\n").encode(),
            "selftest.json": (json.dumps(_selftest(), indent=1) + "\n").encode(),
            "README.md": readme.encode(),
        },
        overwrite=True,
    )


if __name__ == "__main__":
    make(Path(sys.argv[1]))

"""Checkpoint to ONNX: the three graphs of a bundle, through tf2onnx.

Encoder and decoder are written down here a second time, from the weights, as the device should compute them: no shape
arithmetic around a dense layer, matrix products on the same input joined, what is linear folded. That they compute what
`caption_train.model` computes is for `caption_export.parity` to show, which runs the one against the other.

Shapes in comments: n photos, m rows, P places, C channels, E features, A attention units, U GRU units, V words.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tf2onnx import convert

from caption_export.canonical import OPSET, canonical_model
from caption_export.errors import ExportError
from caption_rt.bundle import GRAPH_TENSORS, GraphSpec, TensorSpec
from caption_train.runs import Run

logger = logging.getLogger(__name__)

Function = Callable[..., dict[str, tf.Tensor]]
"""Input tensors in the order of the specification to output tensors by name."""


@dataclass(frozen=True)
class ExportedGraph:
    """One graph of the bundle."""

    name: str
    """"extractor", "encoder" or "decoder"."""
    data: bytes
    """The serialised ONNX model."""
    spec: GraphSpec
    """File name and tensors, as the manifest states them."""


def build_graphs(run: Run) -> dict[str, ExportedGraph]:
    """Convert a run's networks.

    Args:
        run: Extractor, model and vocabulary.

    Returns:
        The three graphs by name. The same run gives the same bytes.

    Raises:
        ExportError: The parts do not fit each other, or something in them has no standard ONNX operator.
    """
    graph_specs(run)  # what does not fit is said before the first conversion
    return {name: build_graph(run, name) for name in GRAPH_TENSORS}


def build_graph(run: Run, name: str) -> ExportedGraph:
    """Convert one of a run's networks.

    Args:
        run: Extractor, model and vocabulary.
        name: "extractor", "encoder" or "decoder".

    Raises:
        ExportError: As for `build_graphs`.
    """
    spec = graph_specs(run)[name]
    logger.info("converting the %s", name)
    makers = {"extractor": _extractor, "encoder": _encoder, "decoder": _decoder}
    return ExportedGraph(name, _convert(name, makers[name](run), spec), spec)


def graph_specs(run: Run) -> dict[str, GraphSpec]:
    """The tensors of the three graphs, from the run's sizes alone.

    Raises:
        ExportError: The extractor's grid or the vocabulary is not of the size that the model takes.
    """
    rows, columns, channels = run.extractor.output_shape[1:]
    config, size = run.model.config, run.extractor_config.size
    if (rows * columns, channels) != (config.places, config.channels):
        raise ExportError(
            f"the extractor gives {rows}x{columns} places of {channels} channels, but the model was made for "
            f"{config.places} places of {config.channels}"
        )
    if len(run.vocabulary) != config.vocabulary_size:
        raise ExportError(
            f"the vocabulary has {len(run.vocabulary)} words, but the model was made for {config.vocabulary_size}"
        )
    places, units = config.places, config.units

    def floats(name: str, *shape: int | str) -> TensorSpec:
        return TensorSpec(name, "float32", shape)

    return {
        "extractor": GraphSpec(
            "extractor.onnx",
            (TensorSpec("images", "uint8", ("n", size, size, 3)),),
            (floats("grid", "n", places, channels),),
        ),
        "encoder": GraphSpec(
            "encoder.onnx",
            (floats("grid", "n", places, channels),),
            (
                floats("features", "n", places, config.embedding_dim),
                floats("keys", "n", places, units),
                floats("initial_state", "n", units),
            ),
        ),
        "decoder": GraphSpec(
            "decoder.onnx",
            (
                TensorSpec("token", "int64", ("m",)),
                floats("state", "m", units),
                floats("features", "m", places, config.embedding_dim),
                floats("keys", "m", places, units),
            ),
            (
                floats("log_probs", "m", config.vocabulary_size),
                floats("next_state", "m", units),
                floats("attention", "m", places),
            ),
        ),
    }


def _extractor(run: Run) -> Function:
    rows, columns, channels = run.extractor.output_shape[1:]

    def extractor(images: tf.Tensor) -> dict[str, tf.Tensor]:
        grid = run.extractor(tf.cast(images, tf.float32), training=False)  # [n, rows, columns, C]
        return {"grid": tf.reshape(grid, (-1, rows * columns, channels))}

    return extractor


def _encoder(run: Run) -> Function:
    model = run.model
    kernel, bias = model.encoder.fc.get_weights()
    key_kernel, key_bias = model.decoder.attention.W1.get_weights()

    def encoder(grid: tf.Tensor) -> dict[str, tf.Tensor]:
        # A Keras layer would do the same with a reshape and its shape arithmetic on either side.
        features = tf.nn.relu(tf.matmul(grid, kernel) + bias)  # [n, P, E]
        keys = tf.matmul(features, key_kernel) + key_bias  # [n, P, A]
        # The model's own rule, whichever it is.
        return {"features": features, "keys": keys, "initial_state": model.decoder.first_state(features)}

    return encoder


def _decoder(run: Run) -> Function:
    """One word. The GRU is that of Cho et al. 2014 with the reset gate after the product (Keras' reset_after)."""
    decoder, config = run.model.decoder, run.model.config
    units, carry = config.units, config.recurrence == "carry"
    (embedding,) = decoder.embedding.get_weights()  # [V, E]
    query_kernel, query_bias = decoder.attention.W2.get_weights()  # [U, A]
    score_kernel, _ = decoder.attention.V.get_weights()  # [A, 1]; the softmax after it takes no notice of a bias
    kernel, recurrent_kernel, (bias, recurrent_bias) = decoder.gru.get_weights()  # [2E, 3U], [U, 3U]: z, r, candidate
    # The update and reset gates only ever see the sum of their two biases; the candidate's stands within the reset.
    gates_bias = bias + np.concatenate([recurrent_bias[: 2 * units], np.zeros(units, np.float32)])
    candidate_bias = recurrent_bias[2 * units :]
    # Query and recurrent products have the same input: one product. (With "reset", zeros go into the latter.)
    state_kernel = np.concatenate([query_kernel, recurrent_kernel], axis=1)
    state_bias = np.concatenate([query_bias, np.zeros(2 * units, np.float32), candidate_bias])
    head_kernel, head_bias = fold_dense(decoder.fc1.get_weights(), decoder.fc2.get_weights())

    def decode(token: tf.Tensor, state: tf.Tensor, features: tf.Tensor, keys: tf.Tensor) -> dict[str, tf.Tensor]:
        if carry:
            from_state = tf.matmul(state, state_kernel) + state_bias
            query, state_z, state_r, state_h = tf.split(from_state, [query_kernel.shape[1], *[units] * 3], axis=1)
        else:
            query, state_h = tf.matmul(state, query_kernel) + query_bias, candidate_bias
        scores = tf.matmul(tf.tanh(keys + tf.expand_dims(query, 1)), score_kernel)  # [m, P, 1]
        attention = tf.nn.softmax(tf.squeeze(scores, axis=2))  # [m, P]
        context = tf.squeeze(tf.matmul(tf.expand_dims(attention, 1), features), axis=1)  # [m, E]
        inputs = tf.concat([context, tf.gather(embedding, token)], axis=1)  # [m, 2E]
        z, r, h = tf.split(tf.matmul(inputs, kernel) + gates_bias, 3, axis=1)
        if carry:
            z, r = z + state_z, r + state_r
        candidate = tf.tanh(h + tf.sigmoid(r) * state_h)
        z = tf.sigmoid(z)
        next_state = candidate + z * (state - candidate) if carry else candidate - z * candidate
        log_probs = tf.nn.log_softmax(tf.matmul(next_state, head_kernel) + head_bias)
        return {"log_probs": log_probs, "next_state": next_state, "attention": attention}

    return decode


def fold_dense(
    first: list[NDArray[np.float32]], second: list[NDArray[np.float32]]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Two dense layers with nothing between them as one; folded in double precision, so nothing is lost.

    Args:
        first: Kernel float32 [a, b] and bias [b].
        second: Kernel float32 [b, c] and bias [c].

    Returns:
        Kernel float32 [a, c] and bias [c].
    """
    (k1, b1), (k2, b2) = ([np.asarray(x, np.float64) for x in layer] for layer in (first, second))
    return (k1 @ k2).astype(np.float32), (b1 @ k2 + b2).astype(np.float32)


def _convert(name: str, function: Function, spec: GraphSpec) -> bytes:
    signature = [
        tf.TensorSpec((None, *tensor.shape[1:]), tf.dtypes.as_dtype(tensor.dtype), name=tensor.name)
        for tensor in spec.inputs
    ]
    try:
        model, _ = convert.from_function(
            tf.function(function, input_signature=signature), input_signature=signature, opset=OPSET
        )
    # tf2onnx has no error type of its own: an operator it cannot convert comes as whatever it stumbles over.
    except Exception as exc:
        raise ExportError(f"the {name} cannot be converted to ONNX: {type(exc).__name__}: {exc}") from exc
    return canonical_model(model, name, spec)

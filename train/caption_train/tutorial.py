"""Checkpoints of TensorFlow's image-captioning tutorial: its model and its tokenizer, as a run of this project.

The tutorial saves ``tf.train.Checkpoint(encoder=…, decoder=…, optimizer=…)``. Its variables are found by the names of
the attributes that lead to them, which stand in the checkpoint's object graph (trackable_object_graph.proto), and not
by their keys: those name one of the ways to a variable, and which one differs between Keras 2 and 3.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph

from caption_rt.vocabulary import END, PAD, START, UNK, Vocabulary
from caption_train.checkpoints import latest_checkpoint, plain_path
from caption_train.errors import TrainingError, first_line
from caption_train.model import CaptionModel

logger = logging.getLogger(__name__)

__all__ = ["Tutorial", "fill_model", "read_tutorial"]

# E: features, embedding; U: units; V: words; C: channels of the grid.
_SHAPES = {
    "encoder/fc/kernel": "CE",
    "encoder/fc/bias": "E",
    "decoder/embedding/embeddings": "VE",
    "decoder/gru/cell/kernel": "2E,3U",
    "decoder/gru/cell/recurrent_kernel": "U,3U",
    "decoder/gru/cell/bias": "2,3U",
    "decoder/fc1/kernel": "UU",
    "decoder/fc1/bias": "U",
    "decoder/fc2/kernel": "UV",
    "decoder/fc2/bias": "V",
    "decoder/attention/W1/kernel": "EU",
    "decoder/attention/W1/bias": "U",
    "decoder/attention/W2/kernel": "UU",
    "decoder/attention/W2/bias": "U",
    "decoder/attention/V/kernel": "U1",
    "decoder/attention/V/bias": "1",
}
_UNREADABLE = (tf.errors.OpError, LookupError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Tutorial:
    """What somebody who ran the tutorial has."""

    weights: Mapping[str, NDArray[np.float32]]
    """The variables by their names, such as "decoder/fc2/kernel"; rows of words in the order of `vocabulary`."""
    vocabulary: Vocabulary
    """The tokenizer's words with their ids, those of rows that are left out moved up."""
    channels: int
    """Channels of the grid, 2048 for InceptionV3's last block."""
    embedding_dim: int
    """Size of a word's embedding and of a place's features."""
    units: int
    """Units of GRU, attention and first output layer."""
    checkpoint: str
    """The checkpoint's own name, such as "ckpt-4"."""


def read_tutorial(checkpoint: Path, tokenizer: Path) -> Tutorial:
    """Read a checkpoint and the tokenizer that belongs to it.

    Args:
        checkpoint: ``ckpt-4``, one of its files, or the folder of a CheckpointManager, whose last one is taken.
        tokenizer: What ``tokenizer.to_json()`` gave.

    Raises:
        TrainingError: One cannot be read, is of something else, or they do not belong together.
    """
    prefix = _prefix(checkpoint)
    weights, sizes = _read_weights(prefix)
    words, rows = _words(tokenizer, sizes["V"])
    left_out = sizes["V"] - len(rows)
    if left_out:
        logger.info("%d of %d words are no words that can be printed, and are left out", left_out, sizes["V"])
    chosen = {
        "decoder/embedding/embeddings": weights["decoder/embedding/embeddings"][rows],
        "decoder/fc2/kernel": weights["decoder/fc2/kernel"][:, rows],
        "decoder/fc2/bias": weights["decoder/fc2/bias"][rows],
    }
    return Tutorial(weights | chosen, Vocabulary(tuple(words)), sizes["C"], sizes["E"], sizes["U"], prefix.name)


def fill_model(model: CaptionModel, tutorial: Tutorial) -> None:
    """Put the weights into a model of the same sizes.

    Args:
        model: Its weights are replaced.
        tutorial: What was read.
    """
    for name, value in tutorial.weights.items():
        target: Any = model
        for part in name.split("/"):
            target = getattr(target, part)
        target.assign(value)


def _read_weights(prefix: Path) -> tuple[dict[str, NDArray[np.float32]], dict[str, int]]:
    """The model's variables by name, and its sizes by letter."""
    try:
        with plain_path(str(prefix)) as plain:
            reader = tf.train.load_checkpoint(plain)
            if not reader.has_tensor("_CHECKPOINTABLE_OBJECT_GRAPH"):
                raise TrainingError(f"{prefix} is no checkpoint of tf.train.Checkpoint: it has no object graph")
            graph = TrackableObjectGraph.FromString(reader.get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH"))
            weights = {}
            for name in _SHAPES:
                key = _key(graph, name)
                if key is None:
                    raise TrainingError(f"the checkpoint {prefix} has no {name}: it is not of the tutorial's model")
                weights[name] = np.asarray(reader.get_tensor(key))
                if not np.isfinite(weights[name]).all():
                    raise TrainingError(
                        f"the checkpoint {prefix} is of a training that failed: {name} holds values that are no "
                        "numbers; take an earlier one"
                    )
    except _UNREADABLE as exc:
        raise exc if isinstance(exc, TrainingError) else _unreadable(prefix, exc) from exc
    return weights, _sizes(prefix, weights)


def _unreadable(prefix: Path, exc: BaseException) -> TrainingError:
    return TrainingError(f"the checkpoint {prefix} cannot be read: {first_line(exc)}")


def _prefix(checkpoint: Path) -> Path:
    """A checkpoint without the endings of its files."""
    if checkpoint.is_dir():
        latest = latest_checkpoint(checkpoint)
        if latest is None:
            raise TrainingError(f"the folder {checkpoint} holds no checkpoint: name one, such as {checkpoint}/ckpt-1")
        return Path(latest)
    prefix = checkpoint
    if checkpoint.suffix == ".index" or checkpoint.suffix.startswith(".data-"):
        prefix = checkpoint.with_suffix("")
    if not prefix.with_name(f"{prefix.name}.index").is_file():
        raise TrainingError(f"there is no checkpoint {prefix}: it would have a file {prefix.name}.index")
    return prefix


def _key(graph: TrackableObjectGraph, name: str) -> str | None:
    """The key of a variable, found by the attributes that lead to it; Keras 3 keeps some behind an underscore."""
    node = graph.nodes[0] if graph.nodes else None
    for part in name.split("/"):
        children = {} if node is None else {child.local_name: child.node_id for child in node.children}
        found = next((children[spelling] for spelling in (part, f"_{part}") if spelling in children), None)
        if found is None:
            return None
        node = graph.nodes[found]
    if node is None or not node.attributes:
        return None
    return str(node.attributes[0].checkpoint_key)


def _sizes(prefix: Path, weights: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """The sizes, as the first variable that has them says, if all others agree."""
    sizes: dict[str, int] = {}
    for name, form in _SHAPES.items():
        shape, axes = weights[name].shape, form.split(",") if "," in form else list(form)
        expected = []
        for place, axis in enumerate(axes):
            factor, letter = (int(axis[:-1] or 1), axis[-1]) if axis[-1].isalpha() else (int(axis), None)
            if letter is not None and letter not in sizes and place < len(shape):
                sizes[letter] = shape[place] // factor
            expected.append(factor * sizes.get(letter, 0) if letter else factor)
        if shape != tuple(expected):
            raise TrainingError(
                f"the checkpoint {prefix} is not of the tutorial's model: {name} has the shape {shape} rather than "
                f"{tuple(expected)}"
            )
    return sizes


def _words(path: Path, known: int) -> tuple[list[str], list[int]]:
    """The words that can be said, in the order of their ids, and the rows that they have in the checkpoint.

    Args:
        path: The tokenizer.
        known: Rows of the embedding.
    """
    by_id, oov, limit = _read_tokenizer(path)
    if not max(len(by_id), limit or 0) + 1 >= known >= (limit or 0):
        kept = f"keeps {limit}" if limit else f"has {len(by_id)}"
        raise TrainingError(
            f"the tokenizer {path} {kept} words and the checkpoint {known}: they are not of one training"
        )
    by_id[0] = PAD
    for word, name in ((oov, "unknown word (its oov_token)"), (START, START), (END, END)):
        if word is None or word not in (by_id.get(row) for row in range(1, known)):
            raise TrainingError(f"the tokenizer {path} has no {name} among the checkpoint's {known} words")
    words, rows = [], []
    for row in range(known):
        word = by_id.get(row, "")
        # A line break is a word to the tutorial's tokenizer, since its captions hold some.
        if not word.isprintable() or not word or " " in word or (word in (PAD, UNK) and word != oov and row):
            continue
        words.append(UNK if word == oov and row else word)
        rows.append(row)
    return words, rows


def _read_tokenizer(path: Path) -> tuple[dict[int, str], str | None, int | None]:
    """Words by id, the one that stands for unknown ones, and how many the tokenizer keeps (None: all)."""
    wrong = f"{path} is no tokenizer that Keras' Tokenizer.to_json wrote"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, str):  # json.dump(tokenizer.to_json()): JSON in JSON
            content = json.loads(content)
    except FileNotFoundError as exc:
        raise TrainingError(f"the tokenizer {path} does not exist") from exc
    except (OSError, ValueError) as exc:
        raise TrainingError(f"{wrong}: {exc}") from exc
    try:
        config = content["config"]
        ids = json.loads(config["word_index"])
        by_id = {row: word for word, row in ids.items() if isinstance(row, int)}
        oov, limit = config["oov_token"], config["num_words"]
    except (LookupError, TypeError, AttributeError, ValueError) as exc:
        raise TrainingError(f"{wrong}: its word_index, oov_token or num_words is missing") from exc
    if len(by_id) != len(ids) or not (limit is None or isinstance(limit, int)):
        raise TrainingError(f"{wrong}: two words have the same number, or a number is none")
    return by_id, oov, limit

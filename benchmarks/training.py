"""Captions a second in training: this trainer beside the loop of TensorFlow's image-captioning tutorial, in one run.

    python benchmarks/training.py [--captions Flickr8k/Flickr8k.token.txt] [--channels 2048] [--all]

Both train the same model (embedding 256, units 512, 5,000 words, a grid of 8x8 places) on batches of 64 captions of the
same lengths. The tutorial's loop, written anew from its description, pads every caption to one length, 20 or 50, and
goes through the words in Python within a `tf.function`, with the attention's keys and the output layers at each word.
Its grids lie in memory beforehand; this trainer's are gathered in each step. The two take turns; rates are medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from caption_rt.vocabulary import Vocabulary, normalize_caption
from caption_train.batches import CaptionData
from caption_train.captioned import CaptionedImage
from caption_train.logs import RunLog
from caption_train.settings import load_settings
from caption_train.sources import CachedGrids
from caption_train.training import Trainer

BATCH, EMBEDDING, UNITS, WORDS, PLACES, A_PHOTO = 64, 256, 512, 5000, 64, 5


class Attention(keras.Model):
    """Bahdanau's attention; the keys are computed with every word."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.W1, self.W2, self.V = (keras.layers.Dense(size) for size in (UNITS, UNITS, 1))

    def call(self, features: tf.Tensor, hidden: tf.Tensor) -> tf.Tensor:
        """The context."""
        scores = self.V(tf.nn.tanh(self.W1(features) + self.W2(tf.expand_dims(hidden, 1))))
        return tf.reduce_sum(tf.nn.softmax(scores, axis=1) * features, axis=1)


class Decoder(keras.Model):
    """One word a call."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.embedding = keras.layers.Embedding(WORDS, EMBEDDING)
        self.gru = keras.layers.GRU(
            UNITS, return_sequences=True, return_state=True, recurrent_initializer="glorot_uniform"
        )
        self.fc1, self.fc2 = keras.layers.Dense(UNITS), keras.layers.Dense(WORDS)
        self.attention = Attention()

    def call(self, word: tf.Tensor, features: tf.Tensor, hidden: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Logits and the next state."""
        context = self.attention(features, hidden)
        x = tf.concat([tf.expand_dims(context, 1), self.embedding(word)], axis=-1)
        output, state = self.gru(x)
        return self.fc2(tf.reshape(self.fc1(output), (-1, UNITS))), state


def tutorial_steps(lengths: NDArray[np.int64], channels: int, padded: int) -> Iterator[float]:
    """Seconds of each step of the tutorial's loop."""
    encoder, decoder = keras.layers.Dense(EMBEDDING, activation="relu"), Decoder()
    optimizer = keras.optimizers.Adam()

    @tf.function
    def step(grid: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
        loss, hidden = 0.0, tf.zeros((BATCH, UNITS))
        word = tf.expand_dims(target[:, 0], 1)
        with tf.GradientTape() as tape:
            features = encoder(grid)
            for i in range(1, padded):
                predictions, hidden = decoder(word, features, hidden)
                each = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=target[:, i], logits=predictions)
                loss += tf.reduce_mean(each * tf.cast(target[:, i] != 0, tf.float32))
                word = tf.expand_dims(target[:, i], 1)
        variables = encoder.trainable_variables + decoder.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss / padded

    rng = np.random.default_rng(0)
    while True:
        grid = rng.random((BATCH, PLACES, channels), np.float32)
        target = rng.integers(4, WORDS, (BATCH, padded)) * (np.arange(padded) < rng.choice(lengths, (BATCH, 1)))
        grid, target = tf.constant(grid), tf.constant(target)
        started = time.perf_counter()
        float(step(grid, target))
        yield time.perf_counter() - started


class RandomGrids(CachedGrids):
    """Grids in memory in place of those of a cache, which the file system's cache holds as well."""

    def __init__(self, photos: int, channels: int) -> None:
        """Draw them."""
        self._grids = np.random.default_rng(0).random((photos, PLACES, channels), np.float32).astype(np.float16)

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Places and channels."""
        return self._grids.shape[1:]

    @property
    def loaded_shape(self) -> tuple[int, ...]:
        """Places and channels."""
        return self._grids.shape[1:]

    def load(self, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        """Those of some photos."""
        return self._grids[rows]


def our_steps(lengths: NDArray[np.int64], channels: int, folder: Path, *changes: str) -> Iterator[float]:
    """Seconds of each step of this trainer, the reading of its batch and its logs included."""
    settings = load_settings(changes=[f"model.embedding_dim={EMBEDDING}", f"model.units={UNITS}", *changes])
    rng = np.random.default_rng(0)
    photos = 40 * BATCH // A_PHOTO
    count = photos * A_PHOTO
    chosen = rng.choice(lengths, count)
    data = CaptionData(
        tuple(CaptionedImage(Path(str(i)), ("a",)) for i in range(photos)),
        np.arange(photos),
        tuple((2, *rng.integers(4, WORDS, length - 2).tolist(), 3) for length in chosen),
        np.repeat(np.arange(photos), A_PHOTO),
        chosen,
    )
    vocabulary = Vocabulary.build([" ".join(f"word{i}" for i in range(WORDS - 4))])
    trainer = Trainer(settings, data, data, vocabulary, RandomGrids(photos, channels), folder)
    with RunLog(folder, 0) as log:
        for epoch in range(1000):
            batches = trainer._batches(epoch, 0)
            started = time.perf_counter()
            for shares in batches:
                log.step(trainer._take_step(shares))
                yield time.perf_counter() - started
                started = time.perf_counter()


def token_counts(path: Path | None) -> NDArray[np.int64]:
    """Tokens of captions, ``<start>`` and ``<end>`` included: those of a file, or as if from Flickr8k."""
    if path is None:
        return np.clip(np.random.default_rng(0).normal(10.9, 3.7, 30000).round(), 2, 36).astype(np.int64) + 2
    lines = path.read_text(encoding="utf-8").splitlines()
    return np.array([len(normalize_caption(line.partition("\t")[2])) + 2 for line in lines])


def compare(name: str, ours: Iterator[float], theirs: Iterator[float], rounds: int) -> None:
    """Take turns, and print what came of it."""
    for steps in (ours, theirs):  # the first step traces the graph
        next(steps), next(steps)
    mine, other = [], []
    for _ in range(rounds):
        mine += [next(ours) for _ in range(3)]
        other.append(next(theirs))
    rate, reference = (BATCH / statistics.median(times) for times in (mine, other))
    print(f"{name:<58}{rate:>8.0f}{reference:>12.1f}{rate / reference:>8.1f}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=Path, help="A file of lines NAME<TAB>caption; else lengths are drawn.")
    parser.add_argument("--channels", type=int, default=2048, help="Of the grid.")
    parser.add_argument(
        "--padded", type=int, nargs="+", default=[20, 50], help="Lengths that the tutorial's loop pads to."
    )
    parser.add_argument(
        "--rounds", type=int, default=8, help="Steps of the tutorial's loop; this trainer takes 3 to each."
    )
    parser.add_argument("--all", action="store_true", help="Also in float32, and with another grouping of captions.")
    options = parser.parse_args()
    lengths = token_counts(options.captions)
    print(f"{len(lengths)} captions of {lengths.mean():.1f} tokens, batches of {BATCH}, {options.channels} channels")
    print(f"{'captions a second':<58}{'ours':>8}{'tutorial':>12}{'ratio':>8}")
    for padded in options.padded:
        cut = np.minimum(lengths, padded)
        theirs = tutorial_steps(cut, options.channels, padded)
        kinds = [
            ("default", []),
            ("float32", ["training.precision=float32"]),
            ("captions of similar length, a photo each", ["training.grouping=lengths"]),
        ]
        for name, changes in kinds if options.all else kinds[:1]:
            with tempfile.TemporaryDirectory() as folder:
                ours = our_steps(cut, options.channels, Path(folder), *changes)
                compare(f"tutorial padded to {padded}; ours: {name}", ours, theirs, options.rounds)
                ours.close()


if __name__ == "__main__":
    main()

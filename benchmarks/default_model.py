"""Captions a second of bundles, and of TensorFlow's tutorial as it captions: photo by photo and word by word, eagerly.

    python benchmarks/default_model.py PHOTOS [BUNDLE ...] [--photos 64] [--rounds 5] [--beam 3]

All start from files and end with words, take turns, and go through the same photos in an order that changes; bundles in
batches and in the precision that caption-rt takes by itself. Without a BUNDLE there is only the default one. The
tutorial's networks have random weights (InceptionV3 at 299 pixels, a GRU of 512, 5,000 words) and are stopped after ten
words, which is what a caption of Flickr8k has in the mean. Printed are medians, and the ratio of medians to the
tutorial's.
"""

import argparse
import itertools
import os
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

from caption_rt import Captioner
from caption_rt.bundle import default_bundle_path
from caption_train.datasets import photos_in

WORDS, VOCABULARY, UNITS, EMBEDDING = 10, 5000, 512, 256


class Attention(keras.Model):
    """The tutorial's BahdanauAttention."""

    def __init__(self):
        """As there."""
        super().__init__()
        self.W1, self.W2, self.V = keras.layers.Dense(UNITS), keras.layers.Dense(UNITS), keras.layers.Dense(1)

    def call(self, features, hidden):
        """Context vector and weights."""
        scores = self.V(tf.nn.tanh(self.W1(features) + self.W2(tf.expand_dims(hidden, 1))))
        weights = tf.nn.softmax(scores, axis=1)
        return tf.reduce_sum(weights * features, axis=1), weights


class Decoder(keras.Model):
    """The tutorial's RNN_Decoder."""

    def __init__(self):
        """As there."""
        super().__init__()
        self.embedding = keras.layers.Embedding(VOCABULARY, EMBEDDING)
        self.gru = keras.layers.GRU(UNITS, return_sequences=True, return_state=True)
        self.fc1, self.fc2 = keras.layers.Dense(UNITS), keras.layers.Dense(VOCABULARY)
        self.attention = Attention()

    def call(self, x, features, hidden):
        """Scores of the next word, state and attention."""
        context, weights = self.attention(features, hidden)
        x = tf.concat([tf.expand_dims(context, 1), self.embedding(x)], axis=-1)
        output, state = self.gru(x)
        output = self.fc1(output)
        return self.fc2(tf.reshape(output, (-1, output.shape[2]))), state, weights


class TutorialCaptions:
    """The tutorial's `evaluate`."""

    def __init__(self):
        """Random weights."""
        self.extractor = keras.applications.InceptionV3(include_top=False, weights=None, input_shape=(299, 299, 3))
        self.fc, self.decoder = keras.layers.Dense(EMBEDDING), Decoder()

    def __call__(self, paths):
        """One photo after the other."""
        for path in paths:
            image = tf.image.decode_jpeg(tf.io.read_file(str(path)), channels=3)
            image = keras.applications.inception_v3.preprocess_input(tf.image.resize(image, (299, 299)))
            grid = self.extractor(tf.expand_dims(image, 0))
            features = tf.nn.relu(self.fc(tf.reshape(grid, (grid.shape[0], -1, grid.shape[3]))))
            hidden, token = tf.zeros((1, UNITS)), tf.expand_dims([1], 0)
            for _ in range(WORDS):
                predictions, hidden, weights = self.decoder(token, features, hidden)
                tf.reshape(weights, (-1,)).numpy()
                token = tf.expand_dims([int(tf.random.categorical(predictions, 1)[0][0].numpy())], 0)


class BundleCaptions:
    """A bundle through caption-rt."""

    def __init__(self, path, beam):
        """Load it."""
        self.captioner = Captioner.load(path)
        self.options = replace(self.captioner.default_options, beam_size=beam)
        self.words = []

    def __call__(self, paths):
        """In batches of 16."""
        self.words += [len(caption.text.split()) for caption in self.captioner.caption_many(paths, self.options)]


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("bundles", type=Path, nargs="*", default=[default_bundle_path()])
    parser.add_argument("--photos", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--beam", type=int, default=1)
    arguments = parser.parse_args()
    paths = list(itertools.islice(itertools.cycle(photos_in(arguments.folder)), arguments.photos))
    ways = {"tutorial, eager": (TutorialCaptions(), paths[:8])}
    for bundle in arguments.bundles:
        captions = BundleCaptions(bundle, arguments.beam)
        ways[f"{bundle}, {captions.captioner.precision}"] = (captions, paths)
    rates = {name: [] for name in ways}
    for number in range(arguments.rounds + 1):
        for name in random.sample(list(ways), len(ways)):
            way, photos = ways[name]
            start = time.perf_counter()
            way(photos)
            if number:  # the first one loads and allocates
                rates[name].append(len(photos) / (time.perf_counter() - start))
    slowest = statistics.median(rates["tutorial, eager"])
    print(f"{len(paths)} photos, beam {arguments.beam}, medians of {arguments.rounds} rounds in turns")
    for name, found in rates.items():
        words = "" if name.startswith("tutorial") else f", {np.mean(ways[name][0].words):.1f} words a caption"
        rate = statistics.median(found)
        print(f"{name:30} {rate:7.1f} captions/s, {rate / slowest:6.1f} times the tutorial's{words}")


if __name__ == "__main__":
    main()

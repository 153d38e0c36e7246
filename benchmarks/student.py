"""What an extractor costs, by its design: products, weights, photos a second, and photos a second that it learns from.

    python benchmarks/student.py [LAYER:WIDTH:SIZE ...] [--photos tests/data/photos] [--batch 16] [--rounds 5]

A design is a block, a width and a size in pixels, as `caption-train distill` takes them; without any, those that were
considered for the default model. Weights are random: speed does not depend on them. Photos a second are those of ONNX
Runtime in batches, in float32 and in 8 bits, with ranges from real photos, all designs in turns and in an order that
changes; a training step is one of distillation on a teacher's grid of 1,280 channels, in bfloat16 where the processor
has it. Medians are printed. The extra `export` is needed.
"""

import argparse
import os
import random
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as caption-train sets it

import keras
import numpy as np
import tensorflow as tf

from caption_export.calibration import observe
from caption_export.graphs import ExportedGraph, _convert, _extractor
from caption_export.int8 import last_nodes, quantise
from caption_rt.bundle import GraphSpec, TensorSpec
from caption_rt.engine import Graph
from caption_rt.image import read_photo
from caption_train.datasets import photos_in
from caption_train.distill_views import compute_in_bfloat16
from caption_train.inception import ExtractorConfig, build_extractor

DESIGNS = (
    "mixed10:0.25:224",
    "mixed10:0.35:299",
    "mixed10:0.5:299",
    "stage3:0.75:224",
    "stage3:1.0:224",
    "stage3:1.25:224",
    "mixed8:1.0:299",
)
TEACHER_CHANNELS = 1280
LEARNT = 32  # photos a training step


class Design:
    """An extractor with random weights."""

    def __init__(self, name, folder, batch):
        """Build it, export it, and put it into 8 bits."""
        layer, width, size = name.split(":")
        self.name, self.config = name, ExtractorConfig(float(width), int(size), layer)
        keras.utils.set_random_seed(0)
        self.extractor = build_extractor(self.config)
        self.photos = np.stack([read_photo(path, int(size)) for path in (photos_in(folder) * batch)[:batch]])
        graph = self._exported()
        seen = observe(graph, [[self.photos[i : i + 1]] for i in range(batch)])
        reduced = quantise(graph, seen, "min-max", last_nodes(graph))
        self.graphs = {"fp32": Graph(graph.data, graph.spec), "int8": Graph(reduced.data, reduced.spec)}
        self.bytes = len(reduced.data)

    def _exported(self):
        rows, columns, channels = self.extractor.output_shape[1:]
        images = TensorSpec("images", "uint8", ("n", self.config.size, self.config.size, 3))
        grid = TensorSpec("grid", "float32", ("n", rows * columns, channels))
        spec = GraphSpec("extractor.onnx", (images,), (grid,))
        return ExportedGraph(
            "extractor", _convert("extractor", _extractor(SimpleNamespace(extractor=self.extractor)), spec), spec
        )

    def products(self):
        """Multiplications of a photo's convolutions."""
        return sum(
            int(np.prod(layer.kernel.shape)) * layer.output.shape[1] * layer.output.shape[2]
            for layer in self.extractor.layers
            if isinstance(layer, keras.layers.Conv2D)
        )

    def rate(self, precision):
        """Photos a second, once."""
        start = time.perf_counter()
        self.graphs[precision].run(self.photos)
        return len(self.photos) / (time.perf_counter() - start)

    def learning_rate(self, rounds):
        """Photos a second that are learnt from, the median of some steps."""
        student = build_extractor(self.config)
        head = keras.Sequential([keras.Input(student.output_shape[1:]), keras.layers.Conv2D(TEACHER_CHANNELS, 1)])
        compute_in_bfloat16(student)
        optimizer = keras.optimizers.AdamW(1e-3)
        variables = [*student.trainable_variables, *head.trainable_variables]
        optimizer.build(variables)
        photos = tf.constant(np.resize(self.photos, (LEARNT, *self.photos.shape[1:])), tf.float32)
        target = tf.random.normal((LEARNT, *student.output_shape[1:3], TEACHER_CHANNELS))

        @tf.function(autograph=False)
        def step():
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(head(student(photos, training=True)) - target))
            optimizer.apply(tape.gradient(loss, variables), variables)
            return loss

        float(step())
        rates = []
        for _ in range(rounds):
            start = time.perf_counter()
            float(step())
            rates.append(LEARNT / (time.perf_counter() - start))
        return statistics.median(rates)


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("designs", nargs="*", default=DESIGNS)
    parser.add_argument("--photos", type=Path, default=Path("tests/data/photos"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    designs = [Design(name, arguments.photos, arguments.batch) for name in arguments.designs]
    rates = {(design, precision): [] for design in designs for precision in design.graphs}
    for number in range(arguments.rounds + 1):
        for design, precision in random.sample(list(rates), len(rates)):
            found = design.rate(precision)
            if number:  # the first one allocates
                rates[design, precision].append(found)
    print("| design | grid | GMAC | million weights | int8 MB | fp32 photos/s | int8 photos/s | learnt photos/s |")
    print("|---|---|---|---|---|---|---|---|")
    for design in designs:
        fp32, int8 = (statistics.median(rates[design, precision]) for precision in ("fp32", "int8"))
        grid = " x ".join(map(str, design.extractor.output_shape[1:]))
        print(
            f"| {design.name} | {grid} | {design.products() / 1e9:.2f} | {design.extractor.count_params() / 1e6:.2f} | "
            f"{design.bytes / 1e6:.1f} | {fp32:.0f} | {int8:.0f} | {design.learning_rate(arguments.rounds):.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

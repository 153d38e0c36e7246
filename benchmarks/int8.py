"""How ranges of 8 bits are best chosen, and what keeping nodes in float32 buys: signal to noise, captions, CIDEr.

    python benchmarks/int8.py BUNDLE Flickr8k

From the fp32 graphs of a bundle, which the default one has not (docs/export.md says how to make one that has): ranges
from 64 photos that were trained on, signal to quantisation noise on 64 others of them, captions of the validation
photos by the runtime's greedy search. One row for each way of choosing ranges (the same in all three graphs); then,
with the best of them for each graph, each graph alone, encoder and decoder alone, and the latter as ONNX Runtime's
quantize_dynamic makes them (ranges found for each batch), and some of the nodes that lose most kept in float32. The
last column is how many photos get the words that they get in a batch of 16 when they are captioned alone.
"""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

from caption_export.calibration import METHODS
from caption_export.exporting import read_photos
from caption_export.graphs import ExportedGraph
from caption_export.int8 import last_nodes, quantisable, quantise
from caption_export.pipelines import OnnxPipeline, best_captions
from caption_export.reduced import LIMITS, Reducer, Reduction, Scored
from caption_rt import Bundle, DecodeOptions
from caption_train.datasets import load_dataset
from caption_train.scores import score_captions

OPTIONS = DecodeOptions(max_words=20, guard=False)
Graphs = dict[str, ExportedGraph]


def spread(items, count):
    """So many of them, evenly spread."""
    kept = min(count, len(items))
    return [items[i * len(items) // kept] for i in range(kept)]


def dynamic(graph: ExportedGraph) -> ExportedGraph:
    """A graph whose ranges are found while it runs, one for the whole batch."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "graph.onnx")
        model = onnx.load_model_from_string(graph.data)
        quantize_dynamic(
            model,
            path,
            ["MatMul", "Gather"],
            True,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
        return ExportedGraph(graph.name, path.read_bytes(), graph.spec)


class Table:
    """Prints a row for each set of graphs."""

    def __init__(self, reducer: Reducer, scored: Scored, bundle: Bundle) -> None:
        """Take what is measured on."""
        self._reducer, self._scored, self._bundle = reducer, scored, bundle
        self._images = np.stack([photo.pixels for photo in scored.photos])
        self._wanted: list[tuple[int, ...]] = []

    def row(self, name: str, graphs: Mapping[str, ExportedGraph]) -> None:
        """Measure and print."""
        pipeline, vocabulary = OnnxPipeline(graphs), self._bundle.vocabulary
        found = best_captions(pipeline, self._images, OPTIONS, vocabulary)
        tokens = [x.tokens for x in found]
        self._wanted = self._wanted or tokens
        alone = [best_captions(pipeline, image[None], OPTIONS, vocabulary)[0].tokens for image in self._images[:128]]
        names = [photo.name for photo in self._scored.photos]
        texts = {x: vocabulary.decode(y) for x, y in zip(names, tokens, strict=True)}
        scores = score_captions(texts, self._scored.references)
        noise = [
            self._reducer._compared[graph].sqnr(graphs[graph])[output]
            for graph, output in (("extractor", "grid"), ("encoder", "features"), ("decoder", "log_probs"))
        ]
        equal = np.mean([x == y for x, y in zip(tokens, self._wanted, strict=True)])
        batch = np.mean([x == y for x, y in zip(alone, tokens, strict=False)])
        values = " | ".join(f"{x:.1f}" if x < 200 else "" for x in noise)
        print(
            f"| {name} | {values} | {scores['CIDEr']:.4f} | {scores['BLEU-4']:.2f} | {equal:.1%} | {batch:.0%} |",
            flush=True,
        )


def main() -> None:
    """Read the arguments, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--scored", type=int, default=1000, help="validation photos that are captioned")
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    if "fp32" not in bundle.manifest.precisions:
        parser.error(f"{arguments.bundle} has no fp32: export the run again with --precision fp32")
    size, specs = bundle.manifest.image.size, bundle.manifest.precisions["fp32"]
    fp32 = {name: ExportedGraph(name, bundle.read(spec.file), spec) for name, spec in specs.items()}
    data = load_dataset(arguments.dataset, images=arguments.images)
    trained = spread(data.train, 128)
    photos = read_photos([image.path for image in spread(data.validation, arguments.scored)], size, name=str)
    captions = {str(image.path): image.captions for image in data.validation}
    scored = Scored(photos, {photo.name: captions[photo.name] for photo in photos})
    read = read_photos([image.path for image in trained], size)
    calibration, others = read[::2], read[1::2]
    asked = Reduction(
        ("int8",), calibration, Scored(photos[:2], {x.name: captions[x.name] for x in photos[:2]}), LIMITS
    )
    reducer = Reducer(fp32, others, [], [], [OPTIONS], bundle.vocabulary, asked)
    table = Table(reducer, scored, bundle)
    print("| int8 | dB grid | dB features | dB log_probs | CIDEr | BLEU-4 | as fp32 | alone as in a batch |")
    print("|---|---|---|---|---|---|---|---|")
    table.row("none: fp32", fp32)
    last = last_nodes(fp32["extractor"])
    whole: dict[str, Graphs] = {}
    for method in METHODS:
        kept = {"extractor": last, "encoder": [], "decoder": []}
        whole[method] = {name: quantise(graph, reducer._seen[name], method, kept[name]) for name, graph in fp32.items()}
        table.row(method, whole[method])
    found = {name: reducer._methods(name) for name in fp32}
    best = {name: max(values, key=values.__getitem__) for name, values in found.items()}
    chosen = {name: whole[best[name]][name] for name in fp32}
    table.row(f"the best of each ({', '.join(best.values())})", chosen)
    for name in fp32:
        table.row(f"{name} alone", {**fp32, name: chosen[name]})
    for name in ("encoder", "decoder"):
        table.row(f"{name} alone, quantize_dynamic", {**fp32, name: dynamic(fp32[name])})
    worst = list(reducer._losses(best["extractor"], last))
    for count in (4, 16):
        kept = [*last, *worst[:count]]
        extractor = quantise(fp32["extractor"], reducer._seen["extractor"], best["extractor"], kept)
        table.row(
            f"{count} of {len(quantisable(fp32['extractor']))} nodes in float32", {**chosen, "extractor": extractor}
        )
    everything = quantise(fp32["extractor"], reducer._seen["extractor"], best["extractor"])
    table.row("the last Concat in 8 bits too", {**chosen, "extractor": everything})


if __name__ == "__main__":
    main()

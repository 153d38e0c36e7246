"""Every precision of a bundle beside TensorFlow and OpenVINO: size, load time, speed, memory, and what captions lose.

    python benchmarks/export.py models/checkpoints/default BUNDLE PHOTOS --dataset Flickr8k

Each way captions the same photos by the same greedy search (`caption_rt.search`), in processes of its own that take
turns. TensorFlow runs the trained run from which the bundle was exported: eager, as its tutorial does, and through
tf.function. OpenVINO, where it is installed, runs the bundle's own graphs. Prints one table of medians: bytes of the
graphs or weights; seconds from the start of the process to the first caption, imports included, and of these the
loading; photos a second, 16 at a time; milliseconds a photo, one at a time; peak memory; and with --dataset CIDEr and
BLEU-4 on its validation photos, and how many captions are those of fp32, if the bundle has it.

ONNX Runtime has two rows a precision: without and with graphs that it optimised before (CAPTION_RT_CACHE).
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from caption_rt import Bundle, Captioner, DecodeOptions
from caption_rt.captioning import special_tokens
from caption_rt.image import read_photo
from caption_rt.manifest import GRAPH_TENSORS
from caption_rt.search import Step, decode

BATCH = 16
OPTIONS = DecodeOptions(max_words=20, guard=False)
Run = Callable[[str, Mapping[str, Any]], Mapping[str, Any]]
"""One of the three graphs: its name and inputs to its outputs."""


class Photos:
    """Photos in a pipeline of three graphs, as `caption_rt.search.Stepper`."""

    def __init__(self, run: Run, images: np.ndarray) -> None:
        """Run extractor and encoder."""
        self._run = run
        self._encoded = run("encoder", {"grid": run("extractor", {"images": images})["grid"]})
        self.batch_size = len(images)

    def initial_state(self) -> np.ndarray:
        """State before the first word."""
        return self._encoded["initial_state"]

    def step(self, tokens: np.ndarray, state: np.ndarray, images: np.ndarray) -> Step:
        """One word."""
        rows = {name: self._encoded[name][images] for name in ("features", "keys")}
        found = self._run("decoder", {"token": tokens, "state": state, **rows})
        return Step(found["log_probs"], found["next_state"], found["attention"])


def onnxruntime_way(bundle: Path, precision: str) -> Callable[[np.ndarray], object]:
    """caption_rt's own engine."""
    captioner = Captioner.load(bundle, "cpu", precision=precision)
    return lambda images: captioner.caption_pixels(list(images), OPTIONS)


def openvino_way(bundle: Path, precision: str) -> Callable[[np.ndarray], object]:
    """OpenVINO on the same graphs, in the precision that they state."""
    import openvino

    opened, core = Bundle.open(bundle), openvino.Core()
    graphs = opened.manifest.precisions[precision]
    exact = {"INFERENCE_PRECISION_HINT": "f32"}  # bfloat16 otherwise, where the processor has it
    compiled = {
        name: core.compile_model(core.read_model(opened.read(spec.file)), "CPU", exact) for name, spec in graphs.items()
    }

    def run(name: str, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        found = compiled[name](inputs)
        return {output: found[output] for output in GRAPH_TENSORS[name][1]}

    return lambda images: decode(Photos(run, images), OPTIONS, special_tokens(opened.vocabulary, OPTIONS))


def tensorflow_way(folder: Path, *, eager: bool) -> Callable[[np.ndarray], object]:
    """The trained run itself."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    from caption_export.pipelines import TensorFlowPipeline
    from caption_train.runs import open_run

    opened = open_run(folder)
    rows, columns, channels = opened.extractor.output_shape[1:]

    def step_by_step(name: str, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        if name == "extractor":
            grid = opened.extractor(tf.cast(inputs["images"], tf.float32), training=False)
            values: Any = (tf.reshape(grid, (-1, rows * columns, channels)),)
        else:
            function = opened.model.encode if name == "encoder" else opened.model.decoder.step
            values = function(*(tf.constant(inputs[x]) for x in GRAPH_TENSORS[name][0]))
        return {x: np.asarray(value) for x, value in zip(GRAPH_TENSORS[name][1], values, strict=True)}

    run = step_by_step if eager else TensorFlowPipeline(opened).run
    return lambda images: decode(Photos(run, images), OPTIONS, special_tokens(opened.vocabulary, OPTIONS))


def work(way: str, precision: str, arguments: argparse.Namespace) -> None:
    """Measure one way in this process, and print what came as JSON."""
    size = Bundle.open(arguments.bundle).manifest.image.size
    reading = time.time()
    paths = sorted(x for x in arguments.photos.rglob("*") if x.suffix.lower() in (".jpg", ".jpeg", ".png"))
    images = np.stack([read_photo(path, size) for path in paths[: arguments.count]])
    reading, before = time.time() - reading, time.perf_counter()
    if way == "ONNX Runtime":
        caption = onnxruntime_way(arguments.bundle, precision)
    elif way == "OpenVINO":
        caption = openvino_way(arguments.bundle, precision)
    else:
        caption = tensorflow_way(arguments.run, eager="eager" in way)
    load_s = time.perf_counter() - before
    caption(images[:1])
    first_s = time.time() - arguments.started - reading
    caption(images[:BATCH])
    start = time.perf_counter()
    for first in range(0, len(images), BATCH):
        caption(images[first : first + BATCH])
    rate = len(images) / (time.perf_counter() - start)
    single = []
    for image in images[:20]:
        start = time.perf_counter()
        caption(image[None])
        single.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 2**20)
    found = {"first_s": first_s, "load_s": load_s, "rate": rate, "single_ms": statistics.median(single) * 1e3}
    print(json.dumps({**found, "peak_mib": peak}))


def scores(arguments: argparse.Namespace, precisions: list[str]) -> dict[str, dict[str, float]]:
    """CIDEr, BLEU-4 and, beside fp32, the share of equal captions of each precision, through caption_rt."""
    from caption_train.datasets import load_dataset
    from caption_train.runs import data_choices
    from caption_train.scores import score_captions

    photos = load_dataset(arguments.dataset, images=arguments.images, **data_choices(arguments.run)).validation
    references = {str(photo.path): photo.captions for photo in photos}
    found: dict[str, dict[str, float]] = {}
    tokens: dict[str, list[tuple[int, ...]]] = {}
    for precision in precisions:
        captioner = Captioner.load(arguments.bundle, "cpu", precision=precision)
        captions = list(captioner.caption_many(list(references), OPTIONS))
        tokens[precision] = [caption.tokens for caption in captions]
        texts = {name: caption.text for name, caption in zip(references, captions, strict=True)}
        values = score_captions(texts, references)
        found[precision] = {"CIDEr": values["CIDEr"], "BLEU-4": values["BLEU-4"]}
    for precision in precisions if "fp32" in tokens else ():
        pairs = zip(tokens[precision], tokens["fp32"], strict=True)
        found[precision]["equal"] = statistics.mean(x == y for x, y in pairs)
    return found


def sizes(arguments: argparse.Namespace) -> dict[str, int]:
    """Bytes of the graphs by precision, and of the run's weights in single precision."""
    from caption_train.runs import open_run

    manifest = Bundle.open(arguments.bundle).manifest
    of_graphs = {
        precision: sum(manifest.files[graph.file].size for graph in graphs.values())
        for precision, graphs in manifest.precisions.items()
    }
    # Not those of its files: a checkpoint has the optimisers' state, and what of the extractor was learnt once more.
    run = open_run(arguments.run)
    weights = [weight for network in (run.extractor, run.model) for weight in network.weights]
    return {**of_graphs, "": 4 * sum(int(np.prod(weight.shape)) for weight in weights)}


def measure(ways: list[tuple[str, str]], arguments: argparse.Namespace) -> dict[tuple[str, str, str], dict[str, float]]:
    """Medians of each way's processes; ONNX Runtime's with and without optimised graphs."""
    found: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as cache:
        for round_ in range(arguments.runs + 1):
            for way, precision in ways:
                caches = [cache, "off"] if way == "ONNX Runtime" else ["off"]
                for place in caches if round_ else [x for x in caches if x != "off"]:  # the first fills the cache
                    command = [sys.executable, __file__, arguments.run, arguments.bundle, arguments.photos]
                    command += ["--count", arguments.count, "--work", f"{way}|{precision}", "--started", time.time()]
                    environment = os.environ | {"CAPTION_RT_CACHE": place}
                    done = subprocess.run(
                        [*map(str, command)], env=environment, capture_output=True, text=True, check=False
                    )
                    if done.returncode:
                        sys.exit(f"{way} {precision} failed: {done.stderr[-2000:]}")
                    if round_:
                        kept = "" if place == "off" else "optimised before"
                        found.setdefault((way, precision, kept), []).append(json.loads(done.stdout.splitlines()[-1]))
    return {
        key: {name: statistics.median(run[name] for run in runs) for name in runs[0]} for key, runs in found.items()
    }


def main() -> None:
    """Read the arguments, measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the trained run that the bundle was exported from")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("photos", type=Path, help="folder of photos")
    parser.add_argument("--dataset", type=Path, help="data set whose validation photos are scored")
    parser.add_argument("--images", type=Path, help="folder of its photos")
    parser.add_argument("--count", type=int, default=64, help="photos that speed is measured on")
    parser.add_argument("--runs", type=int, default=3, help="processes of each way")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(*arguments.work.split("|"), arguments)
        return
    precisions = list(Bundle.open(arguments.bundle).manifest.precisions)
    ways = [("TensorFlow eager", ""), ("TensorFlow tf.function", "")]
    ways += [("ONNX Runtime", precision) for precision in precisions]
    try:
        import openvino

        print(f"OpenVINO {openvino.__version__}")
        ways += [("OpenVINO", precision) for precision in precisions if precision != "fp16"]
    except ImportError:
        print("no OpenVINO: pip install openvino adds its rows")
    bytes_of, found = sizes(arguments), measure(ways, arguments)
    scored = scores(arguments, precisions) if arguments.dataset else {}
    columns = ("way", "MB", "first caption, s", "of it loading, s", "photos/s", "ms a photo", "peak MiB")
    columns = (*columns, "CIDEr", "BLEU-4", "as fp32")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for (way, precision, kept), row in found.items():
        name = " ".join(filter(None, (way, precision, kept and f"({kept})")))
        quality = scored.get(precision, {}) if way == "ONNX Runtime" and not kept else {}
        cells = [f"{quality[x]:{form}}" if quality else "" for x, form in (("CIDEr", ".3f"), ("BLEU-4", ".1f"))]
        cells.append(f"{quality['equal']:.1%}" if "equal" in quality else "")
        print(
            f"| {name} | {bytes_of[precision] / 1e6:.1f} | {row['first_s']:.2f} | {row['load_s']:.3f} | "
            f"{row['rate']:.1f} | {row['single_ms']:.1f} | {row['peak_mib']:.0f} | {' | '.join(cells)} |"
        )


if __name__ == "__main__":
    main()

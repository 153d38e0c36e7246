"""One photo, file to text, against the bare extractor: how much the rest of the way adds.

    python benchmarks/one_photo.py --photo photo.jpg models/default /tmp/full-size

Alternates, in one process: ``session.run`` of the extractor alone on the photo's array; the whole way with greedy
search and with a beam of 5; and the floor under the whole way, what Pillow and ONNX Runtime take for the same work by
themselves: decoding and resizing the photo, the bare extractor and encoder, and a bare decoder step for each step that
the search took. Prints ratios of medians to the bare extractor.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

from caption_rt import Bundle, Captioner, DecodeOptions
from caption_rt.image import read_photo
from caption_rt.threads import usable_cpus


def bare_session(bundle: Bundle, graph: str) -> onnxruntime.InferenceSession:
    """A session as anybody would make it, with one thread a processor."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cpus()
    data = bundle.read(bundle.manifest.graphs[graph].file)
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(path: str, photo: Path, runs: int, max_words: int) -> None:
    """Print the table of one bundle."""
    bundle = Bundle.open(path)
    size = bundle.manifest.image.size
    sessions = {graph: bare_session(bundle, graph) for graph in ("extractor", "encoder", "decoder")}
    pixels = read_photo(photo, size)
    captioner = Captioner.load(path, "cpu")
    greedy = DecodeOptions(max_words=max_words, guard=False)
    beam = DecodeOptions(max_words=max_words, beam_size=5, guard=False)

    def extract() -> np.ndarray:
        return sessions["extractor"].run(["grid"], {"images": pixels[None]})[0]

    def floor(steps: int, rows: int) -> None:
        with Image.open(photo) as image:
            image.resize((size, size), Image.Resampling.BILINEAR)
        features, keys, state = sessions["encoder"].run(["features", "keys", "initial_state"], {"grid": extract()})
        wide = [np.repeat(array, rows, axis=0) for array in (features, keys, state)]
        feeds = {"token": np.full(rows, 2), "features": wide[0], "keys": wide[1], "state": wide[2]}
        for _ in range(steps):
            sessions["decoder"].run(["log_probs", "next_state", "attention"], feeds)

    words = {options: len(captioner.caption(photo, options).words) for options in (greedy, beam)}
    # The end of a caption is a step too, unless it was cut.
    steps = {options: min(count + 1, max_words) for options, count in words.items()}
    ways: dict[str, Callable[[], object]] = {
        "bare extractor": extract,
        "greedy": lambda: captioner.caption(photo, greedy),
        "greedy, floor": lambda: floor(steps[greedy], 1),
        "beam of 5": lambda: captioner.caption(photo, beam),
        "beam of 5, floor": lambda: floor(steps[beam], 5),
        "reading alone": lambda: read_photo(photo, size),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(runs + 1):
        for name, work in ways.items():
            taken = seconds(work)
            if run:  # the first round warms up
                times[name].append(taken)
    medians = {name: statistics.median(values) for name, values in times.items()}
    bare = medians["bare extractor"]
    print(f"{bundle.manifest.name}: {words[greedy]} words greedy, {words[beam]} with a beam; {runs} runs")
    for name, value in medians.items():
        print(f"  {name:18} {value * 1e3:7.2f} ms  {value / bare:5.2f} x the bare extractor")


def main() -> None:
    """Read the arguments and measure each bundle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", help="bundles to measure")
    parser.add_argument("--photo", type=Path, required=True, help="the photo")
    parser.add_argument("--runs", type=int, default=40, help="rounds; the first, not counted, warms up")
    parser.add_argument("--max-words", type=int, default=12, help="captions are cut after so many words")
    arguments = parser.parse_args()
    for bundle in arguments.bundles:
        measure(bundle, arguments.photo, arguments.runs, arguments.max_words)


if __name__ == "__main__":
    main()

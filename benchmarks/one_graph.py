"""The loop inside the graph against caption-rt's loop outside: one photo and a batch, greedy and with a beam.

    python benchmarks/one_graph.py models/default /tmp/full-size

Both take photos that have the model's size, and their sessions have the same settings. They alternate in one process;
each is run once right before it is measured. Prints medians and their ratio.
Needs the extra `export`.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from caption_export.one_graph import build_one_graph, one_graph_spec
from caption_rt import Bundle, Captioner, CaptionError, DecodeOptions
from caption_rt.engine import Graph
from caption_rt.manifest import PRECISIONS


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes right after another."""
    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(bundle: Bundle, precision: str, beam: int, photos: int, runs: int, max_words: int) -> None:
    """Print one line of the table."""
    options = DecodeOptions(beam_size=beam, max_words=max_words, guard=False)
    graph = Graph(build_one_graph(bundle, options, precision), one_graph_spec(bundle))
    size = bundle.manifest.image.size
    pixels = np.random.default_rng(0).integers(0, 256, (photos, size, size, 3), np.uint8)
    with Captioner(bundle, "cpu", precision=precision) as captioner:
        ways: dict[str, Callable[[], object]] = {
            "inside": lambda: graph.run(pixels),
            "outside": lambda: captioner.caption_pixels(list(pixels), options),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(runs):
            for name, work in ways.items():
                times[name].append(seconds(work))
    inside, outside = (statistics.median(times[name]) * 1e3 for name in ways)
    ratio = statistics.median(b / a for a, b in zip(times["inside"], times["outside"], strict=True))
    print(
        f"{bundle.manifest.name:12} {precision} {'greedy' if beam == 1 else f'beam {beam}':7} {photos:3} photos  "
        f"inside {inside:8.1f} ms  outside {outside:8.1f} ms  {ratio:.2f} times as fast inside"
    )


def main() -> None:
    """Read the arguments and measure each bundle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", help="bundles to measure")
    parser.add_argument("--precision", choices=PRECISIONS, help="that of caption-export graph if not given")
    parser.add_argument("--runs", type=int, default=15, help="rounds")
    parser.add_argument("--max-words", type=int, default=12, help="captions are cut after so many words")
    arguments = parser.parse_args()
    for path in arguments.bundles:
        try:
            bundle = Bundle.open(path)
        except CaptionError as error:
            parser.error(str(error))
        precision = arguments.precision or next(name for name in PRECISIONS if name in bundle.manifest.precisions)
        for beam in (1, 5):
            for photos in (1, 8):
                measure(bundle, precision, beam, photos, arguments.runs, arguments.max_words)


if __name__ == "__main__":
    main()

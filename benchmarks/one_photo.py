"""One photo, file to text, against the bare extractor: how much the rest of the way adds.

    python benchmarks/one_photo.py --photo photo.jpg models/default /tmp/full-size

Alternates, in one process: ``session.run`` of the extractor alone on the photo's array; the whole way with greedy
search and with a beam of 5; and the floor under the whole way, what Pillow and ONNX Runtime take for the same work by
themselves: decoding and resizing the photo, the bare extractor and encoder, and a bare decoder step for each step that
the search took. Prints ratios of medians to the bare extractor.

The threads of a session as anybody would make it spin for some 30 ms after each run, and would slow down what is
measured next. So each way is begun when they have stopped, is run once to be warm, and measured the second time; and
the floor's own sessions, which would hinder one another, stop with their run as those of caption-rt do. All are in the
precision that caption-rt takes by itself on this machine's processor.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

from caption_rt import Bundle, Captioner, CaptionError, DecodeOptions
from caption_rt.image import read_photo
from caption_rt.threads import usable_cpus


def bare_session(bundle: Bundle, precision: str, graph: str, *, stops: bool = False) -> onnxruntime.InferenceSession:
    """A session as anybody would make it, with one thread a processor; or one whose threads stop with their run."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cpus()
    if stops:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    data = bundle.read(bundle.manifest.precisions[precision][graph].file)
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes, right after another, long after any other work."""
    time.sleep(0.1)
    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(path: str, photo: Path, runs: int, max_words: int) -> None:
    """Print the table of one bundle."""
    bundle = Bundle.open(path)
    size = bundle.manifest.image.size
    captioner = Captioner.load(path, "cpu")
    precision = captioner.precision
    bare_extractor = bare_session(bundle, precision, "extractor")
    sessions = {name: bare_session(bundle, precision, name, stops=True) for name in ("extractor", "encoder", "decoder")}
    pixels = read_photo(photo, size)
    greedy = DecodeOptions(max_words=max_words, guard=False)
    beam = DecodeOptions(max_words=max_words, beam_size=5, guard=False)

    def extract(session: onnxruntime.InferenceSession) -> np.ndarray:
        return session.run(["grid"], {"images": pixels[None]})[0]

    def floor(steps: int, rows: int) -> None:
        with Image.open(photo) as image:
            image.resize((size, size), Image.Resampling.BILINEAR)
        grid = extract(sessions["extractor"])
        features, keys, state = sessions["encoder"].run(["features", "keys", "initial_state"], {"grid": grid})
        wide = [np.repeat(array, rows, axis=0) for array in (features, keys, state)]
        feeds = {"token": np.full(rows, 2), "features": wide[0], "keys": wide[1], "state": wide[2]}
        for _ in range(steps):
            sessions["decoder"].run(["log_probs", "next_state", "attention"], feeds)

    words = {options: len(captioner.caption(photo, options).words) for options in (greedy, beam)}
    # The end of a caption is a step too, unless it was cut.
    steps = {options: min(count + 1, max_words) for options, count in words.items()}
    ways: dict[str, Callable[[], object]] = {
        "bare extractor": lambda: extract(bare_extractor),
        "greedy": lambda: captioner.caption(photo, greedy),
        "greedy, floor": lambda: floor(steps[greedy], 1),
        "beam of 5": lambda: captioner.caption(photo, beam),
        "beam of 5, floor": lambda: floor(steps[beam], 5),
        "reading alone": lambda: read_photo(photo, size),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, work in ways.items():
            times[name].append(seconds(work))
    medians = {name: statistics.median(values) for name, values in times.items()}
    bare = medians["bare extractor"]
    print(f"{bundle.manifest.name}, {precision}: {words[greedy]} words greedy, {words[beam]} with a beam; {runs} runs")
    for name, value in medians.items():
        print(f"  {name:18} {value * 1e3:7.2f} ms  {value / bare:5.2f} x the bare extractor")


def main() -> None:
    """Read the arguments and measure each bundle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", help="bundles to measure")
    parser.add_argument("--photo", type=Path, required=True, help="the photo")
    parser.add_argument("--runs", type=int, default=30, help="rounds")
    parser.add_argument("--max-words", type=int, default=12, help="captions are cut after so many words")
    arguments = parser.parse_args()
    try:
        read_photo(arguments.photo, 32)
        for bundle in arguments.bundles:
            Bundle.open(bundle)
    except CaptionError as error:
        parser.error(str(error))
    for bundle in arguments.bundles:
        measure(bundle, arguments.photo, arguments.runs, arguments.max_words)


if __name__ == "__main__":
    main()

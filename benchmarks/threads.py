"""What spinning threads cost and binding them gains: the latency of one photo, and what idling costs.

    python benchmarks/threads.py [BUNDLE] [--busy 1] [--runs 100] [--words 10]

The threads of an ONNX Runtime session spin when they have nothing to do, and may be bound to a processor each. Engines
of the same bundle are timed that differ in that alone: one photo from pixels to words, in turns and in an order that
changes, so that whatever else the machine does hits all alike. `--busy` keeps that many other processes busy meanwhile,
as the reading of photos does in a folder. Printed are the ratio of the medians to that of caption-rt's own setting, and
the processor time that each takes in the second after its last run.
"""

import argparse
import contextlib
import random
import statistics
import subprocess
import sys
import time

import numpy as np
import onnxruntime

from caption_rt.bundle import Bundle, default_bundle_path
from caption_rt.engine import Engine
from caption_rt.threads import default_threads, worker_processors

SHORT = {"session.intra_op.spin_duration_us": "10", "session.force_spinning_stop": "1"}
BOUND = ";".join(",".join(str(cpu + 1) for cpu in core) for core in worker_processors(None))
SETTINGS = {
    "10 us, not after a run, bound (caption-rt)": SHORT
    | ({"session.intra_op_thread_affinities": BOUND} if BOUND else {}),
    "10 us and not after a run": SHORT,
    "not after a run": {"session.force_spinning_stop": "1"},
    "always (ONNX Runtime's default)": {},
    "never": {"session.intra_op.allow_spinning": "0"},
}


class Photo:
    """One photo through the three graphs of a bundle, with the sessions set one way."""

    def __init__(self, bundle, precision, settings, words):
        """Load the graphs."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = default_threads()
        for key, value in settings.items():
            options.add_session_config_entry(key, value)
        self.words = words
        self.sessions = {
            name: onnxruntime.InferenceSession(bundle.read(spec.file), options, providers=["CPUExecutionProvider"])
            for name, spec in bundle.manifest.precisions[precision].items()
        }
        size = bundle.manifest.image.size
        self.images = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), np.uint8)

    def seconds(self):
        """How long it takes."""
        start = time.perf_counter()
        (grid,) = self.sessions["extractor"].run(["grid"], {"images": self.images})
        names = ["features", "keys", "initial_state"]
        features, keys, state = self.sessions["encoder"].run(names, {"grid": grid})
        token = np.zeros(1, np.int64)
        for _ in range(self.words):
            feeds = {"token": token, "state": state, "features": features, "keys": keys}
            log_probs, state, _ = self.sessions["decoder"].run(["log_probs", "next_state", "attention"], feeds)
            token = log_probs.argmax(axis=1)
        return time.perf_counter() - start

    def idle(self):
        """Processor time in the second after a run."""
        self.seconds()
        start = time.process_time()
        time.sleep(1)
        return time.process_time() - start


def measure(photos, runs):
    """The median of each, in seconds."""
    times = {name: [] for name in photos}
    for _ in range(runs):
        for name in random.sample(list(photos), len(photos)):
            # Threads that still spin from the engine before would be measured as this one's.
            time.sleep(0.15)
            photos[name].seconds()
            times[name].append(photos[name].seconds())
    return {name: statistics.median(values) for name, values in times.items()}


@contextlib.contextmanager
def others(count):
    """Processes that keep a processor busy each."""
    # They hold the reading end of a pipe and look whether it is closed, so that they end with this process however it
    # ends: killed, it could not end them.
    busy = "import select, sys\nwhile not select.select([sys.stdin], [], [], 0)[0]: sum(range(100000))"
    processes = [subprocess.Popen([sys.executable, "-c", busy], stdin=subprocess.PIPE) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.communicate()


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", nargs="?", default=default_bundle_path())
    parser.add_argument("--busy", type=int, default=0)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--words", type=int, default=10)
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    precision = Engine(bundle, "cpu").precision  # what caption-rt takes by itself
    photos = {name: Photo(bundle, precision, settings, arguments.words) for name, settings in SETTINGS.items()}
    with others(arguments.busy):
        medians = measure(photos, arguments.runs)
    own = next(iter(medians.values()))
    print(
        f"{bundle.manifest.name}, {precision}, one photo, {arguments.words} words, {default_threads()} threads, "
        f"{arguments.busy} other processes busy, ONNX Runtime {onnxruntime.__version__}, medians of {arguments.runs} "
        "runs in turns"
    )
    print(f"{'threads spin':<44}{'median':>10}{'ratio':>8}{'processor time in an idle second':>36}")
    # The time is that of the whole process, spinning threads of other engines among it.
    time.sleep(1)
    for name, photo in photos.items():
        print(f"{name:<44}{medians[name] * 1e3:>7.2f} ms{medians[name] / own:>8.2f}{photo.idle() * 1e3:>33.0f} ms")


if __name__ == "__main__":
    main()

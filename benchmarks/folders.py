"""A folder of photos, files to captions on the disk, against the bare extractor.

    python benchmarks/folders.py PHOTOS models/default /tmp/full-size --photos 200

The photos of PHOTOS and of all folders in it are made into two folders, one of 640x480 and one of 12 megapixels (JPEG,
quality 92, a little noise, so that a file is not easier to decode than a camera's). Alternates, in one process: the
extractor alone at its best batch size; and whole runs over each folder, greedy, at most 12 words, without the guard
(random weights give degenerate captions alone), to JSON lines with a ledger. Prints photos a second, the ratio to the
bare extractor, and what reading one photo takes of one processor, which is what bounds large photos.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

from caption_rt import Bundle, Captioner, DecodeOptions
from caption_rt.batch import BatchSettings, caption_sources, run_key
from caption_rt.image import open_photo, read_photo
from caption_rt.output_file import FileOutput
from caption_rt.sources import Selection, find_sources
from caption_rt.threads import usable_cpus
from caption_rt.writers import line_writer


def make_folder(photos: Sequence[Path], folder: Path, pixels: float, count: int) -> Path:
    """Write so many photos of so many pixels, as different as there are photos."""
    folder.mkdir()
    random = np.random.default_rng(0)
    made: list[bytes] = []
    for number in range(count):
        target = folder / f"{number:05}.jpg"
        if number < len(photos):
            photo = open_photo(photos[number])
            scale = math.sqrt(pixels / (photo.width * photo.height))
            size = round(photo.width * scale), round(photo.height * scale)
            values = np.asarray(photo.resize(size, Image.Resampling.LANCZOS), np.float32)
            values = values + random.normal(0, 4, values.shape[:2])[..., None]
            Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(target, quality=92)
            made.append(target.read_bytes())
        else:
            target.write_bytes(made[number % len(photos)])
    return folder


def bare_rate(session: onnxruntime.InferenceSession, images: np.ndarray, batch_size: int) -> float:
    """Photos a second of the extractor alone."""
    start = time.perf_counter()
    for first in range(0, len(images), batch_size):
        session.run(["grid"], {"images": images[first : first + batch_size]})
    return len(images) / (time.perf_counter() - start)


def run_rate(captioner: Captioner, folder: Path, options: DecodeOptions, settings: BatchSettings) -> float:
    """Photos a second of a whole run."""
    with tempfile.TemporaryDirectory() as out:
        key = run_key(captioner.key, captioner.precision, options, captioner.limits)
        output = FileOutput(Path(out, "captions.jsonl"), "jsonl", line_writer("jsonl"), "resume", key)
        start = time.perf_counter()
        count = sum(
            1 for _ in caption_sources(find_sources([str(folder)], Selection()), captioner, options, output, settings)
        )
        output.finish()
        seconds = time.perf_counter() - start
        output.close()
    return count / seconds


def measure(path: str, small: Path, large: Path, arguments: argparse.Namespace) -> None:
    """Print the table of one bundle."""
    bundle = Bundle.open(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cpus()
    captioner = Captioner.load(path, "cpu")
    graph = bundle.read(bundle.manifest.precisions[captioner.precision]["extractor"].file)
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    size = bundle.manifest.image.size
    names = sorted(small.iterdir())[: arguments.photos]
    images = np.stack([read_photo(name, size) for name in names])
    words = DecodeOptions(max_words=12, guard=False)
    settings = BatchSettings(batch_size=arguments.batch_size, workers=arguments.workers)
    bare: dict[int, list[float]] = {batch_size: [] for batch_size in (1, 4, 8, 16, 32)}
    runs: dict[str, list[float]] = {"640x480": [], "12 megapixels": []}
    for _ in range(arguments.runs):
        for batch_size, rates in bare.items():
            rates.append(bare_rate(session, images, batch_size))
        for (_, rates), folder in zip(runs.items(), (small, large), strict=True):
            rates.append(run_rate(captioner, folder, words, settings))
    best, rate = max(((size, statistics.median(rates)) for size, rates in bare.items()), key=lambda pair: pair[1])
    name = f"{bundle.manifest.name}, {captioner.precision}"
    print(f"{name}: the bare extractor at its best batch size, {best}: {rate:.1f} photos/s")
    for (name, rates), folder in zip(runs.items(), (small, large), strict=True):
        start = time.perf_counter()
        some = sorted(folder.iterdir())[:20]
        for photo in some:
            read_photo(photo, size)
        reading = (time.perf_counter() - start) / len(some)
        own = statistics.median(rates)
        print(
            f"  {name:14} {own:6.1f} photos/s, {own / rate:.2f} of the bare extractor; reading {reading * 1e3:.1f} ms"
        )


def main() -> None:
    """Read the arguments, make the folders, measure each bundle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("originals", type=Path, help="a folder of photos")
    parser.add_argument("bundles", nargs="+", help="bundles to measure")
    parser.add_argument("--photos", type=int, default=500, help="how many of 640x480")
    parser.add_argument("--large", type=int, default=500, help="how many of 12 megapixels")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=BatchSettings.batch_size)
    parser.add_argument("--workers", type=int, default=BatchSettings.workers)
    arguments = parser.parse_args()
    # As a run finds them; of what is no folder, nothing.
    folders = [str(arguments.originals)] if arguments.originals.is_dir() else []
    originals = [Path(source.path) for source in find_sources(folders, Selection()) if source.error is None]
    if not originals:
        parser.error(f"there is no photo in {arguments.originals}")
    with tempfile.TemporaryDirectory() as folder:
        small = make_folder(originals, Path(folder, "small"), 640 * 480, arguments.photos)
        large = make_folder(originals, Path(folder, "large"), 12e6, arguments.large)
        for bundle in arguments.bundles:
            measure(bundle, small, large, arguments)


if __name__ == "__main__":
    main()

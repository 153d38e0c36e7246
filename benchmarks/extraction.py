"""What filling the grid cache costs beside the bare network: files to rows on the disk, against arrays in memory.

    python benchmarks/extraction.py PHOTOS --weights inceptionv3.npz --layer mixed8 [--photos 128] [--rounds 3]

Both ways are timed in turns, in an order that changes, on the same photos and in batches of the same size: the network
alone, called with photos that have been read and resized beforehand; and `GridCache.fill` into a new folder, which
hashes and reads the files, resizes, extracts, turns the grids into float16 and waits until the disk has them. Printed
are photos a second, the cores that were busy, and the median and range of the ratio over the rounds.

With --bfloat16 the network alone runs in float32 and in bfloat16 on photos in memory, and the grids are compared.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as caption-train sets it

import keras
import numpy as np

from caption_rt.image import open_photo, read_photo
from caption_rt.threads import usable_cpus
from caption_train.cache import GridCache
from caption_train.datasets import photos_in
from caption_train.inception import ExtractorConfig, build_extractor, extract_with, load_extractor_weights

CORES = usable_cpus()


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder of photos")
    parser.add_argument("--weights", default="none", help="as the setting extractor.weights")
    parser.add_argument("--layer", default="mixed8")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--photos", type=int, default=128, help="how many, taken again and again where there are fewer")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bfloat16", action="store_true", help="instead: what bfloat16 does to the rate and the grids")
    arguments = parser.parse_args()

    config = ExtractorConfig(arguments.width, layer=arguments.layer)
    extractor = build_extractor(config)
    load_extractor_weights(extractor, arguments.weights)
    extract = extract_with(extractor)
    rows, columns, channels = extractor.output_shape[1:]
    read = partial(read_photo, size=config.size)

    if arguments.bfloat16:
        paths = photos_in(arguments.folder)[: arguments.photos]
        compare_bfloat16(config, arguments.weights, np.stack([read(path) for path in paths]), arguments.batch)
        return 0
    with tempfile.TemporaryDirectory() as name:
        # Copies that differ in their last byte: the cache would know a photo that it has seen.
        paths = []
        for number, path in zip(range(arguments.photos), itertools.cycle(photos_in(arguments.folder)), strict=False):
            paths.append(Path(name, f"{number:05d}{path.suffix}"))
            paths[-1].write_bytes(path.read_bytes() + number.to_bytes(4, "little"))
        start = time.perf_counter()
        arrays = np.stack([read(path) for path in paths])
        reading = (time.perf_counter() - start) / len(paths)
        batches = [arrays[start : start + arguments.batch] for start in range(0, len(arrays), arguments.batch)]
        for size in {len(batch) for batch in batches}:
            extract(arrays[:size])

        def bare(_: int) -> None:
            for batch in batches:
                extract(batch)

        def fill(number: int) -> None:
            cache = GridCache.open(Path(name, f"cache{number}"), "benchmark", (rows * columns, channels))
            assert (cache.fill(paths, extract, read=read, batch_size=arguments.batch, progress=False) >= 0).all()

        ways = {"bare network": bare, "fill": fill}
        rates: dict[str, list[float]] = {way: [] for way in ways}
        cores: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(arguments.rounds):
            for way in list(ways)[:: 1 if number % 2 == 0 else -1]:
                start, busy = time.perf_counter(), time.process_time()
                ways[way](number)
                seconds = time.perf_counter() - start
                rates[way].append(len(paths) / seconds)
                cores[way].append((time.process_time() - busy) / seconds)
        ratios = [mine / theirs for mine, theirs in zip(rates["fill"], rates["bare network"], strict=True)]
        pixels = statistics.median(np.prod(open_photo(path).size) for path in paths[:20])
        stored = sum(path.stat().st_size for path in Path(name, "cache0").rglob("*") if path.is_file()) / len(paths)
    print(f"{len(paths)} photos of about {pixels / 1e3:.0f} thousand pixels, batches of {arguments.batch}")
    for way, found in rates.items():
        print(
            f"{way:12} {statistics.median(found):6.1f} photos/s on {statistics.median(cores[way]):.2f} of {CORES} cores"
        )
    print(f"ratio        {statistics.median(ratios):6.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    print(f"reading      {reading * 1e3:6.1f} ms of one core a photo")
    print(f"on the disk  {stored / 1024:6.1f} KiB a photo (the tutorial: 512)")
    return 0


def compare_bfloat16(config: ExtractorConfig, weights: str, photos: np.ndarray, batch: int) -> None:
    """Print the rate of the network alone in float32 and in Keras' mixed_bfloat16, and how far the grids are off."""
    grids, rates = {}, {}
    for policy in ("float32", "mixed_bfloat16"):
        keras.mixed_precision.set_global_policy(policy)
        extractor = build_extractor(config)
        load_extractor_weights(extractor, weights)
        extract = extract_with(extractor)
        extract(photos[:batch])
        start = time.perf_counter()
        parts = [extract(photos[first : first + batch]) for first in range(0, len(photos), batch)]
        rates[policy] = len(photos) / (time.perf_counter() - start)
        grids[policy] = np.concatenate(parts).astype(np.float32)
    exact = grids["float32"]
    grids["float32 stored as float16"] = exact.astype(np.float16).astype(np.float32)
    for name, grid in grids.items():
        rate = f"{rates[name]:6.1f} photos/s" if name in rates else ""
        print(f"{name:26} relative L2 error {np.linalg.norm(grid - exact) / np.linalg.norm(exact):.5f} {rate}")


if __name__ == "__main__":
    raise SystemExit(main())

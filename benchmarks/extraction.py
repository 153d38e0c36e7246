"""What filling the grid cache costs beside the bare network: files to rows on the disk, against arrays in memory.

    python benchmarks/extraction.py PHOTOS --weights inceptionv3.npz --layer mixed8 [--photos 128] [--rounds 3]

Both ways are timed in turns, in an order that changes, on the same photos and in batches of the same size: the network
alone, called with photos that have been read and resized beforehand; and `GridCache.fill` into a new folder, which
hashes and reads the files, resizes, extracts, turns the grids into float16 and waits until the disk has them. Printed
are photos a second, and the median and range of their ratio over the rounds.
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

import numpy as np

from caption_rt.image import read_photo
from caption_train.cache import GridCache
from caption_train.datasets import photos_in
from caption_train.inception import ExtractorConfig, build_extractor, extract_with, load_extractor_weights


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder of photos")
    parser.add_argument("--weights", default="none", help="as in `caption-train train --extractor-weights`")
    parser.add_argument("--layer", default="mixed8")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--photos", type=int, default=128, help="how many, taken again and again where there are fewer")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    config = ExtractorConfig(arguments.width, layer=arguments.layer)
    extractor = build_extractor(config)
    load_extractor_weights(extractor, arguments.weights)
    extract = extract_with(extractor)
    rows, columns, channels = extractor.output_shape[1:]
    read = partial(read_photo, size=config.size)

    with tempfile.TemporaryDirectory() as name:
        # Copies that differ in their last byte: the cache would know a photo that it has seen.
        paths = []
        for number, path in zip(range(arguments.photos), itertools.cycle(photos_in(arguments.folder)), strict=False):
            paths.append(Path(name, f"{number:05d}{path.suffix}"))
            paths[-1].write_bytes(path.read_bytes() + number.to_bytes(4, "little"))
        arrays = np.stack([read(path) for path in paths])
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
        for number in range(arguments.rounds):
            for way in list(ways)[:: 1 if number % 2 == 0 else -1]:
                start = time.perf_counter()
                ways[way](number)
                rates[way].append(len(paths) / (time.perf_counter() - start))
        ratios = [mine / theirs for mine, theirs in zip(rates["fill"], rates["bare network"], strict=True)]
        pixels = statistics.median(read_photo_size(path) for path in paths[:20])
        stored = sum(path.stat().st_size for path in Path(name, "cache0").rglob("*") if path.is_file()) / len(paths)
    print(f"{len(paths)} photos of about {pixels / 1e3:.0f} thousand pixels, batches of {arguments.batch}")
    for way, found in rates.items():
        print(f"{way:12} {statistics.median(found):6.1f} photos/s")
    print(f"ratio        {statistics.median(ratios):6.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    print(f"on the disk  {stored / 1024:6.1f} KiB a photo (the tutorial: 512)")
    return 0


def read_photo_size(path: Path) -> int:
    """How many pixels a photo has."""
    from caption_rt.image import open_photo

    return int(np.prod(open_photo(path).size))


if __name__ == "__main__":
    raise SystemExit(main())

"""What reading a photo costs, and what the faster ways of it do to the pixels and to the captions.

    python benchmarks/reading.py PHOTOS [--megapixels 12] [--format JPEG] [--rounds 3]

The ways of reading are timed in turns, in an order that changes, on the bytes of each photo; printed are the ratio of
the medians to that of decoding the whole photo, the difference of the pixels that the network gets (of 255), and in how
many captions (greedy and beam of 3) any token differs from that of the whole photo. The last lines are for comparison:
the pixels of the whole photo with some of the values one up or down, as another decoder's rounding might have them.

With --megapixels the photos are first made that large: Lanczos, then noise of a standard deviation of 4 of 255, so that
the file is not easier to decode than a camera's, and quality 92. It is the best to be had from small photos, and softer
than a real photo of that size.
"""

import argparse
import io
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from caption_rt import Captioner, DecodeOptions
from caption_rt._sniff import PHOTO_SUFFIXES
from caption_rt.image import open_photo, to_pixels

Pixels = NDArray[np.uint8]


def ways(size: int) -> dict[str, Callable[[bytes], Pixels]]:
    """The ways of reading, by name; the first is the exact one."""

    def drafted(times: int) -> Callable[[bytes], Pixels]:
        return lambda data: to_pixels(open_photo(data, at_least=times * size), size)

    def reduced(gap: float) -> Callable[[bytes], Pixels]:
        def read(data: bytes) -> Pixels:
            photo = open_photo(data)
            return np.asarray(photo.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=gap))

        return read

    return {
        "whole": lambda data: to_pixels(open_photo(data), size),
        **{f"draft, at least {times}x": drafted(times) for times in (4, 3, 2, 1)},
        **{f"reducing_gap {gap}": reduced(gap) for gap in (3.0, 2.0, 1.0)},
    }


def enlarged(path: Path, megapixels: float, format: str) -> bytes:
    """A photo made as large as a camera's."""
    photo = open_photo(path)
    scale = math.sqrt(megapixels * 1e6 / (photo.width * photo.height))
    large = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.LANCZOS)
    noise = np.random.default_rng(0).normal(0, 4, (large.height, large.width, 3))
    pixels = np.clip(np.asarray(large) + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, quality=92)
    return buffer.getvalue()


def one_off(pixels: Pixels, odds: float) -> Pixels:
    """Pixels of which some values are one higher or lower."""
    draw = np.random.default_rng(0)
    change = draw.choice([-1, 1], pixels.shape) * (draw.random(pixels.shape) < odds)
    return np.clip(pixels + change, 0, 255).astype(np.uint8)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="a folder of photos")
    parser.add_argument("--bundle", help="the model; the default one where left out")
    parser.add_argument("--megapixels", type=float, help="make the photos this large first")
    parser.add_argument("--format", default="JPEG", help="the format of enlarged photos, by Pillow's name")
    parser.add_argument("--rounds", type=int, default=3, help="how often each photo is read each way")
    parser.add_argument("--limit", type=int, help="take only so many photos")
    arguments = parser.parse_args()
    paths = sorted(path for path in arguments.photos.iterdir() if path.suffix.lower() in PHOTO_SUFFIXES)
    paths = paths[: arguments.limit]
    with tempfile.TemporaryDirectory() as folder, Captioner.load(arguments.bundle) as captioner:
        if arguments.megapixels:
            for path in paths:
                data = enlarged(path, arguments.megapixels, arguments.format)
                (Path(folder) / path.name).write_bytes(data)
            paths = [Path(folder) / path.name for path in paths]
        measure(paths, captioner, arguments.rounds)
    return 0


def measure(paths: list[Path], captioner: Captioner, rounds: int) -> None:
    """Read every photo every way, caption it, and print the table."""
    size = captioner.bundle.manifest.image.size
    readers = ways(size)
    draw = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    pixels: dict[str, list[Pixels]] = {name: [] for name in readers}
    for path in paths:
        data = path.read_bytes()
        for number in range(rounds):
            for name in draw.sample(sorted(readers), len(readers)):
                start = time.perf_counter()
                read = readers[name](data)
                seconds[name].append(time.perf_counter() - start)
                if number == 0:
                    pixels[name].append(read)
    for odds in (0.05, 0.2):
        pixels[f"whole, {odds:.0%} one off"] = [one_off(exact, odds) for exact in pixels["whole"]]
    options = {"greedy": DecodeOptions(), "beam 3": DecodeOptions(beam_size=3)}
    tokens = {
        (name, kind): [caption.tokens for caption in captioner.caption_pixels(pixels[name], option)]
        for name in pixels
        for kind, option in options.items()
    }
    sizes = statistics.median(open_photo(path).size[0] for path in paths[:5])
    print(f"{len(paths)} photos about {sizes:.0f} pixels wide, read for {size} x {size}, {rounds} rounds")
    print(f"{'way':22} {'ms':>7} {'ratio':>6} {'mean':>6} {'max':>4} {'greedy':>8} {'beam 3':>8}")
    exact = statistics.median(seconds["whole"])
    for name in pixels:
        median = statistics.median(seconds.get(name, [math.nan]))
        apart = [np.abs(a.astype(int) - b) for a, b in zip(pixels[name], pixels["whole"], strict=True)]
        changed = [
            f"{sum(a != b for a, b in zip(tokens[name, kind], tokens['whole', kind], strict=True))}/{len(paths)}"
            for kind in options
        ]
        mean, most = np.mean([a.mean() for a in apart]), max(a.max() for a in apart)
        print(
            f"{name:22} {median * 1e3:7.1f} {median / exact:6.2f} {mean:6.2f} {most:4} {changed[0]:>8} {changed[1]:>8}"
        )


if __name__ == "__main__":
    raise SystemExit(main())

"""What int8 loses on an x86 processor without VNNI, whose products of 8 bits saturate: emulated by QEMU.

    python benchmarks/no_vnni.py BUNDLE Flickr8k --count 200

Grids of validation photos by the int8 extractor, and greedy captions in int8, twice: by this processor, and by an
emulated Haswell (`qemu-x86_64 -cpu Haswell`, of Debian's package qemu-user), for which ONNX Runtime takes the kernels
that it has for AVX2 alone. Both are held against fp32. The bundle needs both precisions, which the default one has not
(docs/export.md says how to make one that has). The emulation takes a second a photo with a bundle of its size.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from caption_rt import Bundle, Captioner, DecodeOptions
from caption_rt.engine import Graph
from caption_rt.image import read_photo

OPTIONS = DecodeOptions(max_words=20, guard=False)
EMULATED = ["qemu-x86_64", "-cpu", "Haswell"]


def work(bundle: Path, precision: str, out: str, paths: list[str]) -> None:
    """Write grids and captions of photos, in one precision, by the processor that this process has."""
    opened = Bundle.open(bundle)
    spec = opened.manifest.precisions[precision]["extractor"]
    extractor = Graph(opened.read(spec.file), spec)
    photos = [read_photo(path, opened.manifest.image.size) for path in paths]
    grids = np.concatenate([extractor.run(photo[None])[0] for photo in photos])
    with Captioner.load(opened, "cpu", precision=precision) as captioner:
        texts = [captioner.caption_pixels([photo], OPTIONS)[0].text for photo in photos]
    np.savez(out, grids=grids, texts=np.array(texts))


def decibels(wanted: np.ndarray, found: np.ndarray) -> float:
    """Signal to noise of the median photo."""
    flat = len(wanted), -1
    signal = np.square(wanted, dtype=np.float64).reshape(flat).sum(axis=1)
    noise = np.square(wanted - found, dtype=np.float64).reshape(flat).sum(axis=1)
    return float(np.median(10 * np.log10(signal / np.maximum(noise, 1e-20 * signal))))


def main() -> None:
    """Run the three ways and print a table; a process of its own runs each of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--images", type=Path, help="folder of the data set's photos")
    parser.add_argument("--count", type=int, default=200, help="validation photos, spread evenly")
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.bundle, arguments.work[0], arguments.work[1], Path(arguments.work[2]).read_text().split("\n"))
        return
    there = Bundle.open(arguments.bundle).manifest.precisions
    if missing := [precision for precision in ("fp32", "int8") if precision not in there]:
        parser.error(
            f"{arguments.bundle} has no {missing[0]}: export the run again with --precision fp32 --precision int8"
        )
    from caption_train.datasets import load_dataset
    from caption_train.scores import score_captions

    photos = load_dataset(arguments.dataset, images=arguments.images).validation
    photos = [photos[index * len(photos) // arguments.count] for index in range(arguments.count)]
    found = {}
    ways = {"fp32": ("fp32", []), "int8": ("int8", []), "int8, emulated Haswell": ("int8", EMULATED)}
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder, "photos")
        listed.write_text("\n".join(str(photo.path) for photo in photos))
        for name, (precision, before) in ways.items():
            out = Path(folder, f"{len(found)}.npz")
            command = [*before, sys.executable, __file__, arguments.bundle, arguments.dataset]
            command += ["--work", precision, out, listed]
            environment = os.environ | {"CAPTION_RT_CACHE": "off"}
            # Kept, because an emulated processor makes ONNX Runtime say what it misses.
            done = subprocess.run(
                [str(word) for word in command], env=environment, stderr=subprocess.PIPE, text=True, check=False
            )
            if done.returncode:
                sys.exit(f"{name} failed: {done.stderr[-2000:]}")
            found[name] = dict(np.load(out))
    wanted = found["fp32"]
    references = {str(photo.path): photo.captions for photo in photos}
    print("| way | dB grid | captions as fp32 | CIDEr | BLEU-4 |\n|---|---|---|---|---|")
    for name, values in found.items():
        texts = dict(zip(references, map(str, values["texts"]), strict=True))
        scores = score_captions(texts, references)
        equal = np.mean(values["texts"] == wanted["texts"])
        noise = "" if values is wanted else f"{decibels(wanted['grids'], values['grids']):.1f}"
        print(f"| {name} | {noise} | {equal:.1%} | {scores['CIDEr']:.4f} | {scores['BLEU-4']:.2f} |")


if __name__ == "__main__":
    main()

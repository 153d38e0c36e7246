"""What a data-set report looks at in each photo: whether it can be read, its content, and what it looks like.

The fingerprint is the difference hash (dHash) that N. Krawetz described ("Kind of Like That", The Hacker Factor Blog,
2013), with 16 x 16 differences rather than 8 x 8: the photo is made very small, and each bit says whether a place is
brighter than the one to its left. It stays nearly the same when a photo is scaled, squeezed or compressed anew, and
tells most different photos apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from caption_rt.errors import ImageError
from caption_rt.image import open_photo, read_file
from caption_rt.threads import usable_cpus

NEAR = 40
"""Photos whose fingerprints differ in at most so many of 256 bits are near-duplicates: see docs/data.md."""

_SIDE = 16
_LEAST_CONTRAST = 8.0  # standard deviation of 255; the bits of a photo of fog or sky alone are noise
_PAIRS_AT_ONCE = 2**20


@dataclass(frozen=True)
class PhotoFacts:
    """One photo."""

    path: Path
    """The file."""
    digest: str | None
    """SHA-256 of its bytes, hexadecimal; None where it cannot be read."""
    fingerprint: NDArray[np.uint64] | None
    """What it looks like, uint64 [4]; None where it cannot be read or hardly shows anything."""
    trouble: str | None
    """Why it cannot be read."""


def look_at(paths: Sequence[Path], on_photo: Callable[[], None] = lambda: None) -> list[PhotoFacts]:
    """Read photos, several at a time.

    Args:
        paths: Photo files.
        on_photo: Called after each.

    Returns:
        What was found, in their order.
    """
    found = []
    with ThreadPoolExecutor(min(8, usable_cpus())) as pool:
        try:
            for facts in pool.map(_look_at_one, paths):
                found.append(facts)
                on_photo()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return found


def _look_at_one(path: Path) -> PhotoFacts:
    try:
        data = read_file(path)
        photo = open_photo(data, at_least=8 * _SIDE, name=str(path))
    except ImageError as exc:
        return PhotoFacts(path, None, None, str(exc))
    return PhotoFacts(path, hashlib.sha256(data).hexdigest(), fingerprint(photo), None)


def fingerprint(photo: Image.Image) -> NDArray[np.uint64] | None:
    """What a photo looks like, as 256 bits.

    Args:
        photo: Any PIL image.

    Returns:
        uint64 [4]; None where there is hardly any contrast.
    """
    small = photo.convert("L").resize((_SIDE + 1, _SIDE), Image.Resampling.BOX)
    grey = np.asarray(small, np.int16)
    if grey.std() < _LEAST_CONTRAST:
        return None
    return np.packbits(grey[:, 1:] > grey[:, :-1]).view(np.uint64)


def near_pairs(
    first: Sequence[NDArray[np.uint64] | None], second: Sequence[NDArray[np.uint64] | None], most: int = NEAR
) -> list[tuple[int, int]]:
    """Find photos that look alike in two groups.

    Args:
        first: Fingerprints.
        second: Others.
        most: The most bits in which two may differ.

    Returns:
        Pairs of indices, into the first and into the second group.
    """
    theirs = [index for index, bits in enumerate(second) if bits is not None]
    mine = [index for index, bits in enumerate(first) if bits is not None]
    if not theirs or not mine:
        return []
    # One array a word, so that no more than one number a pair is kept.
    left = np.array([first[index] for index in mine]).T.copy()
    right = np.array([second[index] for index in theirs]).T.copy()
    pairs = []
    rows = max(1, _PAIRS_AT_ONCE // len(theirs))
    for start in range(0, len(mine), rows):
        block = left[:, start : start + rows]
        apart = np.zeros((block.shape[1], right.shape[1]), np.uint16)
        for ours, others in zip(block, right, strict=True):
            apart += np.bitwise_count(ours[:, None] ^ others)
        pairs += [(mine[start + i], theirs[j]) for i, j in zip(*np.nonzero(apart <= most), strict=True)]
    return pairs

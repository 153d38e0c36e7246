"""Captions as token ids, and the batches of an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from caption_rt.vocabulary import Vocabulary
from caption_train.cache import ABSENT
from caption_train.datasets import CaptionedImage
from caption_train.errors import DatasetError
from caption_train.settings import Grouping
from caption_train.sources import FeatureSource

_POOL = 64  # batches whose captions are sorted together


class Batch(NamedTuple):
    """What one step learns from: n photos and m captions of them. NumPy arrays on the host, tensors in the graph."""

    loaded: Any
    """What a `caption_train.sources.FeatureSource` has loaded of the photos, float16 [n, ...]."""
    photos: Any
    """Which of the n photos each caption is of, int32 [m]."""
    tokens: Any
    """``<start>``, words, ``<end>``, then ``<pad>``, int64 [m, T]; **the longest caption first**: the decoder goes on
    with the first rows alone when the others have ended."""
    weights: Any
    """What each caption's loss counts, float32 [m]: 1, or a reward."""


def make_batch(
    loaded: NDArray[np.float16],
    photos: NDArray[np.integer[Any]],
    captions: Sequence[Sequence[int]],
    pad_id: int,
    weights: NDArray[np.float32] | None = None,
    *,
    length: int = 0,
) -> Batch:
    """Pad captions and sort them, the longest first.

    Args:
        loaded: Of n photos, float16 [n, ...].
        photos: Which of them each caption is of, int [m].
        captions: Token ids of each, ``<start>`` and ``<end>`` included.
        pad_id: Fills what is short.
        weights: Of each caption, float32 [m]; 1 if not given.
        length: Pad to so many tokens at least.
    """
    lengths = np.array([len(caption) for caption in captions])
    order = np.argsort(-lengths, kind="stable")
    tokens = np.full((len(captions), max(length, lengths.max())), pad_id, np.int64)
    for row, index in enumerate(order):
        tokens[row, : lengths[index]] = captions[index]
    weights = np.ones(len(captions), np.float32) if weights is None else weights
    return Batch(loaded, photos[order].astype(np.int32), tokens, weights[order])


@dataclass(frozen=True)
class CaptionData:
    """Photos and their captions as token ids."""

    images: tuple[CaptionedImage, ...]
    """The photos that have a grid."""
    rows: NDArray[np.int64]
    """Their rows in the cache, int64 [photos]."""
    captions: tuple[tuple[int, ...], ...]
    """The captions' token ids, ``<start>`` and ``<end>`` included; those of a photo stand together."""
    photo_of: NDArray[np.int64]
    """Index of each caption's photo, int64 [captions]."""
    lengths: NDArray[np.int64]
    """Tokens of each caption, int64 [captions]."""

    def __len__(self) -> int:
        """Number of captions."""
        return len(self.captions)

    @property
    def words(self) -> int:
        """Tokens that are to be predicted: all but ``<start>``."""
        return int(self.lengths.sum()) - len(self)


def caption_data(
    images: Sequence[CaptionedImage], rows: NDArray[np.int64], vocabulary: Vocabulary, max_words: int
) -> CaptionData:
    """Encode the captions of photos.

    Args:
        images: Photos with captions.
        rows: The photos' rows in the cache, int64 [len(images)]; photos with -1 are left out.
        vocabulary: Words to ids.
        max_words: Longer captions are cut.

    Raises:
        DatasetError: No photo could be read.
    """
    kept = [(image, row) for image, row in zip(images, rows, strict=True) if row != ABSENT]
    if not kept:
        raise DatasetError(f"none of the {len(images)} photos has a grid: nothing to train or validate on")
    captions, photo_of = [], []
    for index, (image, _) in enumerate(kept):
        for caption in image.captions:
            captions.append((vocabulary.start_id, *vocabulary.encode(caption)[:max_words], vocabulary.end_id))
            photo_of.append(index)
    return CaptionData(
        tuple(image for image, _ in kept),
        np.array([row for _, row in kept], np.int64),
        tuple(captions),
        np.array(photo_of, np.int64),
        np.array([len(caption) for caption in captions], np.int64),
    )


def batches_of_epoch(
    data: CaptionData, batch_size: int, seed: int, epoch: int, grouping: Grouping
) -> list[NDArray[np.int64]]:
    """The captions of every batch of an epoch; every caption is in one of them.

    Args:
        data: The captions.
        batch_size: Captions a batch; the last one may be smaller.
        seed: Of the run.
        epoch: From 0.
        grouping: ``photos``: the captions of a photo come together, so that it is encoded once for all of them, and
            photos whose longest captions are of similar length; ``lengths``: captions of similar length; ``random``:
            any.

    Returns:
        Indices int64 of the captions.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(data))
    batches = []
    if grouping == "photos":
        longest = np.zeros(len(data.images), np.int64)
        np.maximum.at(longest, data.photo_of, data.lengths)
        rank = rng.permutation(len(data.images))
        order = order[np.argsort(rank[data.photo_of[order]], kind="stable")]
        pools = _pools(order, batch_size)
        # Photos whose longest captions are alike: the batch's longest decides how many words it goes through.
        sorted_by = [longest[data.photo_of[pool]] * len(rank) + rank[data.photo_of[pool]] for pool in pools]
    elif grouping == "lengths":
        pools = _pools(order, batch_size)
        sorted_by = [data.lengths[pool] for pool in pools]
    else:
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    for pool, key in zip(pools, sorted_by, strict=True):
        ranked = pool[np.argsort(key, kind="stable")]
        batches += [ranked[i : i + batch_size] for i in range(0, len(ranked), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def _pools(order: NDArray[np.int64], batch_size: int) -> list[NDArray[np.int64]]:
    """Captions that are sorted among each other: so many batches' worth that lengths are alike, yet far from all."""
    size = batch_size * _POOL
    return [order[i : i + size] for i in range(0, len(order), size)]


def load_batch(
    data: CaptionData, chosen: NDArray[np.int64], source: FeatureSource, pad_id: int
) -> tuple[Batch, NDArray[np.int64]]:
    """Captions as a batch, every photo of theirs once.

    Args:
        data: Photos and captions.
        chosen: Indices of the captions, int64 [m].
        source: Where the photos' grids come from.
        pad_id: Fills short captions.

    Returns:
        The batch, and the indices of its photos, int64 [n].
    """
    photos, photo_of = np.unique(data.photo_of[chosen], return_inverse=True)
    captions = [data.captions[index] for index in chosen]
    return make_batch(source.load(data.rows[photos]), photo_of, captions, pad_id), photos


def tutorial_loss(cross_entropy: float, data: CaptionData) -> float:
    """The number that the tutorial prints: padding counts in the mean, though not in the sum.

    The tutorial sums over the words of a batch the batch's mean cross-entropy, zero at padding, and divides by the
    length to which all captions are padded; so its loss falls when one long caption joins the set.

    Args:
        cross_entropy: Sum over all captions of `data`, in nats.
        data: The captions.
    """
    return cross_entropy / (len(data) * int(data.lengths.max()))

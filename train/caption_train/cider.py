"""CIDEr-D of token ids, fast enough to be a reward: thousands of captions a second on one core.

Vedantam et al. 2015, "CIDEr: Consensus-based Image Description Evaluation", equations 1 to 4 with the changes of its
section 6 (CIDEr-D: clipped counts and a penalty of the difference in length). The value is that of pycocoevalcap, given
the same document frequencies; there they always come from the references that are scored, here from a fixed corpus,
the training references, as self-critical training has it (Rennie et al. 2017).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from caption_train.errors import DatasetError

_MAX_N = 4
_SIGMA = 6.0
_COOKED_PHOTOS = 20_000  # of which weights are kept: about half a gigabyte with five captions each

Tokens = Sequence[int]
_Counts = list[Counter[tuple[int, ...]]]
_Cooked = tuple[list[dict[tuple[int, ...], list[tuple[int, float, float]]]], list[int]]


class CiderD:
    """Scores captions against the references of a fixed corpus of photos."""

    def __init__(self, references: Sequence[Sequence[Tokens]]) -> None:
        """Count the document frequencies: in the references of how many photos an n-gram occurs.

        Args:
            references: For each photo its real captions, each as ids of words. Ids need not be those of a vocabulary:
                words that the model does not know should have ids of their own, or all of them would match each other.

        Raises:
            DatasetError: There is no photo, or one without a reference.
        """
        empty = next((index for index, captions in enumerate(references) if not captions), None)
        if not references or empty is not None:
            raise DatasetError(
                "CIDEr needs at least one photo with references"
                if not references
                else f"photo {empty} has no caption to score against"
            )
        self._references = references
        self._log_photos = math.log(len(references))
        frequency: Counter[tuple[int, ...]] = Counter()
        for captions in references:
            frequency.update({gram for caption in captions for counts in _count(caption) for gram in counts})
        # An n-gram of one photo weighs as much as one of none, so that the long tail need not be kept.
        self._weight: dict[Hashable, float] = {
            gram: self._log_photos - math.log(count) for gram, count in frequency.items() if count > 1
        }
        self._cooked = lru_cache(_COOKED_PHOTOS)(self._cook)

    def scores(self, photos: NDArray[np.int64], captions: Sequence[Tokens]) -> NDArray[np.float64]:
        """CIDEr-D of captions, each against the references of its photo.

        Args:
            photos: The photo of each caption, as an index into the references, int64 [m].
            captions: Ids of words, as those of the references; an empty caption scores 0.

        Returns:
            float64 [m], 0 to 10.
        """
        pairs = zip(photos.tolist(), captions, strict=True)
        return np.array([self._score(photo, caption) for photo, caption in pairs], np.float64)

    def _score(self, photo: int, caption: Tokens) -> float:
        grams, lengths = self._cooked(photo)
        length = _length(caption)
        penalties = [math.exp(-((length - other) ** 2) / (2 * _SIGMA**2)) for other in lengths]
        total = 0.0
        for counts, index in zip(_count(caption), grams, strict=True):
            similarity, square = 0.0, 0.0
            for gram, count in counts.items():
                weight = count * self._weight.get(gram, self._log_photos)
                square += weight * weight
                for reference, theirs, normalised in index.get(gram, ()):
                    similarity += min(weight, theirs) * normalised * penalties[reference]
            if square:
                total += similarity / math.sqrt(square)
        return 10 * total / _MAX_N / len(lengths)

    def _cook(self, photo: int) -> _Cooked:
        """For every n: n-gram -> (reference, weight, weight over the reference's norm); the references' lengths."""
        grams: list[dict[tuple[int, ...], list[tuple[int, float, float]]]] = [{} for _ in range(_MAX_N)]
        captions = self._references[photo]
        for reference, caption in enumerate(captions):
            for counts, index in zip(_count(caption), grams, strict=True):
                weights = {gram: count * self._weight.get(gram, self._log_photos) for gram, count in counts.items()}
                norm = math.sqrt(sum(weight * weight for weight in weights.values()))
                for gram, weight in weights.items():
                    if weight:
                        index.setdefault(gram, []).append((reference, weight, weight / norm))
        return grams, [_length(caption) for caption in captions]


def _count(caption: Tokens) -> _Counts:
    """The n-grams of a caption with their numbers, n from 1 to 4."""
    return [Counter(zip(*(caption[i:] for i in range(n)), strict=False)) for n in range(1, _MAX_N + 1)]


def _length(caption: Tokens) -> int:
    """What pycocoevalcap takes for the length: the number of bigrams."""
    return max(0, len(caption) - 1)

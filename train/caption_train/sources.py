"""Where a training step's grids come from: a cache now; a network that is trained along, over a cache below it, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from caption_train.cache import GridCache


class FeatureSource(Protocol):
    """Rows of photos to their grids: first on the host, then in the graph of the training step.

    `load` runs in a thread of its own, one batch ahead of the step; `grid` is traced into the step, and what it takes
    from `variables` gets a gradient.
    """

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Places P and channels C of the grid that the encoder is given."""

    @property
    def loaded_shape(self) -> tuple[int, ...]:
        """Shape of what `load` gives of one photo."""

    @property
    def variables(self) -> Sequence[Any]:
        """Keras variables that are trained along with the captioner's; none where the grids are fixed."""

    @property
    def parts(self) -> Mapping[str, Any]:
        """What a checkpoint holds besides the captioner: names to models and variables. None where nothing changes."""

    def save(self, folder: Path) -> None:
        """Write an extractor that learns into a run folder; called when the model is the best so far."""

    def load(self, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        """What is kept of photos, float16 [n, *loaded_shape].

        Args:
            rows: Their rows in the cache, int64 [n].
        """

    def grid(self, loaded: tf.Tensor, *, training: bool) -> tf.Tensor:
        """The photos' grids, of a floating type, [n, P, C].

        Args:
            loaded: From `load`, float16 [n, *loaded_shape].
            training: Whether in a step that learns, for what goes otherwise there (normalisation's statistics).
        """


class CachedGrids:
    """The grids of a frozen extractor, as they lie in the cache."""

    variables: Sequence[Any] = ()
    parts: Mapping[str, Any] = {}

    def __init__(self, cache: GridCache) -> None:
        """Take the cache that the extractor has filled."""
        self._cache = cache

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Places P and channels C."""
        return self._cache.grid_shape

    @property
    def loaded_shape(self) -> tuple[int, ...]:
        """That of the grid."""
        return self._cache.grid_shape

    def save(self, folder: Path) -> None:
        """Nothing: the extractor is as it was."""

    def load(self, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        """Read grids, float16 [n, P, C]; see `FeatureSource`."""
        return self._cache.gather(rows)

    def grid(self, loaded: tf.Tensor, *, training: bool) -> tf.Tensor:
        """As they are, float16 [n, P, C]: the encoder takes any floating type."""
        return loaded

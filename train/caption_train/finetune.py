"""Fine-tuning: the extractor's upper blocks learn with the captioner, over a cache of what the lower ones say.

The extractor is cut before a block. Below the cut nothing changes, so that a photo goes through that part once and its
output, one tensor, is kept in a `GridCache`; what is above runs in every step and gets a gradient. Photos cannot be
augmented then, since a crop or another light would change what is cached.

Normalisation keeps the statistics that it has, in steps that learn as well (Keras' ``training=False``): batches are
small and few, and in the network of 2015 the statistics are folded into the kernels. Kernels and offsets (beta) learn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from caption_rt.errors import OptionsError
from caption_train.cache import GridCache
from caption_train.inception import (
    ExtractorConfig,
    block_before,
    blocks_beside,
    build_extractor,
    copy_weights,
    save_extractor,
)


def check_cut(layer: str, trainable_from: str) -> None:
    """See that an extractor that ends at a block can be cut before another one.

    Raises:
        OptionsError: It cannot: there is no such block, none before it, or it comes after the grid's.
    """
    blocks = blocks_beside(layer)
    if trainable_from not in blocks[1:]:
        raise OptionsError(f"extractor: trainable_from must be one of {', '.join(blocks[1:])}, not {trainable_from!r}")
    if blocks.index(trainable_from) > blocks.index(layer):
        raise OptionsError(
            f"extractor: trainable_from {trainable_from} comes after {layer}, from which the grid is taken: nothing "
            "would be learnt"
        )


def lower_part(
    extractor: keras.Model, config: ExtractorConfig, trainable_from: str
) -> tuple[keras.Model, ExtractorConfig]:
    """What is below the cut, as an extractor of its own whose grid is the input of the first block that learns.

    It is the very extractor, cache key included, that a run with ``layer`` set to that block has.

    Args:
        extractor: The whole.
        config: Of the whole.
        trainable_from: The first block that learns.
    """
    below = replace(config, layer=block_before(trainable_from))
    lower = build_extractor(below)
    copy_weights(extractor, lower)
    return lower, below


def upper_part(extractor: keras.Model, trainable_from: str) -> keras.Model:
    """What is above the cut; its layers are the extractor's own, so that the extractor learns with it.

    Returns:
        A model: a block's output [n, rows, columns, channels] -> the grid float32 [n, rows, columns, channels].
    """
    return keras.Model(extractor.get_layer(block_before(trainable_from)).output, extractor.output, name="upper")


class FineTunedBlocks:
    """The upper part of an extractor over a cache of its lower part; a `caption_train.sources.FeatureSource`."""

    def __init__(
        self,
        cache: GridCache,
        extractor: keras.Model,
        config: ExtractorConfig,
        trainable_from: str,
        dtype: tf.DType = tf.float32,
    ) -> None:
        """Cut the extractor.

        Args:
            cache: What the lower part (see `lower_part`) said of the photos.
            extractor: The whole, which learns in place.
            config: Of the whole.
            trainable_from: The first block that learns.
            dtype: float32 or bfloat16, in which the upper part computes; its weights are float32 in any case.
        """
        self._cache, self._extractor, self._config = cache, extractor, config
        self._upper = upper_part(extractor, trainable_from)
        rows, columns, channels = extractor.output_shape[1:]
        self._grid_shape = (rows * columns, channels)
        if dtype == tf.bfloat16:
            for layer in self._upper.layers[:-1]:  # the last one gives the grid in float32
                layer.dtype_policy = keras.DTypePolicy("mixed_bfloat16")

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Places P and channels C of the whole extractor's grid."""
        return self._grid_shape

    @property
    def loaded_shape(self) -> tuple[int, ...]:
        """Places and channels of the lower part's output."""
        return self._cache.grid_shape

    @property
    def variables(self) -> Sequence[Any]:
        """Kernels and offsets above the cut."""
        trainable: Sequence[Any] = self._upper.trainable_variables
        return trainable

    @property
    def parts(self) -> Mapping[str, Any]:
        """The upper part."""
        return {"extractor": self._upper}

    def save(self, folder: Path) -> None:
        """Write the whole extractor as it is now into a run folder."""
        save_extractor(self._extractor, self._config, folder)

    def load(self, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        """Read the lower part's outputs, float16 [n, places, channels]; see `FeatureSource`."""
        return self._cache.gather(rows)

    def grid(self, loaded: tf.Tensor, *, training: bool) -> tf.Tensor:
        """Run the upper part, float32 [n, P, C]; the statistics stay as they are whether it learns or not."""
        shape = self._upper.input_shape[1:]
        blocks = tf.reshape(tf.cast(loaded, tf.float32), (-1, *shape))
        return tf.reshape(self._upper(blocks, training=False), (-1, *self._grid_shape))

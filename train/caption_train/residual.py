"""A small residual network whose grid lies on the photo where InceptionV3's does: what a teacher's pupil is made of.

A student has to say what its teacher says at the same place. InceptionV3 at 299 pixels has its 8 x 8 grid (from mixed8
on) around the pixels 37, 69, ..., 261: convolutions without padding leave a margin. Here a photo of 224 pixels goes
through the same grids of 35, 17 and 8 places to a side, at the same shares of the photo's side to within half a
percent, and nothing is resampled.

The blocks are those of He et al. 2016, "Deep Residual Learning for Image Recognition": two 3x3 convolutions each where
there are many places, and bottlenecks (figure 5) on the last grid, where most of the weights would be. At the same
products a training step takes half the time that InceptionV3's narrow branches take: benchmarks/student.py.
"""

from __future__ import annotations

import keras
import tensorflow as tf

STAGES = ("stage1", "stage2", "stage3")
"""Names of the outputs that a grid may be taken from, first to last."""
SMALLEST = 49
"""Pixels to a side of the smallest photo: its last grid has one place."""

_STEM_CHANNELS, _STEM_KERNEL, _STEM_STRIDE = 32, 7, 3
_BLOCKS = (2, 4, 4)
_CHANNELS = (64, 128, 384)
_BOTTLENECK = 128  # channels of the last stage's 3x3 convolutions
_SHRINK = 8  # of the three stages together
BATCH_NORM_EPSILON = 1e-3
_FUSED_CHANNELS = 16


def scaled_filters(filters: int, width: float) -> int:
    """Filters of a convolution at a width: the nearest multiple of 8 (which vector units like), at least 8."""
    return max(8, int(filters * width + 4) // 8 * 8)


def normalised(
    x: keras.KerasTensor, number: int, filters: int, kernel: int | tuple[int, int], stride: int, padding: str
) -> keras.KerasTensor:
    """A convolution and its batch normalisation, named by their number in the order of creation."""
    x = keras.layers.Conv2D(
        filters,
        kernel,
        strides=stride,
        padding=padding,
        use_bias=False,
        # He et al. 2015: what ReLU takes away is put back. With Keras' default the grid of an untrained InceptionV3
        # shrinks to 1e-4 at mixed10, and nothing can be learnt from it.
        kernel_initializer="he_normal",
        name=f"conv_{number}",
    )(x)
    # The moving statistics matter in training from scratch alone: at Keras' 0.99 they lag behind weights that still
    # change fast, and the network computes something else when it is used than when it learned.
    return BatchNormalization(scale=False, epsilon=BATCH_NORM_EPSILON, momentum=0.9, name=f"norm_{number}")(x)


class BatchNormalization(keras.layers.BatchNormalization):
    """Keras' batch normalisation (Ioffe and Szegedy 2015) with TensorFlow's kernel for it in training.

    Keras makes it of a dozen operations, each of which goes over all values, and its gradient of more: without them a
    step of the small network takes half the time. The numbers are the same but for rounding. In use, where the
    statistics are frozen, and where channels do not come in sixteens, it is Keras' own; the class has the same name
    because files of weights know layers by it.
    """

    def call(self, inputs: tf.Tensor, training: bool | None = None, mask: tf.Tensor | None = None) -> tf.Tensor:
        """Normalise [n, rows, columns, channels] over all but the channels; see `keras.layers.BatchNormalization`."""
        # Of other numbers of channels oneDNN has but a reference implementation, half as fast as Keras' operations.
        if not (training and self.trainable) or inputs.shape[-1] % _FUSED_CHANNELS:
            return super().call(inputs, training=training, mask=mask)
        offset = tf.convert_to_tensor(self.beta)
        nothing = tf.zeros((0,))
        normalised, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=tf.cast(inputs, self.compute_dtype),
            scale=tf.ones_like(offset),
            offset=offset,
            mean=nothing,
            variance=nothing,
            epsilon=self.epsilon,
            is_training=True,
        )
        # The kernel gives the unbiased estimate, Keras keeps the other one.
        values = tf.cast(tf.size(inputs) / tf.size(offset), tf.float32)
        variance *= (values - 1) / values
        for kept, new in ((self.moving_mean, mean), (self.moving_variance, variance)):
            kept.assign(kept * self.momentum + new * (1 - self.momentum))
        return normalised


class _Builder:
    """Adds layers to a functional graph, numbering convolutions as they are made."""

    def __init__(self, width: float) -> None:
        self.width = width
        self.convolutions = 0

    def conv(
        self, x: keras.KerasTensor, channels: int, kernel: int, stride: int = 1, *, relu: bool = True
    ) -> keras.KerasTensor:
        number = self.convolutions
        self.convolutions += 1
        padding = "valid" if stride > 1 else "same"
        x = normalised(x, number, scaled_filters(channels, self.width), kernel, stride, padding)
        return keras.layers.ReLU(name=f"relu_{number}")(x) if relu else x

    def block(self, x: keras.KerasTensor, channels: int, bottleneck: int | None, name: str) -> keras.KerasTensor:
        if bottleneck is None:
            y = self.conv(x, channels, 3)
            y = self.conv(y, channels, 3, relu=False)
        else:
            y = self.conv(x, bottleneck, 1)
            y = self.conv(y, bottleneck, 3)
            y = self.conv(y, channels, 1, relu=False)
        return keras.layers.ReLU(name=name)(keras.layers.Add()([x, y]))


def residual_grid(images: keras.KerasTensor, width: float, layer: str) -> keras.KerasTensor:
    """The network up to a stage.

    Args:
        images: [n, S, S, 3], in -1..1.
        width: Multiplier on the channels of every convolution.
        layer: The stage whose output is the grid.

    Returns:
        The stage's output; at S = 224 and width 1 [n, 35, 35, 64], [n, 17, 17, 128] or [n, 8, 8, 384].
    """
    builder = _Builder(width)
    x = keras.layers.Cropping2D((_margins(images.shape[1]),) * 2, name="margin")(images)
    x = builder.conv(x, _STEM_CHANNELS, _STEM_KERNEL, _STEM_STRIDE)
    for stage, (name, count, channels) in enumerate(zip(STAGES, _BLOCKS, _CHANNELS, strict=True)):
        x = builder.conv(x, channels, 3, 2)
        bottleneck = _BOTTLENECK if stage == len(STAGES) - 1 else None
        for number in range(1, count + 1):
            x = builder.block(x, channels, bottleneck, name if number == count else f"{name}_{number}")
        if name == layer:
            break
    return x


def convolutions_below_stage(stage: str) -> int:
    """How many convolutions come before a stage: the number of the stage's first one."""
    each = [1 + count * (3 if name == STAGES[-1] else 2) for name, count in zip(STAGES, _BLOCKS, strict=True)]
    return 1 + sum(each[: STAGES.index(stage)])


def _margins(size: int) -> tuple[int, int]:
    """Pixels to leave out at either end, so that the convolutions of stride 2 leave no place over."""
    places = (size - _STEM_KERNEL) // _STEM_STRIDE + 1
    places -= (places - (_SHRINK - 1)) % _SHRINK
    margin = size - (_STEM_KERNEL + (places - 1) * _STEM_STRIDE)
    return margin // 2, margin - margin // 2

"""The extractor that turns a photo into a grid: InceptionV3 without its top at any width, or a small residual network.

The topology is that of Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision" (section 6), in
the variant of ``keras.applications.InceptionV3``. A width multiplier (Howard et al. 2017, "MobileNets",
section 3.3) scales the filters of every convolution; at width 1.0 the network is Keras' own, convolution by
convolution and in the same order, which a test holds by loading the same weights into both.

The block that the grid is taken from says which network it is: mixed0 to mixed10 are InceptionV3's, stage1 to stage3
those of `caption_train.residual`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from caption_rt.errors import OptionsError
from caption_train.checkpoints import tensorflow_errors
from caption_train.errors import TrainingError, first_line
from caption_train.files import write_json
from caption_train.residual import (
    BATCH_NORM_EPSILON,
    SMALLEST,
    STAGES,
    convolutions_below_stage,
    normalised,
    residual_grid,
    scaled_filters,
)

logger = logging.getLogger(__name__)

BLOCKS = tuple(f"mixed{i}" for i in range(11))
"""Names of InceptionV3's outputs that a grid may be taken from, first to last."""

DISTILLATION = "distillation.json"
"""Beside an extractor that was distilled: from which teacher, on what and how."""

_INCEPTION_SMALLEST = 75
_HDF5_OVERHEAD = 4096  # bytes for every array in a file, at most


@dataclass(frozen=True)
class ExtractorConfig:
    """Everything that decides what an extractor's grid means."""

    width: float = 1.0
    """Multiplier on the filters of every convolution; InceptionV3's 1.0 is Keras' network."""
    size: int = 299
    """Height and width of the photo that the network sees, in pixels."""
    layer: str = "mixed10"
    """The block whose output is the grid."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            OptionsError: A width that is not positive, a photo too small for the network, an unknown block.
        """
        if not 0 < self.width <= 4:
            raise OptionsError(f"extractor width {self.width} is out of range: give a number above 0, at most 4")
        if self.layer not in BLOCKS + STAGES:
            known = ", ".join(BLOCKS + STAGES)
            raise OptionsError(f"extractor layer {self.layer!r} does not exist: choose one of {known}")
        name, least = ("the network", SMALLEST) if self.layer in STAGES else ("InceptionV3", _INCEPTION_SMALLEST)
        if self.size < least:
            raise OptionsError(f"extractor size {self.size} is too small: {name} needs at least {least} pixels")


@dataclass(frozen=True)
class _Conv:
    """One convolution with its batch normalisation and ReLU."""

    filters: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "same"


@dataclass(frozen=True)
class _Fork:
    """Convolutions side by side on the same input, their outputs concatenated."""

    arms: tuple[_Conv, ...]


@dataclass(frozen=True)
class _Pool:
    """A 3x3 pooling: average at stride 1, maximum at stride 2 (which shrinks the grid)."""

    stride: int = 1


_Chain = tuple[_Conv | _Fork | _Pool, ...]


def _square(filters: int, kernel: int, stride: int = 1, padding: str = "same") -> _Conv:
    return _Conv(filters, (kernel, kernel), stride, padding)


_STEM_FILTERS = 32
_STEM: _Chain = (
    _square(_STEM_FILTERS, 3, 2, "valid"),
    _square(32, 3, 1, "valid"),
    _square(64, 3),
    _Pool(2),
    _square(80, 1, 1, "valid"),
    _square(192, 3, 1, "valid"),
    _Pool(2),
)


def _block_35(pool_filters: int) -> tuple[_Chain, ...]:
    """The 35x35 blocks (figure 5 of the paper, with one 5x5 kept)."""
    return (
        (_Conv(64),),
        (_Conv(48), _square(64, 5)),
        (_Conv(64), _square(96, 3), _square(96, 3)),
        (_Pool(), _Conv(pool_filters)),
    )


def _block_17(inner: int) -> tuple[_Chain, ...]:
    """The 17x17 blocks with 7x7 convolutions factorised into 1x7 and 7x1 (figure 6)."""
    wide, tall = (1, 7), (7, 1)
    return (
        (_Conv(192),),
        (_Conv(inner), _Conv(inner, wide), _Conv(192, tall)),
        (_Conv(inner), _Conv(inner, tall), _Conv(inner, wide), _Conv(inner, tall), _Conv(192, wide)),
        (_Pool(), _Conv(192)),
    )


def _block_8() -> tuple[_Chain, ...]:
    """The 8x8 blocks with an expanded filter bank (figure 7)."""
    fork = _Fork((_Conv(384, (1, 3)), _Conv(384, (3, 1))))
    return (
        (_Conv(320),),
        (_Conv(384), fork),
        (_Conv(448), _square(384, 3), fork),
        (_Pool(), _Conv(192)),
    )


_MIXED: tuple[tuple[_Chain, ...], ...] = (
    _block_35(32),
    _block_35(64),
    _block_35(64),
    (
        (_square(384, 3, 2, "valid"),),
        (_Conv(64), _square(96, 3), _square(96, 3, 2, "valid")),
        (_Pool(2),),
    ),
    _block_17(128),
    _block_17(160),
    _block_17(160),
    _block_17(192),
    (
        (_Conv(192), _square(320, 3, 2, "valid")),
        (_Conv(192), _Conv(192, (1, 7)), _Conv(192, (7, 1)), _square(192, 3, 2, "valid")),
        (_Pool(2),),
    ),
    _block_8(),
    _block_8(),
)


def blocks_beside(block: str) -> tuple[str, ...]:
    """All blocks of the network that a block belongs to, first to last.

    Raises:
        OptionsError: There is no such block.
    """
    for blocks in (BLOCKS, STAGES):
        if block in blocks:
            return blocks
    raise OptionsError(f"extractor: there is no block {block!r}: there are {', '.join(BLOCKS + STAGES)}")


def block_before(block: str) -> str:
    """The block whose output is another one's whole input; the other one is not the first of its network."""
    blocks = blocks_beside(block)
    return blocks[blocks.index(block) - 1]


def convolutions_below(block: str) -> int:
    """How many convolutions come before a block in the order of creation: the number of the block's first one."""
    if block in STAGES:
        return convolutions_below_stage(block)

    def count(steps: _Chain) -> int:
        return sum(len(step.arms) if isinstance(step, _Fork) else isinstance(step, _Conv) for step in steps)

    below = _MIXED[: BLOCKS.index(block)]
    return count(_STEM) + sum(count(branch) for branches in below for branch in branches)


class _Builder:
    """Adds layers to a functional graph, numbering convolutions as Keras creates them."""

    def __init__(self, width: float) -> None:
        self.width = width
        self.convolutions = 0

    def conv(self, x: keras.KerasTensor, spec: _Conv) -> keras.KerasTensor:
        number = self.convolutions
        self.convolutions += 1
        filters = scaled_filters(spec.filters, self.width)
        x = normalised(x, number, filters, spec.kernel, spec.stride, spec.padding)
        return keras.layers.ReLU(name=f"relu_{number}")(x)

    def pool(self, x: keras.KerasTensor, spec: _Pool) -> keras.KerasTensor:
        if spec.stride == 1:
            return keras.layers.AveragePooling2D(3, strides=1, padding="same")(x)
        return keras.layers.MaxPooling2D(3, strides=spec.stride)(x)

    def chain(self, x: keras.KerasTensor, steps: _Chain) -> keras.KerasTensor:
        for step in steps:
            if isinstance(step, _Conv):
                x = self.conv(x, step)
            elif isinstance(step, _Pool):
                x = self.pool(x, step)
            else:
                x = keras.layers.Concatenate()([self.conv(x, arm) for arm in step.arms])
        return x


def _inception_grid(x: keras.KerasTensor, width: float, layer: str) -> keras.KerasTensor:
    """InceptionV3 up to a block, from photos in -1..1."""
    builder = _Builder(width)
    x = builder.chain(x, _STEM)
    for name, branches in zip(BLOCKS, _MIXED, strict=True):
        x = keras.layers.Concatenate(name=name)([builder.chain(x, branch) for branch in branches])
        if name == layer:
            break
    return x


def build_extractor(config: ExtractorConfig) -> keras.Model:
    """Build the extractor with random weights.

    Args:
        config: Width, size of the photo and block.

    Returns:
        A Keras model: ``images`` uint8 (or float) [n, size, size, 3] RGB in 0..255 -> grid float32
        [n, rows, columns, channels]. Scaling to [-1, 1] is inside.
    """
    images = keras.Input((config.size, config.size, 3), name="images")
    x = keras.layers.Rescaling(1 / 127.5, offset=-1, name="rescale")(images)
    if config.layer in STAGES:
        x = residual_grid(x, config.width, config.layer)
    else:
        x = _inception_grid(x, config.width, config.layer)
    # Under mixed precision the grid leaves in float32 all the same: it is compared, cached and exported.
    grid = keras.layers.Activation("linear", dtype="float32", name="grid")(x)
    return keras.Model(images, grid, name="extractor")


def _convolutions(model: keras.Model) -> Iterator[tuple[keras.layers.Conv2D, keras.layers.BatchNormalization]]:
    """The convolutions of a network with their normalisations, in order of creation.

    Creation order is read from the layers' trailing numbers, so that it works for Keras' own ``conv2d_12`` as well.
    """

    def number(layer: keras.layers.Layer) -> int:
        tail = layer.name.rsplit("_", 1)[-1]
        return int(tail) if tail.isdigit() else -1

    convolutions = sorted((x for x in model.layers if isinstance(x, keras.layers.Conv2D)), key=number)
    norms = sorted((x for x in model.layers if isinstance(x, keras.layers.BatchNormalization)), key=number)
    return zip(convolutions, norms, strict=True)


def copy_weights(source: keras.Model, target: keras.Model) -> None:
    """Copy convolution by convolution from one InceptionV3 into another, which may end at an earlier block.

    Args:
        source: For instance ``keras.applications.InceptionV3(include_top=False)``.
        target: An extractor of the same width.

    Raises:
        TrainingError: The shapes differ.
    """
    pairs = list(_convolutions(source))
    for index, (convolution, norm) in enumerate(_convolutions(target)):
        if index >= len(pairs):
            raise TrainingError(f"the source network has {len(pairs)} convolutions, the extractor needs more")
        for mine, theirs in ((convolution, pairs[index][0]), (norm, pairs[index][1])):
            try:
                mine.set_weights(theirs.get_weights())
            except ValueError as exc:
                raise TrainingError(
                    f"convolution {index} of the source network has another shape: {first_line(exc)}"
                ) from exc


def load_folded_npz(model: keras.Model, path: Path, *, learnt_from: str | None = None) -> None:
    """Load the 2015 InceptionV3 whose batch normalisation is folded into float16 kernels and biases.

    The file holds ``LAYER/kernel`` [kh, kw, in, out] and ``LAYER/bias`` [out]; ``layers.json`` beside it lists the
    layers in Keras' order. The normalisation becomes the bias alone: beta = bias, mean 0, variance 1 - epsilon.

    Args:
        model: The extractor.
        path: The ``.npz``.
        learnt_from: From this block on a kernel may be missing in the file: it keeps its random values, and is learnt.

    Raises:
        TrainingError: The file cannot be read, a kernel that the network needs is missing, or a shape differs.
    """
    listing = path.with_name("layers.json")
    layers = list(_convolutions(model))
    needed = len(layers) if learnt_from is None else convolutions_below(learnt_from)
    try:
        names = [str(row[0]) for row in json.loads(listing.read_text(encoding="utf-8"))]
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            for index, (convolution, norm) in enumerate(layers):
                name = names[index] if index < len(names) else f"layer {index}"
                _set_folded(convolution, norm, arrays, name, path, needed=index < needed)
    # What NumPy stumbles over in a file that is no .npz depends on the file's first bytes.
    except (OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, zipfile.BadZipFile) as exc:
        raise TrainingError(
            f"extractor weights {path} (with {listing.name} beside it) cannot be read: {first_line(exc)}"
        ) from exc


def _set_folded(
    convolution: keras.layers.Conv2D,
    norm: keras.layers.BatchNormalization,
    arrays: Mapping[str, NDArray[np.float16]],
    name: str,
    path: Path,
    *,
    needed: bool,
) -> None:
    """One layer of `load_folded_npz`."""
    if f"{name}/kernel" in arrays:
        kernel = arrays[f"{name}/kernel"].astype(np.float32)
    elif needed:
        raise TrainingError(
            f"{path} has no kernel for {name} ({convolution.name}): take the grid from an earlier block, such as "
            "mixed8, or have it learnt (setting trainable_from of the extractor)"
        )
    else:
        logger.info("%s has no kernel for %s: it starts at random and is learnt", path.name, name)
        kernel = np.asarray(convolution.kernel)
    bias = arrays[f"{name}/bias"].astype(np.float32)
    if kernel.shape != tuple(convolution.kernel.shape) or bias.shape != kernel.shape[3:]:
        raise TrainingError(
            f"{path}: {name} is {kernel.shape} with a bias of {bias.shape}, the network needs "
            f"{tuple(convolution.kernel.shape)}: is the width 1.0?"
        )
    convolution.set_weights([kernel])
    norm.set_weights([bias, np.zeros_like(bias), np.full_like(bias, 1 - BATCH_NORM_EPSILON)])


def load_extractor_weights(model: keras.Model, weights: str, *, learnt_from: str | None = None) -> str:
    """Fill an extractor from ``imagenet``, ``none`` or a file.

    Args:
        model: The extractor.
        weights: ``imagenet`` (Keras downloads them; width 1.0 only), ``none`` (random initialisation stays), or a
            path: ``.weights.h5`` of this extractor, another ``.h5`` of Keras' InceptionV3 without top (the very file
            that Keras downloads; width 1.0 only), or ``.npz`` as `load_folded_npz` reads it.
        learnt_from: See `load_folded_npz`.

    Returns:
        A key that changes whenever the weights do, for caches: SHA-256 of the weights.

    Raises:
        TrainingError: Weights that cannot be had, or do not fit.
    """
    if weights == "imagenet":
        _load_keras(model, weights)
    elif weights != "none":
        path = Path(weights)
        if not path.is_file():
            raise TrainingError(f"extractor weights {path} do not exist: give a file, 'imagenet' or 'none'")
        if path.suffix == ".npz":
            load_folded_npz(model, path, learnt_from=learnt_from)
        elif path.name.endswith(".weights.h5"):
            _load_own(model, path)
        elif path.suffix == ".h5":
            _load_keras(model, str(path))
        else:
            raise TrainingError(f"extractor weights {path} are of an unknown kind: give .weights.h5, .h5 or .npz")
    return weights_key(model)


def _load_own(model: keras.Model, path: Path) -> None:
    try:
        with warnings.catch_warnings():
            # Of a file that does not fit, Keras warns a dozen times before it raises.
            warnings.simplefilter("ignore", UserWarning)
            model.load_weights(path)
    except (OSError, ValueError, KeyError) as exc:
        raise TrainingError(f"extractor weights {path} do not fit this extractor: {first_line(exc)}") from exc


def _load_keras(model: keras.Model, weights: str) -> None:
    """Copy the weights of Keras' own InceptionV3: "imagenet", or such a file."""
    if model.get_layer("conv_0").filters != _STEM_FILTERS:
        raise TrainingError(f"the weights {weights} are of InceptionV3 at width 1.0, this extractor has another width")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where Keras' progress of a download belongs
            source = keras.applications.InceptionV3(include_top=False, weights=weights)
    except Exception as exc:  # Keras raises a bare Exception for a failed download
        if weights != "imagenet":
            raise TrainingError(f"{weights} does not hold Keras' InceptionV3 without top: {first_line(exc)}") from exc
        raise TrainingError(
            f"Keras could not download the ImageNet weights ({first_line(exc)}): give a weights file instead"
        ) from exc
    copy_weights(source, model)


def weights_key(model: keras.Model) -> str:
    """SHA-256 over a model's weights in order: what a cache of its outputs is keyed by."""
    digest = hashlib.sha256()
    for array in model.get_weights():
        digest.update(str(array.shape).encode())
        digest.update(np.ascontiguousarray(array, dtype=np.float32).tobytes())
    return digest.hexdigest()


def save_extractor(model: keras.Model, config: ExtractorConfig, folder: Path) -> None:
    """Write ``extractor.weights.h5`` and ``extractor.json`` into a folder, each whole or not at all.

    Raises:
        TrainingError: The weights cannot be written.
        OSError: The folder cannot be made, or ``extractor.json`` not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("extractor-*.weights.h5"):
        left.unlink()  # of a process that was killed while it wrote
    temporary, target = folder / f"extractor-{os.getpid()}.weights.h5", folder / "extractor.weights.h5"
    try:
        # On a full disk HDF5 writes a traceback for everything that it could not write: it is given a file for which
        # there is room.
        temporary.write_bytes(bytes(4 * model.count_params() + _HDF5_OVERHEAD * len(model.weights)))
        model.save_weights(temporary)
        os.replace(temporary, target)
    except (OSError, RuntimeError) as exc:  # HDF5 has both
        raise TrainingError(f"{target} cannot be written: {first_line(exc)}") from exc
    finally:
        temporary.unlink(missing_ok=True)
    write_json(folder / "extractor.json", asdict(config))


def load_extractor(folder: Path) -> tuple[keras.Model, ExtractorConfig]:
    """Read an extractor that `save_extractor` wrote.

    Raises:
        TrainingError: The folder does not hold one, or its weights do not fit.
    """
    try:
        config = ExtractorConfig(**json.loads((folder / "extractor.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as exc:
        raise TrainingError(f"{folder} holds no extractor: extractor.json cannot be read ({exc})") from exc
    model = build_extractor(config)
    load_extractor_weights(model, str(folder / "extractor.weights.h5"))
    return model, config


def extract_with(model: keras.Model) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    """The extractor as a function of arrays: uint8 [n, S, S, 3] -> float32 [n, P, C], places in row-major order.

    The function raises TrainingError where TensorFlow cannot go on (no memory).
    """
    rows, columns, channels = model.output_shape[1:]
    forward = tf.function(
        lambda photos: model(photos, training=False),
        input_signature=[tf.TensorSpec((None, *model.input_shape[1:]), tf.uint8)],
    )

    def extract(photos: NDArray[np.uint8]) -> NDArray[np.float32]:
        with tensorflow_errors(f"the extractor on {len(photos)} photos"):
            return np.asarray(forward(photos)).reshape(-1, rows * columns, channels)

    return extract

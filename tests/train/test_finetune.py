from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from caption_rt.errors import OptionsError
from caption_train.cache import GridCache
from caption_train.errors import TrainingError
from caption_train.finetune import FineTunedBlocks, check_cut, lower_part, upper_part
from caption_train.inception import (
    BLOCKS,
    ExtractorConfig,
    build_extractor,
    convolutions_below,
    extract_with,
    load_extractor,
    load_extractor_weights,
    weights_key,
)

pytestmark = pytest.mark.tf

TINY = ExtractorConfig(width=0.1, size=75, layer="mixed3")


@pytest.fixture(scope="module")
def extractor() -> keras.Model:
    keras.utils.set_random_seed(3)
    return build_extractor(TINY)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 75, 75, 3), dtype=np.uint8)


def source(
    folder: Path, extractor: keras.Model, pixels: np.ndarray, trainable_from: str, dtype: tf.DType = tf.float32
) -> FineTunedBlocks:
    below, _ = lower_part(extractor, TINY, trainable_from)
    outputs = extract_with(below)(pixels)
    cache = GridCache.open(folder, "key", outputs.shape[1:])
    paths = []
    for index in range(len(pixels)):
        paths.append(folder / f"{index}.bin")
        paths[-1].write_bytes(bytes([index]))
    cache.fill(paths, extract_with(below), read=lambda path: pixels[int(path.stem)])
    return FineTunedBlocks(cache, extractor, TINY, trainable_from, dtype)


def lower(extractor: keras.Model, pixels: np.ndarray) -> np.ndarray:
    return extract_with(lower_part(extractor, TINY, "mixed2")[0])(pixels).astype(np.float16)


@pytest.mark.parametrize("block", ["mixed1", "mixed3"])
def test_both_parts_are_the_whole(extractor: keras.Model, pixels: np.ndarray, tmp_path: Path, block: str) -> None:
    made = source(tmp_path, extractor, pixels, block)
    whole = extract_with(extractor)(pixels)
    assert made.grid_shape == whole.shape[1:]
    loaded = made.load(np.array([2, 0]))
    assert loaded.shape == (2, *made.loaded_shape)
    grid = made.grid(tf.constant(loaded), training=True).numpy()
    # The lower part's output was kept in float16: 11 bits.
    np.testing.assert_allclose(grid, whole[[2, 0]], rtol=1e-2, atol=2e-3 * whole.max())


def test_products_in_bfloat16(pixels: np.ndarray, tmp_path: Path) -> None:
    extractor = build_extractor(TINY)
    exact = source(tmp_path, extractor, pixels, "mixed2").grid(pixels_below := lower(extractor, pixels), training=True)
    made = source(tmp_path, extractor, pixels, "mixed2", tf.bfloat16)
    grid = made.grid(pixels_below, training=True)
    assert grid.dtype == tf.float32
    error = np.linalg.norm(grid - exact) / np.linalg.norm(exact)
    assert 0 < error < 0.02  # 8 bits, of which errors average out
    assert {variable.dtype for variable in made.variables} == {"float32"}
    made.save(tmp_path / "run")
    saved, config = load_extractor(tmp_path / "run")
    assert config == TINY
    for mine, theirs in zip(saved.weights, extractor.weights, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_what_learns(extractor: keras.Model) -> None:
    upper = upper_part(extractor, "mixed3")
    first = convolutions_below("mixed3")
    assert {layer.name for layer in upper.layers if isinstance(layer, keras.layers.Conv2D)} == {
        f"conv_{number}" for number in range(first, first + 4)
    }
    names = {f"conv_{number}/kernel" for number in range(first, first + 4)}
    names |= {f"norm_{number}/beta" for number in range(first, first + 4)}
    assert {variable.path for variable in upper.trainable_variables} == names


def test_where_blocks_begin() -> None:
    """Against the networks themselves: what ends at a block has what comes before the next."""
    for block, after in (("mixed0", "mixed1"), ("mixed3", "mixed4"), ("mixed9", "mixed10")):
        model = build_extractor(ExtractorConfig(0.1, 75, block))
        count = sum(isinstance(layer, keras.layers.Conv2D) for layer in model.layers)
        assert convolutions_below(after) == count
    assert convolutions_below("mixed10") == 94 - 9


def test_a_gradient_step_moves_the_upper_part_alone(pixels: np.ndarray, tmp_path: Path) -> None:
    extractor = build_extractor(TINY)
    made = source(tmp_path, extractor, pixels, "mixed2")
    loaded = tf.constant(made.load(np.arange(3)))
    optimizer = keras.optimizers.SGD(0.01)
    before = {variable.path: variable.numpy().copy() for variable in extractor.weights}

    @tf.function
    def step() -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(made.grid(loaded, training=True) - 1))
        optimizer.apply(tape.gradient(loss, made.variables), made.variables)
        return loss

    losses = [float(step()) for _ in range(5)]
    assert losses[-1] < losses[0]
    first = convolutions_below("mixed2")
    for variable in extractor.weights:
        moved = not np.array_equal(variable.numpy(), before[variable.path])
        layer, name = variable.path.split("/")
        assert moved == (int(layer.rpartition("_")[2]) >= first and name in ("kernel", "beta")), variable.path
    # The whole extractor is what learned: its grid is the source's.
    whole = extract_with(extractor)(pixels)
    np.testing.assert_allclose(made.grid(loaded, training=False), whole, rtol=1e-2, atol=2e-3 * whole.max())


def test_the_lower_part_is_an_extractor_of_its_own(extractor: keras.Model) -> None:
    """A run that takes its grid from that block shares the cache, whose key has the weights in it."""
    below, config = lower_part(extractor, TINY, "mixed2")
    assert config == ExtractorConfig(0.1, 75, "mixed1")
    keras.utils.set_random_seed(3)
    own = build_extractor(config)
    for layer in own.layers:
        layer.set_weights(extractor.get_layer(layer.name).get_weights() if layer.weights else [])
    assert weights_key(below) == weights_key(own)


def test_a_checkpoint_holds_the_upper_part(pixels: np.ndarray, tmp_path: Path) -> None:
    one, other = build_extractor(TINY), build_extractor(TINY)
    path = tf.train.Checkpoint(extractor=upper_part(one, "mixed2")).write(str(tmp_path / "checkpoint"))
    restored = tf.train.Checkpoint(extractor=upper_part(other, "mixed2")).read(path)
    restored.assert_consumed()
    first = convolutions_below("mixed2")
    for mine, theirs in zip(one.weights, other.weights, strict=True):
        layer = int(mine.path.split("/")[0].rpartition("_")[2])
        if layer >= first:
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(
    ("layer", "block", "sentence"),
    [
        ("mixed8", "mixed9", "trainable_from mixed9 comes after mixed8, from which the grid is taken"),
        ("mixed8", "mixed0", r"trainable_from must be one of mixed1, .*, mixed10, not 'mixed0'"),
        ("stage3", "mixed1", "trainable_from must be one of stage2, stage3, not 'mixed1'"),
        ("stage2", "stage3", "trainable_from stage3 comes after stage2, from which the grid is taken"),
        ("mixed8", "conv_3", r"trainable_from must be one of mixed1, .*, mixed10, not 'conv_3'"),
    ],
)
def test_cuts_that_cannot_be(layer: str, block: str, sentence: str) -> None:
    with pytest.raises(OptionsError, match=sentence):
        check_cut(layer, block)
    check_cut("mixed8", "mixed8")
    assert BLOCKS[0] == "mixed0"


@pytest.mark.data
def test_the_two_kernels_that_the_network_of_2015_lacks_may_be_learnt(shared: Path) -> None:
    weights = str(shared / "weights" / "inceptionv3_imagenet_2015.npz")
    keras.utils.set_random_seed(0)
    model = build_extractor(ExtractorConfig(size=75))
    drawn = {name: model.get_layer(name).get_weights()[0] for name in ("conv_81", "conv_90")}
    with pytest.raises(TrainingError, match=r"no kernel for mixed_9_tower_1_conv_1 \(conv_81\).*trainable_from"):
        load_extractor_weights(model, weights, learnt_from="mixed10")
    load_extractor_weights(model, weights, learnt_from="mixed9")
    for name, kernel in drawn.items():
        np.testing.assert_array_equal(model.get_layer(name).get_weights()[0], kernel)
        assert (
            np.abs(model.get_layer(name.replace("conv", "norm")).get_weights()[0]).max() > 0
        )  # their biases are there
    assert np.isfinite(model(np.zeros((1, 75, 75, 3), np.uint8)).numpy()).all()

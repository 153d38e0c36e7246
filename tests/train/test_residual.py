from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from caption_train.finetune import lower_part, upper_part
from caption_train.inception import (
    ExtractorConfig,
    build_extractor,
    convolutions_below,
    load_extractor,
    save_extractor,
    weights_key,
)
from caption_train.residual import BatchNormalization

pytestmark = pytest.mark.tf


@pytest.mark.parametrize(
    ("size", "width", "layer", "shape"),
    [
        (224, 1.0, "stage1", (35, 35, 64)),
        (224, 0.5, "stage2", (17, 17, 64)),
        (224, 1.0, "stage3", (8, 8, 384)),
        (256, 0.25, "stage3", (9, 9, 96)),
        (49, 0.1, "stage3", (1, 1, 40)),
        (72, 0.1, "stage1", (7, 7, 8)),
        (73, 0.1, "stage1", (11, 11, 8)),
    ],
)
def test_grids(size: int, width: float, layer: str, shape: tuple[int, int, int]) -> None:
    assert build_extractor(ExtractorConfig(width, size, layer)).output_shape == (None, *shape)


def seen_at(config: ExtractorConfig, place: int) -> float:
    """Where on the photo's side, from 0 to 1, a place on the grid's diagonal looks: the middle of its gradient."""
    tf.keras.utils.set_random_seed(1)
    extractor = build_extractor(config)
    photos = tf.random.stateless_uniform((4, config.size, config.size, 3), (0, 0), 0, 255)
    with tf.GradientTape() as tape:
        tape.watch(photos)
        seen = tf.reduce_sum(extractor(photos)[:, place, place])
    weight = np.abs(tape.gradient(seen, photos)).sum((0, 1, 3))
    return float((weight * (np.arange(config.size) + 0.5)).sum() / weight.sum() / config.size)


def test_places_see_what_inceptions_see() -> None:
    ours, theirs = (
        [seen_at(config, place) for place in (2, 4, 5)]
        for config in (ExtractorConfig(0.25, 224, "stage3"), ExtractorConfig(0.25, 299, "mixed8"))
    )
    assert ours == pytest.approx(theirs, abs=0.02)
    assert min(np.diff(ours)) > 0.05


def test_where_stages_begin() -> None:
    extractor = build_extractor(ExtractorConfig(0.1, 49, "stage3"))
    convolutions = [x for x in extractor.layers if isinstance(x, keras.layers.Conv2D)]
    names = [x.name for x in convolutions]
    assert names == [f"conv_{i}" for i in range(28)]
    strided = [i for i, x in enumerate(convolutions) if x.strides == (2, 2)]
    assert strided == [convolutions_below(stage) for stage in ("stage1", "stage2", "stage3")]


@pytest.mark.parametrize("stage", ["stage2", "stage3"])
def test_both_parts_are_the_whole(stage: str) -> None:
    config = ExtractorConfig(0.1, 75, "stage3")
    extractor = build_extractor(config)
    lower, below = lower_part(extractor, config, stage)
    assert below.layer == {"stage2": "stage1", "stage3": "stage2"}[stage]
    photos = np.random.default_rng(0).integers(0, 255, (2, 75, 75, 3), np.uint8)
    np.testing.assert_allclose(upper_part(extractor, stage)(lower(photos)), extractor(photos), rtol=1e-4, atol=1e-4)


def test_save_and_load(tmp_path: Path) -> None:
    config = ExtractorConfig(0.1, 75, "stage3")
    extractor = build_extractor(config)
    save_extractor(extractor, config, tmp_path)
    again, config_again = load_extractor(tmp_path)
    assert config_again == config
    assert weights_key(again) == weights_key(extractor)


def test_an_untrained_grid_tells_photos_apart() -> None:
    extractor = build_extractor(ExtractorConfig(0.25, 224, "stage3"))
    grids = np.asarray(extractor(np.random.default_rng(0).integers(0, 255, (4, 224, 224, 3), np.uint8)))
    assert grids.std(0).mean() > 0.05
    assert np.isfinite(grids).all()


@pytest.mark.parametrize("channels", [6, 16, 48])
def test_fused_normalisation_is_keras_own(channels: int) -> None:
    x = tf.random.stateless_normal((3, 5, 4, channels), seed=(1, 2), mean=0.5)
    upstream = tf.random.stateless_normal(x.shape, seed=(3, 4))
    layers = [
        kind(scale=False, epsilon=1e-3, momentum=0.9) for kind in (keras.layers.BatchNormalization, BatchNormalization)
    ]
    found = []
    for layer in layers:
        layer.build(x.shape)
        layer.beta.assign(np.linspace(-1, 1, channels))
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
            gradients = tape.gradient(y, [x, layer.beta.value], upstream)
        in_use = layer(x, training=False)
        layer.trainable = False  # fine-tuning leaves the statistics as they are
        found.append([y, *gradients, layer.moving_mean, layer.moving_variance, in_use, layer(x, training=True)])
    assert {layer.__class__.__name__ for layer in layers} == {
        "BatchNormalization"
    }  # files of weights know layers by it
    assert not np.allclose(found[0][0], found[0][-1])
    for keras_own, fused in zip(*found, strict=True):
        np.testing.assert_allclose(np.asarray(fused), np.asarray(keras_own), rtol=1e-5, atol=1e-6)

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from caption_rt.errors import OptionsError
from caption_train.errors import TrainingError
from caption_train.inception import (
    BLOCKS,
    ExtractorConfig,
    build_extractor,
    copy_weights,
    extract_with,
    load_extractor,
    load_extractor_weights,
    save_extractor,
    scaled_filters,
    weights_key,
)
from shapes import shape_photo

pytestmark = pytest.mark.tf

TINY = ExtractorConfig(width=0.1, size=75, layer="mixed2")
MISSING_KERNEL = "mixed_9_tower_1_conv_1"


def keras_inception() -> keras.Model:
    return keras.applications.InceptionV3(include_top=False, weights=None, input_shape=(299, 299, 3))


def randomise(model: keras.Model, seed: int = 0) -> None:
    """Every weight its own value, normalisations included: a mixed-up layer cannot go unseen."""
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D):
            shape = layer.kernel.shape
            layer.set_weights([rng.normal(0, np.sqrt(2 / np.prod(shape[:3])), shape)])
        elif isinstance(layer, keras.layers.BatchNormalization):
            shape = layer.beta.shape
            layer.set_weights([rng.normal(0, 0.2, shape), rng.normal(0, 0.2, shape), rng.uniform(0.8, 1.2, shape)])


def convolutions(model: keras.Model) -> list[keras.layers.Conv2D]:
    found = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    return sorted(found, key=lambda layer: int(f"0{layer.name.rpartition('_')[2].removeprefix('conv2d')}"))


@pytest.fixture(scope="module")
def reference() -> Iterator[keras.Model]:
    keras.backend.clear_session()  # so that Keras names its first convolution conv2d
    model = keras_inception()
    randomise(model)
    yield model
    keras.backend.clear_session()


@pytest.fixture(scope="module")
def full(reference: keras.Model) -> keras.Model:
    model = build_extractor(ExtractorConfig())
    copy_weights(reference, model)
    return model


@pytest.fixture(scope="module")
def built() -> keras.Model:
    return build_extractor(TINY)


@pytest.fixture
def tiny(built: keras.Model) -> keras.Model:
    randomise(built)
    return built


def photos(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_width_one_is_keras_network(reference: keras.Model, full: keras.Model) -> None:
    assert full.count_params() == reference.count_params() == 21_802_784
    ours, theirs = convolutions(full), convolutions(reference)
    assert len(ours) == len(theirs) == 94
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.kernel.shape == other.kernel.shape
        assert mine.output.shape == other.output.shape
        assert (mine.strides, mine.padding) == (other.strides, other.padding)
    assert full.output_shape == (None, 8, 8, 2048)


def test_width_one_computes_what_keras_network_computes(reference: keras.Model, full: keras.Model) -> None:
    """At every block, with the same weights."""
    names = list(BLOCKS)
    ours = keras.Model(full.input, [full.get_layer(name).output for name in names])
    theirs = keras.Model(reference.input, [reference.get_layer(name).output for name in names])
    pixels = photos(1, 299)
    scaled = keras.applications.inception_v3.preprocess_input(pixels.astype(np.float32))
    for name, mine, other in zip(names, ours(pixels), theirs(scaled), strict=True):
        mine, other = mine.numpy(), other.numpy()
        assert other.std() > 0.05, name
        np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-3 * other.std(), err_msg=name)


@pytest.mark.parametrize(
    ("filters", "width", "scaled"),
    [
        (32, 0.25, 8),
        (80, 0.25, 24),  # 20 is as near to 16: up
        (48, 0.25, 16),
        (192, 0.1, 16),
        (448, 0.1, 48),
        (32, 0.1, 8),  # never below 8
        (32, 0.001, 8),
        (320, 0.5, 160),
        (64, 2.0, 128),
    ],
)
def test_scaled_filters(filters: int, width: float, scaled: int) -> None:
    assert scaled_filters(filters, width) == scaled


def test_width_scales_every_convolution(reference: keras.Model) -> None:
    half = build_extractor(ExtractorConfig(width=0.5, size=75))
    expected = [scaled_filters(layer.filters, 0.5) for layer in convolutions(reference)]
    assert [layer.filters for layer in convolutions(half)] == expected
    assert half.output_shape == (None, 1, 1, 1024)


@pytest.mark.parametrize(("layer", "channels"), [("mixed0", 256), ("mixed3", 768), ("mixed8", 1280)])
def test_ends_at_the_chosen_block(layer: str, channels: int) -> None:
    model = build_extractor(ExtractorConfig(size=75, layer=layer))
    assert model.output_shape[-1] == channels
    assert model.layers[-2].name == layer


def test_a_copy_may_end_at_an_earlier_block(reference: keras.Model) -> None:
    target = build_extractor(ExtractorConfig(size=75, layer="mixed1"))
    copy_weights(reference, target)
    for mine, other in zip(convolutions(target), convolutions(reference), strict=False):
        np.testing.assert_array_equal(mine.get_weights()[0], other.get_weights()[0])


def test_copy_refuses_other_shapes(reference: keras.Model, tiny: keras.Model) -> None:
    with pytest.raises(TrainingError, match=r"^convolution 0 of the source network has another shape: .*$"):
        copy_weights(reference, tiny)
    with pytest.raises(TrainingError, match="the source network has 26 convolutions, the extractor needs more"):
        copy_weights(tiny, build_extractor(ExtractorConfig(0.1, 75, "mixed4")))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"width": 0.0}, "extractor width 0.0 is out of range"),
        ({"width": -1.0}, "extractor width -1.0 is out of range"),
        ({"width": float("nan")}, "extractor width nan is out of range"),
        ({"size": 74}, "extractor size 74 is too small: InceptionV3 needs at least 75 pixels"),
        ({"size": 48, "layer": "stage1"}, "extractor size 48 is too small: the network needs at least 49 pixels"),
        (
            {"layer": "mixed11"},
            "extractor layer 'mixed11' does not exist: choose one of mixed0, .*, mixed10, .*stage3$",
        ),
    ],
)
def test_config_refuses(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(OptionsError, match=sentence):
        ExtractorConfig(**options)


def test_extract_with_gives_places_in_row_major_order(tiny: keras.Model) -> None:
    pixels = photos(2, 75)
    grid = extract_with(tiny)(pixels)
    assert grid.dtype == np.float32
    assert grid.shape == (2, 49, 32)
    direct = tiny(pixels.astype(np.float32), training=False).numpy()
    np.testing.assert_allclose(grid[1, 1 * 7 + 3], direct[1, 1, 3], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grid, direct.reshape(2, 49, 32), rtol=1e-4, atol=1e-4)


def test_the_key_follows_the_weights(tiny: keras.Model) -> None:
    before = weights_key(tiny)
    assert len(before) == 64
    assert weights_key(tiny) == before
    norm = tiny.get_layer("norm_18")
    beta, mean, variance = norm.get_weights()
    variance[-1] = np.nextafter(variance[-1], 2)
    norm.set_weights([beta, mean, variance])
    assert weights_key(tiny) != before


def test_save_and_load(tmp_path: Path, tiny: keras.Model) -> None:
    save_extractor(tiny, TINY, tmp_path / "extractor")
    names = sorted(path.name for path in (tmp_path / "extractor").iterdir())
    assert names == ["extractor.json", "extractor.weights.h5"]
    loaded, config = load_extractor(tmp_path / "extractor")
    assert config == TINY
    assert weights_key(loaded) == weights_key(tiny)
    pixels = photos(1, 75)
    np.testing.assert_array_equal(extract_with(loaded)(pixels), extract_with(tiny)(pixels))


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a file's size are of Unix")
def test_what_cannot_be_written_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, tiny: keras.Model, capfd: pytest.CaptureFixture[str]
) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "extractor-7.weights.h5").touch()  # of a process that was killed
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # as a full disk is: a file is cut, within a write
    try:
        with pytest.raises(TrainingError, match=r"extractor\.weights\.h5 cannot be written: .*File too large"):
            save_extractor(tiny, TINY, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err == ""  # HDF5 has much to say of every array


def test_load_refuses_a_folder_without_an_extractor(tmp_path: Path, tiny: keras.Model) -> None:
    with pytest.raises(TrainingError, match=r"holds no extractor: extractor\.json cannot be read"):
        load_extractor(tmp_path)
    for content in ("[]", "{", '{"width": 9}', '{"width": "1"}', '{"breadth": 1}'):
        (tmp_path / "extractor.json").write_text(content)
        with pytest.raises(TrainingError, match=r"holds no extractor: extractor\.json cannot be read"):
            load_extractor(tmp_path)
    (tmp_path / "extractor.json").write_text('{"width": 0.1, "size": 75, "layer": "mixed2"}')
    with pytest.raises(TrainingError, match=r"extractor\.weights\.h5 do not exist"):
        load_extractor(tmp_path)
    save_extractor(tiny, TINY, tmp_path)
    (tmp_path / "extractor.json").write_text('{"width": 0.2, "size": 75, "layer": "mixed2"}')
    with pytest.raises(TrainingError, match="do not fit this extractor") as caught:
        load_extractor(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_untrained_grid_tells_photos_apart() -> None:
    """Without the right initial scale it shrinks to 1e-4 on its way to mixed10, where float16 ends."""
    keras.utils.set_random_seed(0)
    pixels = np.stack([shape_photo(index)[0].resize((139, 139)) for index in range(4)])
    grid = build_extractor(ExtractorConfig(width=0.25, size=139))(pixels, training=False).numpy()
    assert 0.03 < grid.mean() < 1
    assert grid.std(axis=0).mean() > 0.005


def test_none_leaves_the_weights(tiny: keras.Model) -> None:
    before = weights_key(tiny)
    assert load_extractor_weights(tiny, "none") == before


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("gone.weights.h5", None, "do not exist: give a file, 'imagenet' or 'none'"),
        ("empty.weights.h5", b"", "do not fit this extractor"),
        ("text.weights.h5", b"not HDF5", "do not fit this extractor"),
        ("text.h5", b"not HDF5", "width 1.0, this extractor has another width"),
        ("weights.pt", b"PK", "unknown kind: give .weights.h5, .h5 or .npz"),
        ("empty.npz", b"", r"\(with layers.json beside it\) cannot be read"),
        ("text.npz", b"not a zip", r"\(with layers.json beside it\) cannot be read"),
        ("cut.npz", b"PK\x03\x04cut", r"\(with layers.json beside it\) cannot be read"),
    ],
)
def test_weights_that_cannot_be_had(
    tmp_path: Path, tiny: keras.Model, name: str, content: bytes | None, sentence: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    (tmp_path / "layers.json").write_text("[]")
    with pytest.raises(TrainingError, match=sentence) as caught:
        load_extractor_weights(tiny, str(path))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def folded(folder: Path, model: keras.Model, seed: int = 2) -> tuple[Path, dict[str, np.ndarray]]:
    """A file such as `load_folded_npz` reads, for a whole network."""
    rng = np.random.default_rng(seed)
    arrays, rows = {}, []
    for index, layer in enumerate(convolutions(model)):
        shape = layer.kernel.shape
        arrays[f"layer{index}/kernel"] = rng.normal(0, 0.2, shape).astype(np.float16)
        arrays[f"layer{index}/bias"] = rng.normal(0, 0.2, shape[-1]).astype(np.float16)
        rows.append([f"layer{index}", *shape])
    (folder / "layers.json").write_text(json.dumps(rows))
    np.savez(folder / "folded.npz", **arrays)
    return folder / "folded.npz", arrays


def test_folded_weights(tmp_path: Path, tiny: keras.Model) -> None:
    """A convolution with its normalisation is the file's kernel and bias, by hand at one place."""
    path, arrays = folded(tmp_path, tiny)
    load_extractor_weights(tiny, str(path))
    probe = keras.Model(tiny.input, [tiny.get_layer("conv_1").input, tiny.get_layer("relu_1").output])
    before, after = (x.numpy() for x in probe(photos(1, 75)))
    patch = before[0, 4:7, 9:12]
    kernel, bias = (arrays[f"layer1/{name}"].astype(np.float32) for name in ("kernel", "bias"))
    expected = np.maximum(np.tensordot(patch, kernel, 3) + bias, 0)
    assert (expected > 0).any()
    np.testing.assert_allclose(after[0, 4, 9], expected, rtol=1e-4, atol=1e-5)


def test_folded_weights_that_do_not_fit(tmp_path: Path, tiny: keras.Model) -> None:
    path, arrays = folded(tmp_path, tiny)
    with pytest.raises(TrainingError, match=r"layer0 is \(3, 3, 3, 8\) .*the network needs \(3, 3, 3, 16\)"):
        load_extractor_weights(build_extractor(ExtractorConfig(0.5, 75, "mixed0")), str(path))
    with pytest.raises(TrainingError, match=r"no kernel for layer 26 \(conv_26\)"):
        load_extractor_weights(build_extractor(ExtractorConfig(0.1, 75, "mixed3")), str(path))
    np.savez(path, **{key: array for key, array in arrays.items() if key != "layer5/bias"})
    with pytest.raises(TrainingError, match=r"cannot be read: .*layer5/bias"):
        load_extractor_weights(tiny, str(path))
    np.savez(path, **{key: array for key, array in arrays.items() if key != "layer5/kernel"})
    with pytest.raises(TrainingError, match=r"no kernel for layer5 \(conv_5\): take the grid from an earlier block"):
        load_extractor_weights(tiny, str(path))
    (tmp_path / "layers.json").unlink()
    with pytest.raises(TrainingError, match=r"cannot be read: .*layers\.json"):
        load_extractor_weights(tiny, str(path))


@pytest.mark.data
def test_the_network_of_2015(shared: Path) -> None:
    weights = shared / "weights" / "inceptionv3_imagenet_2015.npz"
    model = build_extractor(ExtractorConfig(size=139, layer="mixed8"))
    load_extractor_weights(model, str(weights))
    names = [row[0] for row in json.loads(weights.with_name("layers.json").read_text())]
    probe = keras.Model(
        model.input, [model.get_layer("conv_40").input, model.get_layer("relu_40").output, model.output]
    )
    before, after, grid = (x.numpy() for x in probe(photos(1, 139)))
    with np.load(weights) as arrays:
        kernel, bias = (arrays[f"{names[40]}/{part}"].astype(np.float32) for part in ("kernel", "bias"))
    convolved = tf.nn.conv2d(before, kernel, strides=1, padding="SAME").numpy()
    assert after.std() > 0.01
    np.testing.assert_allclose(after, np.maximum(convolved + bias, 0), rtol=1e-3, atol=1e-4)
    assert grid.shape == (1, 3, 3, 1280)
    assert np.isfinite(grid).all()


@pytest.mark.data
def test_the_network_of_2015_lacks_two_kernels(shared: Path) -> None:
    model = build_extractor(ExtractorConfig(size=75))
    with pytest.raises(TrainingError, match=f"no kernel for {MISSING_KERNEL} .*from an earlier block, such as mixed8"):
        load_extractor_weights(model, str(shared / "weights" / "inceptionv3_imagenet_2015.npz"))


def test_imagenet(monkeypatch: pytest.MonkeyPatch, reference: keras.Model, tiny: keras.Model) -> None:
    asked: list[object] = []

    def download(include_top: bool, weights: str) -> keras.Model:
        asked.append(weights)
        assert not include_top
        return reference

    monkeypatch.setattr(keras.applications, "InceptionV3", download)
    with pytest.raises(TrainingError, match=r"imagenet are of InceptionV3 at width 1\.0, this extractor has another"):
        load_extractor_weights(tiny, "imagenet")
    assert asked == []  # before 90 MB have come
    target = build_extractor(ExtractorConfig(size=75, layer="mixed0"))
    load_extractor_weights(target, "imagenet")
    assert asked == ["imagenet"]
    first = convolutions(reference)[0].get_weights()[0]
    np.testing.assert_array_equal(target.get_layer("conv_0").get_weights()[0], first)


def test_keras_own_file_damaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        keras.applications, "InceptionV3", lambda weights, **_: keras.Sequential().load_weights(weights)
    )
    (tmp_path / "text.h5").write_bytes(b"not HDF5")
    model = build_extractor(ExtractorConfig(size=75, layer="mixed0"))
    with pytest.raises(TrainingError, match=r"text\.h5 does not hold Keras' InceptionV3 without top"):
        load_extractor_weights(model, str(tmp_path / "text.h5"))


def test_imagenet_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(**options: object) -> keras.Model:
        raise Exception("URL fetch failure on https://example.org: None -- unreachable\nand more")

    monkeypatch.setattr(keras.applications, "InceptionV3", download)
    model = build_extractor(ExtractorConfig(size=75, layer="mixed0"))
    with pytest.raises(TrainingError, match=r"could not download .*unreachable\): give a weights file instead$"):
        load_extractor_weights(model, "imagenet")


def test_keras_own_file(tmp_path: Path, reference: keras.Model) -> None:
    """The file that Keras downloads, in the format of Keras 2, as somebody without a network has copied it."""
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "inception_v3_notop.h5"
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [layer.name.encode() for layer in reference.layers]
        for layer in reference.layers:
            group = file.create_group(layer.name)
            names = [f"{layer.name}/{weight.name}:0" for weight in layer.weights]
            group.attrs["weight_names"] = [name.encode() for name in names]
            for name, array in zip(names, layer.get_weights(), strict=True):
                group[name] = array
    target = build_extractor(ExtractorConfig(size=75, layer="mixed0"))
    load_extractor_weights(target, str(path))
    for mine, other in zip(convolutions(target), convolutions(reference), strict=False):
        np.testing.assert_array_equal(mine.get_weights()[0], other.get_weights()[0])

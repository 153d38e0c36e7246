from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from caption_rt.bundle import Bundle, default_bundle_path
from caption_rt.engine import Engine
from caption_rt.errors import ImageError
from caption_rt.image import read_photo
from caption_train import distill_views
from caption_train.distill_views import WHOLE, Teacher, read_view
from caption_train.errors import TrainingError

pytestmark = pytest.mark.tf


@pytest.fixture
def ramp(tmp_path: Path) -> Path:
    """A photo whose pixels are their own coordinates."""
    x, y = np.meshgrid(np.arange(200), np.arange(100))
    Image.fromarray(np.stack([x, 2 * y, np.zeros_like(x)], axis=-1).astype(np.uint8)).save(tmp_path / "ramp.png")
    return tmp_path / "ramp.png"


@pytest.fixture
def plain_light(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill_views, "_COLOUR", (1.0, 1.0))


def test_the_first_view_is_the_whole_photo(ramp: Path) -> None:
    np.testing.assert_array_equal(read_view(ramp, 75, WHOLE, [ramp]), read_photo(ramp, 75))


@pytest.mark.usefixtures("plain_light")
def test_crops_are_of_the_content(ramp: Path) -> None:
    copy = ramp.with_name("copy.png")
    copy.write_bytes(ramp.read_bytes())
    areas = []
    for number in range(1, 60):
        pixels = read_view(ramp, 32, number)
        assert pixels.shape == (32, 32, 3)
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, read_view(copy, 32, number))
        width = (float(pixels[0, -1, 0]) - float(pixels[0, 0, 0])) * 32 / 31
        height = (float(pixels[-1, 0, 1]) - float(pixels[0, 0, 1])) / 2 * 32 / 31
        areas.append(width * height / (200 * 100))
    assert len({round(area, 2) for area in areas}) > 20
    assert 0.2 < min(areas) < 0.4
    assert 0.7 < max(areas) <= 1.02


def test_a_view_is_the_same_at_every_size(ramp: Path) -> None:
    """Teacher and student see one picture: crop, second photo, light and colours."""
    second = ramp.with_name("second.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)).resize((90, 70)).save(second)
    for number in range(1, 20):
        small, large = (read_view(ramp, size, number, [second]) for size in (56, 112))
        shrunk = large.reshape(56, 2, 56, 2, 3).mean((1, 3))
        assert np.abs(shrunk - small).mean() < 3


@pytest.mark.usefixtures("plain_light")
def test_some_views_have_a_second_photo(ramp: Path) -> None:
    second = ramp.with_name("blue.png")
    Image.new("RGB", (50, 50), (0, 0, 255)).save(second)
    blue = np.array([read_view(ramp, 32, number, [second])[..., 2].mean() / 255 for number in range(1, 201)])
    assert 40 < np.count_nonzero(blue) < 80
    assert 0.09 < blue[blue > 0].min() < 0.2
    assert 0.4 < blue.max() < 0.51


def test_light_and_colours_differ(ramp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill_views, "_CROP_AREA", (1.0, 1.0))
    means = np.array([read_view(ramp, 32, number).mean() for number in range(1, 40)])
    assert means.std() > 5


def test_a_photo_that_cannot_be_read(tmp_path: Path, ramp: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"no photo")
    with pytest.raises(ImageError, match=r"x\.jpg is named like a photo and holds text"):
        read_view(tmp_path / "x.jpg", 75, 1)


def test_the_extractor_of_a_bundle_teaches(tmp_path: Path, ramp: Path) -> None:
    teacher = Teacher.of_bundle(default_bundle_path(), tmp_path / "cache")
    manifest = Bundle.open(default_bundle_path()).manifest
    assert teacher.grid_shape == (manifest.grid.rows, manifest.grid.columns, manifest.grid.channels)
    assert teacher.facts["size"] == manifest.image.size
    assert teacher.facts["sha256"] == manifest.training["extractor"]["sha256"]
    views = teacher.look([ramp], 3)
    assert views.paths == (ramp,)
    pixels = read_view(ramp, manifest.image.size, 3, [ramp])[None]
    wanted = Engine(Bundle.open(default_bundle_path()), "cpu").extract(pixels)
    np.testing.assert_allclose(views.cache.gather(views.rows), wanted, rtol=1e-2, atol=1e-2)


def test_a_bundle_that_does_not_say_what_its_extractor_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bundle, "manifest", SimpleNamespace(training={}))
    with pytest.raises(TrainingError, match="does not say what its extractor is: export it anew with caption-export"):
        Teacher.of_bundle(default_bundle_path(), tmp_path)

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from caption_rt.errors import ImageError, OptionsError
from caption_rt.image import read_photo
from caption_train.distill import Distillation, DistillConfig, _augment, read_view, run_distillation, teacher_views
from caption_train.errors import TrainingError
from caption_train.files import read_json_lines
from caption_train.inception import (
    ExtractorConfig,
    build_extractor,
    load_extractor,
    load_extractor_weights,
    save_extractor,
    weights_key,
)
from shapes import shape_photo

pytestmark = pytest.mark.tf

TEACHER = ExtractorConfig(width=0.2, size=75, layer="mixed0")
STUDENT = ExtractorConfig(width=0.1, size=75, layer="mixed0")
CONFIG = DistillConfig(epochs=6, views=2, batch_size=8, learning_rate=0.01, validation=4, checkpoint_steps=4)
STEPS = 6 * 5  # of 24 photos 4 are held out; 40 views


@contextlib.contextmanager
def silent(total: int, done: int) -> Iterator[Callable[[int, float], None]]:
    yield lambda step, loss: None


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    paths = [folder / f"{i}.png" for i in range(24)]
    for i, path in enumerate(paths):
        shape_photo(i)[0].save(path)
    return paths


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    tf.keras.utils.set_random_seed(7)
    save_extractor(build_extractor(TEACHER), TEACHER, folder)
    return folder / "extractor.weights.h5"


@pytest.fixture(scope="module")
def views(photos: list[Path], teacher_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    teacher = build_extractor(TEACHER)
    load_extractor_weights(teacher, str(teacher_file))
    return teacher_views(teacher, TEACHER, photos, 2, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def unbroken(views: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    return Distillation(STUDENT, CONFIG, views, tmp_path_factory.mktemp("unbroken")).run()


def history(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_json_lines(folder / "distill.jsonl")]


def test_the_first_view_is_the_whole_photo(photos: list[Path]) -> None:
    np.testing.assert_array_equal(read_view(photos[0], 75, 0), read_photo(photos[0], 75))


def test_the_other_views_are_crops_of_the_content(tmp_path: Path) -> None:
    """On a photo whose pixels are their own coordinates, a crop shows what it is a crop of."""
    x, y = np.meshgrid(np.arange(200), np.arange(100))
    photo = Image.fromarray(np.stack([x, 2 * y, np.zeros_like(x)], axis=-1).astype(np.uint8))
    photo.save(tmp_path / "a.png")
    photo.save(tmp_path / "b.png")
    areas = []
    for view in range(1, 30):
        pixels = read_view(tmp_path / "a.png", 32, view)
        assert pixels.shape == (32, 32, 3)
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, read_view(tmp_path / "b.png", 32, view))
        width = (float(pixels[0, -1, 0]) - float(pixels[0, 0, 0])) * 32 / 31
        height = (float(pixels[-1, 0, 1]) - float(pixels[0, 0, 1])) / 2 * 32 / 31
        areas.append(width * height / (200 * 100))
    assert len({round(area, 2) for area in areas}) > 10
    assert 0.3 < min(areas) < 0.5
    assert 0.6 < max(areas) <= 1.02


def test_a_photo_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"no photo")
    with pytest.raises(ImageError, match=r"x\.jpg is named like a photo and holds text"):
        read_view(tmp_path / "x.jpg", 75, 1)


def test_photo_and_grid_are_flipped_together() -> None:
    count = 40
    ramp = np.broadcast_to(np.linspace(50, 150, 8)[None, None, :, None], (count, 8, 8, 3)).astype(np.float32)
    target = np.broadcast_to(np.arange(4)[None, None, :, None], (count, 4, 4, 2)).astype(np.float32)
    photos, grids = (x.numpy() for x in _augment(ramp, target, np.array([0, 3], np.int32)))
    photo_flipped = photos[:, 0, 0, 0] > photos[:, 0, -1, 0]
    np.testing.assert_array_equal(grids[:, 0, 0, 0] == 3, photo_flipped)
    np.testing.assert_array_equal(grids[:, 0, :, 0], np.where(photo_flipped[:, None], [3, 2, 1, 0], [0, 1, 2, 3]))
    assert 10 < photo_flipped.sum() < 30
    assert len(np.unique(photos.mean(axis=(1, 2, 3)).round(2))) > 30  # the light differs
    assert 0 <= photos.min() < photos.max() <= 255
    again = _augment(ramp, target, np.array([0, 3], np.int32))[0].numpy()
    np.testing.assert_array_equal(again, photos)


def test_the_student_learns(unbroken: Path, views: list[Any]) -> None:
    rows = history(unbroken)
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20, 24, 28, 30]
    losses = [row["loss"] for row in rows]
    assert losses[-1] < 0.8 * losses[0]
    assert rows[-1]["val_loss"] < 0.97  # 1 is what a constant gets
    student, config = load_extractor(unbroken)
    assert config == STUDENT
    again = Distillation(STUDENT, CONFIG, views, unbroken)
    assert int(again.step) == STEPS
    assert weights_key(again.student) == weights_key(student)
    assert again.validate() == pytest.approx(rows[-1]["val_loss"], rel=1e-5)


def test_held_out_photos_are_held_out_in_all_views(views: list[Any], tmp_path: Path) -> None:
    run = Distillation(STUDENT, CONFIG, views, tmp_path)
    held_out = {views[0].paths[i] for i in run._held_out}
    trained = {views[view].paths[index] for view, index in run._train}
    assert len(held_out) == 4
    assert not held_out & trained
    assert len(trained) == 20
    assert len(run._train) == 40


@pytest.mark.slow
def test_a_stopped_run_goes_on_exactly(unbroken: Path, views: list[Any], tmp_path: Path) -> None:
    steps: list[int] = []

    def stop(step: int, loss: float) -> None:
        steps.append(step)
        if len(steps) == 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Distillation(STUDENT, CONFIG, views, tmp_path).run(stop)
    with (tmp_path / "distill.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # as a kill leaves it
    Distillation(STUDENT, CONFIG, views, tmp_path).run(stop)
    assert steps == [*range(1, 15), *range(13, 31)]
    for mine, other in zip(history(tmp_path), history(unbroken), strict=True):
        assert mine == pytest.approx(other, rel=1e-4)
    for mine, other in zip(load_extractor(tmp_path)[0].weights, load_extractor(unbroken)[0].weights, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-4)


def test_grids_of_another_size(photos: list[Path], teacher_file: Path, tmp_path: Path) -> None:
    student = replace(STUDENT, layer="mixed3")
    with pytest.raises(OptionsError, match="grid has 7 x 7 places and the student's 3 x 3: choose layers that agree"):
        run_distillation(photos, TEACHER, str(teacher_file), student, CONFIG, tmp_path / "run", tmp_path / "c", silent)
    assert list(tmp_path.iterdir()) == []  # before the teacher has seen a photo


def test_too_few_photos(views: list[Any], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="40 views are too few for a batch of 41 beside the held-out photos"):
        Distillation(STUDENT, replace(CONFIG, batch_size=41), views, tmp_path)


def test_a_loss_that_is_no_number(views: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Distillation(STUDENT, CONFIG, views, tmp_path)
    monkeypatch.setattr(run, "_train_step", lambda photos, target, seed: tf.constant(np.nan))
    with pytest.raises(TrainingError, match="the loss is nan at step 0: lower the learning rate in a new folder"):
        run.run()
    assert history(tmp_path) == []


def test_a_photo_that_is_gone(views: list[Any], tmp_path: Path) -> None:
    gone = [replace(view, paths=tuple(tmp_path / path.name for path in view.paths)) for view in views]
    with pytest.raises(ImageError, match=r"\.png does not exist"):
        Distillation(STUDENT, CONFIG, gone, tmp_path / "run").run()


@pytest.mark.slow
def test_the_whole_of_it(photos: list[Path], teacher_file: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=1, views=1)
    unreadable = tmp_path / "unreadable.png"
    unreadable.write_bytes(b"no photo")

    def go(config: DistillConfig, student: ExtractorConfig = STUDENT) -> None:
        run_distillation(
            [*photos, unreadable], TEACHER, str(teacher_file), student, config, tmp_path / "run", tmp_path / "c", silent
        )

    go(config)
    first = weights_key(load_extractor(tmp_path / "run")[0])
    facts = json.loads((tmp_path / "run" / "distillation.json").read_text())["distillation"]
    assert facts["photos"] == 24
    assert facts["teacher"]["weights"] == "extractor.weights.h5"
    assert facts["teacher"]["layer"] == "mixed0"
    assert len(facts["teacher"]["sha256"]) == 64
    assert facts["options"]["epochs"] == 1
    assert facts["validation_loss"] == pytest.approx(history(tmp_path / "run")[-1]["val_loss"], rel=1e-5)
    go(config)  # nothing is left to do
    assert weights_key(load_extractor(tmp_path / "run")[0]) == first
    with pytest.raises(TrainingError, match="begun with another options: epochs was 1 and is now 2; give the same"):
        go(replace(config, epochs=2))
    with pytest.raises(TrainingError, match=r"begun with another student: width was 0\.1 and is now 0\.3"):
        go(config, replace(STUDENT, width=0.3))


@pytest.mark.parametrize(
    "change",
    [{"epochs": 0}, {"views": 0}, {"batch_size": -1}, {"learning_rate": float("nan")}, {"weight_decay": -0.1}],
)
def test_config_refuses(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(OptionsError, match=f"distillation: {name} must"):
        DistillConfig(**change)

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from caption_rt.errors import ImageError, OptionsError
from caption_rt.image import read_photo
from caption_train.distill import SMALL, Distillation, DistillConfig, _flip, run_distillation
from caption_train.distill_scale import Scale
from caption_train.distill_views import WHOLE, Teacher
from caption_train.errors import TrainingError
from caption_train.files import read_json_lines
from caption_train.inception import (
    ExtractorConfig,
    build_extractor,
    load_extractor,
    save_extractor,
    weights_key,
)
from shapes import shape_photo

pytestmark = pytest.mark.tf

TEACHER = ExtractorConfig(width=0.2, size=75, layer="mixed0")
STUDENT = ExtractorConfig(width=0.25, size=49, layer="stage1")  # 7 x 7 places, as the teacher has
CONFIG = DistillConfig(rounds=3, passes=4, window=2, batch_size=8, learning_rate=0.01, validation=4, checkpoint_steps=4)
ROUND = 20 * 4 // 8  # of 24 photos 4 are held out


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
def teacher(teacher_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return Teacher.of_network(TEACHER, str(teacher_file), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def unbroken(teacher: Teacher, photos: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    return Distillation(STUDENT, CONFIG, teacher, photos, tmp_path_factory.mktemp("unbroken")).run()


def history(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_json_lines(folder / "distill.jsonl")]


def test_photo_and_grid_are_flipped_together() -> None:
    count = 40
    ramp = np.broadcast_to(np.linspace(50, 150, 8)[None, None, :, None], (count, 8, 8, 3)).astype(np.float32)
    target = np.broadcast_to(np.arange(4)[None, None, :, None], (count, 4, 4, 2)).astype(np.float32)
    photos, grids = (x.numpy() for x in _flip(ramp, target, np.array([0, 3], np.int32)))
    flipped = photos[:, 0, 0, 0] > photos[:, 0, -1, 0]
    np.testing.assert_array_equal(photos, np.where(flipped[:, None, None, None], ramp[:, :, ::-1], ramp))
    np.testing.assert_array_equal(grids[:, 0, :, 0], np.where(flipped[:, None], [3, 2, 1, 0], [0, 1, 2, 3]))
    assert 10 < flipped.sum() < 30
    np.testing.assert_array_equal(_flip(ramp, target, np.array([0, 3], np.int32))[0], photos)


def test_the_scale_and_the_way_back(teacher: Teacher, photos: list[Path]) -> None:
    views = teacher.look(photos, WHOLE)
    grids, scale = views.cache.gather(views.rows), Scale.of(views)
    target = scale.target(grids, teacher.grid_shape).numpy()
    live = scale.deviation > 1e-2
    assert live.any()
    np.testing.assert_allclose(target.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(target.std((0, 1, 2))[live], 1, rtol=1e-4)
    np.testing.assert_allclose(scale.grid(target), grids, rtol=1e-3, atol=1e-3)
    at_places, of_means = (float(x) for x in scale.errors(tf.zeros_like(target), target))
    assert at_places == pytest.approx(target.var((0, 1, 2)).mean(), rel=1e-4)
    assert of_means == pytest.approx(
        (target.mean((1, 2)).std(0) / scale.deviation_of_means).__pow__(2).mean(), rel=1e-4
    )
    assert of_means <= 1.0001


def test_the_student_learns(unbroken: Path, teacher: Teacher, photos: list[Path]) -> None:
    rows = history(unbroken)
    assert [row["step"] for row in rows] == [4, 8, 10, 12, 16, 20, 24, 28, 30]
    assert rows[2]["round"] == 1
    losses = [row["loss"] for row in rows]
    assert losses[-1] < 0.8 * losses[0]
    assert rows[-1]["explained"] > 0.1
    assert rows[-1]["explained_means"] > rows[0]["explained_means"]
    student, config = load_extractor(unbroken)
    assert config == STUDENT
    again = Distillation(STUDENT, CONFIG, teacher, photos, unbroken)
    assert int(again.step) == 3 * ROUND == again.total_steps
    assert weights_key(again.average) == weights_key(student) != weights_key(again.student)
    assert again.validate()["explained"] == pytest.approx(rows[-1]["explained"], rel=1e-4)


def test_what_the_student_takes_for_the_teachers_grid(unbroken: Path, teacher: Teacher, photos: list[Path]) -> None:
    run = Distillation(STUDENT, CONFIG, teacher, photos, unbroken)
    views = teacher.look(photos, WHOLE)
    real = views.cache.gather(views.rows).astype(np.float32)
    found = run.teachers_grid(np.stack([read_photo(path, STUDENT.size) for path in photos]))
    assert found.shape == real.shape
    assert found.dtype == np.float32
    assert np.square(found - real).mean() < 0.9 * np.square(real - real.mean((0, 1))).mean()


def test_held_out_photos_are_held_out(teacher: Teacher, photos: list[Path], tmp_path: Path) -> None:
    run = Distillation(STUDENT, CONFIG, teacher, photos, tmp_path)
    assert len(run._held_out.paths) == 4
    assert sorted([*run._held_out.paths, *run._train]) == sorted(photos)


def test_only_the_newest_views_are_kept(teacher: Teacher, unbroken: Path) -> None:
    """After three rounds of a window of two: views 2 and 3, and the whole photos."""
    assert views_in(teacher._folder) == [0, 2, 3]


def views_in(folder: Path) -> list[int]:
    keys = [json.loads(path.read_text())["key"] for path in folder.glob("*/key.json")]
    return sorted(int(key.split(" view ")[1].split()[0]) for key in keys)


def test_a_stop_leaves_no_older_views(teacher: Teacher, photos: list[Path], tmp_path: Path) -> None:
    own = Teacher(teacher._extract, teacher.grid_shape, teacher.facts, "float32", tmp_path / "teacher")
    run = Distillation(STUDENT, CONFIG, own, photos, tmp_path / "run")
    own.look(run._train, 1)  # which would have been deleted when the teacher had seen view 3
    run.step.assign(2 * ROUND)
    next(run._batches())
    assert views_in(tmp_path / "teacher") == [0, 2, 3]


@pytest.mark.slow
def test_a_stopped_run_goes_on_exactly(unbroken: Path, teacher: Teacher, photos: list[Path], tmp_path: Path) -> None:
    steps: list[int] = []

    def stop(step: int, loss: float) -> None:
        steps.append(step)
        if len(steps) == 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Distillation(STUDENT, CONFIG, teacher, photos, tmp_path).run(stop)
    with (tmp_path / "distill.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # as a kill leaves it
    Distillation(STUDENT, CONFIG, teacher, photos, tmp_path).run(stop)
    assert steps == [*range(1, 15), *range(13, 31)]
    for mine, other in zip(history(tmp_path), history(unbroken), strict=True):
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-3)
    for mine, other in zip(load_extractor(tmp_path)[0].weights, load_extractor(unbroken)[0].weights, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-2, atol=1e-3)


def test_a_run_goes_on_elsewhere(unbroken: Path, teacher: Teacher, photos: list[Path], tmp_path: Path) -> None:
    """With the small file alone: the mean's weights in half the bytes, at the next round, with no older view."""
    config = replace(CONFIG, rounds=5)
    before = Distillation(STUDENT, CONFIG, teacher, photos, unbroken)
    run = Distillation(STUDENT, config, teacher, photos, tmp_path, unbroken / SMALL)
    assert int(run.step) == 3 * ROUND
    assert int(run.first_round) == 3
    for mine, other in zip(run.student.weights, before.average.weights, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-4)
    assert run.validate()["explained"] == pytest.approx(before.validate()["explained"], abs=2e-3)
    steps: list[int] = []
    run.run(lambda step, loss: steps.append(step))
    assert steps == list(range(31, 51))
    assert history(tmp_path)[:9] == history(unbroken)
    assert [row["step"] for row in history(tmp_path)[9:]] == [32, 36, 40, 44, 48, 50]
    # What the folder has goes first from then on.
    assert int(Distillation(STUDENT, config, teacher, photos, tmp_path, unbroken / SMALL).step) == 50
    assert (unbroken / SMALL).stat().st_size < 0.7 * (unbroken / "extractor.weights.h5").stat().st_size * 2


def test_the_folder_of_a_run_with_nothing_left_to_do_has_its_student(
    unbroken: Path, teacher: Teacher, photos: list[Path], tmp_path: Path
) -> None:
    """One that was killed between the last checkpoint and the student, and one that began where others had ended."""
    killed = tmp_path / "killed"
    shutil.copytree(unbroken, killed)
    (killed / SMALL).unlink()
    save_extractor(build_extractor(STUDENT), STUDENT, killed)
    description = json.loads((killed / "distillation.json").read_text())
    description["distillation"]["step"] = 28
    (killed / "distillation.json").write_text(json.dumps(description))
    for folder, start in ((killed, None), (tmp_path / "begun", unbroken / SMALL)):
        run = Distillation(STUDENT, CONFIG, teacher, photos, folder, start)
        run.run()
        assert weights_key(load_extractor(folder)[0]) == weights_key(run.average)
        assert int(np.load(folder / SMALL)["step"]) == 30
        facts = json.loads((folder / "distillation.json").read_text())["distillation"]
        assert facts["step"] == 30
        assert facts["explained"] == pytest.approx(history(unbroken)[-1]["explained"], abs=2e-3)


def test_a_run_goes_on_with_its_own_photos_alone(teacher: Teacher, photos: list[Path], tmp_path: Path) -> None:
    @contextlib.contextmanager
    def stopped(total: int, done: int) -> Iterator[Callable[[int, float], None]]:
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        run_distillation(photos, teacher, STUDENT, CONFIG, tmp_path, stopped)
    with pytest.raises(TrainingError, match="begun with another dataset: photos was 24 and is now 23; give the same"):
        run_distillation(photos[1:], teacher, STUDENT, CONFIG, tmp_path, silent)
    with pytest.raises(TrainingError, match="begun with another dataset: names_sha256 was"):  # others are held out
        run_distillation(photos[::-1], teacher, STUDENT, CONFIG, tmp_path, silent)


def test_the_learning_rate(unbroken: Path, teacher: Teacher, photos: list[Path], tmp_path: Path) -> None:
    """It falls along a cosine over the run; an optimiser that begins later is warmed up all the same."""
    config = replace(CONFIG, rounds=12)  # 120 steps, of which 3.6 are a warm-up
    run = Distillation(STUDENT, config, teacher, photos, tmp_path / "a")
    rates = []
    for step in range(6):
        run.step.assign(step)
        run.optimizer.iterations.assign(step)
        rates.append(float(run.optimizer.learning_rate))
    assert rates == pytest.approx([0.01 / 3.6, 0.02 / 3.6, 0.03 / 3.6, *(0.00998, 0.00997, 0.00996)], rel=2e-3)
    later = Distillation(STUDENT, config, teacher, photos, tmp_path / "b", unbroken / SMALL)
    assert float(later.optimizer.learning_rate) == pytest.approx(0.01 / 3.6)
    later.optimizer.iterations.assign(20)
    assert float(later.optimizer.learning_rate) == pytest.approx(0.005 * (1 + np.cos(np.pi * 30 / 120)))


def test_a_start_that_does_not_fit(unbroken: Path, teacher: Teacher, photos: list[Path], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"small\.npz is of another student: it has \(7, 7, 3, 8\) where this has"):
        Distillation(replace(STUDENT, width=0.5), CONFIG, teacher, photos, tmp_path, unbroken / SMALL)
    run = Distillation(STUDENT, CONFIG, teacher, photos, tmp_path)
    (tmp_path / "text.npz").write_text("no weights")
    (tmp_path / "empty.npz").touch()
    np.save(tmp_path / "array.npy", np.zeros(3))
    for name in ("nothing.npz", "text.npz", "empty.npz", "array.npy"):
        with pytest.raises(TrainingError, match=rf"{name} cannot be read as the start of a student"):
            run._start(tmp_path / name)


def test_grids_of_another_size(photos: list[Path], teacher: Teacher, tmp_path: Path) -> None:
    student = replace(STUDENT, layer="stage2")
    with pytest.raises(OptionsError, match="grid has 7 x 7 places and the student's 3 x 3: choose layers or sizes"):
        run_distillation(photos, teacher, student, CONFIG, tmp_path / "run", silent)
    assert list(tmp_path.iterdir()) == []  # before the teacher has seen a photo


def test_too_few_photos(teacher: Teacher, photos: list[Path], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="20 photos are too few for a batch of 21 beside the held-out ones"):
        Distillation(STUDENT, replace(CONFIG, batch_size=21), teacher, photos, tmp_path)


def test_no_held_out_photo_can_be_read(teacher: Teacher, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(10)]
    with pytest.raises(TrainingError, match="none of the 2 held-out photos can be read"):
        Distillation(STUDENT, CONFIG, teacher, paths, tmp_path)


def test_a_loss_that_is_no_number(
    teacher: Teacher, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Distillation(STUDENT, CONFIG, teacher, photos, tmp_path)
    monkeypatch.setattr(run, "_train_step", lambda photos, target, seed: tf.constant(np.nan))
    with pytest.raises(TrainingError, match="the loss is nan at step 0: lower the learning rate in a new folder"):
        run.run()
    assert history(tmp_path) == []


def test_a_photo_that_is_gone(teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").mkdir()
    paths = [tmp_path / "photos" / f"{i}.png" for i in range(24)]
    for i, path in enumerate(paths):
        shape_photo(i)[0].save(path)
    run = Distillation(STUDENT, CONFIG, teacher, paths, tmp_path / "run")
    look = teacher.look

    def look_and_lose(photos: list[Path], number: int) -> Any:
        views = look(photos, number)
        for path in photos:
            path.unlink()
        return views

    monkeypatch.setattr(teacher, "look", look_and_lose)
    with pytest.raises(ImageError, match=r"\.png does not exist"):
        run.run()


@pytest.mark.slow
def test_the_whole_of_it(photos: list[Path], teacher: Teacher, tmp_path: Path) -> None:
    config = replace(CONFIG, rounds=1, passes=1)
    unreadable = tmp_path / "unreadable.png"
    unreadable.write_bytes(b"no photo")

    def go(config: DistillConfig, student: ExtractorConfig = STUDENT) -> None:
        run_distillation([*photos, unreadable], teacher, student, config, tmp_path / "run", silent)

    go(config)
    first = weights_key(load_extractor(tmp_path / "run")[0])
    facts = json.loads((tmp_path / "run" / "distillation.json").read_text())["distillation"]
    assert facts["photos"] == 21  # the unreadable one is among those that are learnt from, as far as the list knows
    assert facts["step"] == history(tmp_path / "run")[-1]["step"]
    assert facts["teacher"]["weights"] == "extractor.weights.h5"
    assert facts["teacher"]["layer"] == "mixed0"
    assert len(facts["teacher"]["sha256"]) == 64
    assert facts["options"]["rounds"] == 1
    assert facts["explained"] == pytest.approx(history(tmp_path / "run")[-1]["explained"], rel=1e-4)
    go(config)  # nothing is left to do
    assert weights_key(load_extractor(tmp_path / "run")[0]) == first
    with pytest.raises(TrainingError, match="begun with another options: rounds was 1 and is now 2; give the same"):
        go(replace(config, rounds=2))
    with pytest.raises(TrainingError, match=r"begun with another student: width was 0\.25 and is now 0\.3"):
        go(config, replace(STUDENT, width=0.3))


@pytest.mark.parametrize(
    "change",
    [{"rounds": 0}, {"window": 0}, {"batch_size": -1}, {"learning_rate": float("nan")}, {"weight_decay": -0.1}],
)
def test_config_refuses(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(OptionsError, match=f"distillation: {name} must"):
        DistillConfig(**change)

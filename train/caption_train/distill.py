"""Teaches a small extractor to see what a large one sees, from photos alone.

The student's grid, through a linear map that is thrown away afterwards, learns to reproduce the teacher's grid: hints
as in Romero et al. 2015, "FitNets", at every place of the grid; and both see the very same crop, as Beyer et al. 2021,
"Knowledge distillation: a good teacher is patient and consistent", ask for. The teacher is slow, so that what it says
about a fixed number of views of each photo is kept in a `GridCache`; a view is flipped together with its grid.

No weight of the teacher enters the student: it starts at random and sees the teacher's outputs only.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from PIL import Image

from caption_rt.errors import OptionsError
from caption_rt.image import open_photo, read_photo
from caption_train.cache import ABSENT, GridCache
from caption_train.checkpoints import Checkpoints, tensorflow_errors
from caption_train.errors import TrainingError
from caption_train.files import (
    append_json_line,
    read_json,
    read_json_lines,
    refuse_other_options,
    rewrite_json_lines,
    write_json,
)
from caption_train.inception import (
    DISTILLATION,
    ExtractorConfig,
    build_extractor,
    extract_with,
    load_extractor_weights,
    save_extractor,
    weights_key,
)
from caption_train.schedules import WarmupCosine

logger = logging.getLogger(__name__)

_CROP_AREA = (0.35, 1.0)
_CROP_ASPECT = (3 / 4, 4 / 3)
_LOOK_AHEAD = 4  # batches read while the network is busy
_KEPT_CHECKPOINTS = 2
_OPTIONS, _HISTORY = "options.json", "distill.jsonl"


@dataclass(frozen=True)
class DistillConfig:
    """Options of a distillation run."""

    epochs: int = 10
    """Passes over all views."""
    views: int = 2
    """Views of each photo: the first is the whole photo, the others are crops."""
    batch_size: int = 64
    """Views a step."""
    learning_rate: float = 2e-3
    """Peak of the schedule: linear warm-up over the first 3 %, then a cosine down to zero."""
    weight_decay: float = 1e-4
    """Decoupled, as in AdamW (Loshchilov and Hutter 2019)."""
    validation: int = 256
    """Photos that are held out to measure the loss on."""
    checkpoint_steps: int = 100
    """Steps between two checkpoints."""
    seed: int = 0
    """Of the initial weights, the held-out photos, the order and the augmentation."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            OptionsError: A number out of its range.
        """
        for name in ("epochs", "views", "batch_size", "validation", "checkpoint_steps"):
            if getattr(self, name) < 1:
                raise OptionsError(f"distillation: {name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise OptionsError(f"distillation: learning_rate must be a positive number, not {self.learning_rate}")
        if not 0 <= self.weight_decay < math.inf:
            raise OptionsError(f"distillation: weight_decay must not be below 0, as {self.weight_decay} is")


@dataclass(frozen=True)
class Views:
    """One view of each photo, and what the teacher says about it."""

    paths: tuple[Path, ...]
    """The photos that can be read."""
    view: int
    """Which view, as `read_view` numbers them."""
    rows: NDArray[np.int64]
    """The rows of the teacher's grids in the cache, int64 [len(paths)]."""
    cache: GridCache
    """Where the grids are."""


def read_view(path: Path, size: int, view: int) -> NDArray[np.uint8]:
    """Read one view of a photo: the same crop whoever asks.

    Args:
        path: The photo.
        size: Height and width of the view, in pixels.
        view: 0 is the whole photo; each other number is a crop drawn by the photo's content and that number.

    Returns:
        uint8 [size, size, 3] RGB.

    Raises:
        ImageError: The photo cannot be read.
    """
    if view == 0:
        return read_photo(path, size)
    photo = open_photo(path)
    rng = np.random.default_rng([view, *hashlib.sha256(photo.tobytes()).digest()[:8]])
    area = photo.width * photo.height * rng.uniform(*_CROP_AREA)
    aspect = math.exp(rng.uniform(math.log(_CROP_ASPECT[0]), math.log(_CROP_ASPECT[1])))
    width = min(photo.width, round(math.sqrt(area * aspect)))
    height = min(photo.height, round(math.sqrt(area / aspect)))
    left, top = (int(rng.integers(0, room + 1)) for room in (photo.width - width, photo.height - height))
    box = (left, top, left + width, top + height)
    return np.asarray(photo.resize((size, size), Image.Resampling.BILINEAR, box=box))


def teacher_views(
    teacher: keras.Model,
    config: ExtractorConfig,
    photos: Sequence[Path],
    views: int,
    cache_folder: Path,
) -> list[Views]:
    """Compute, or find in the cache, what the teacher says about every view of every photo.

    Raises:
        TrainingError: The cache cannot be written.
    """
    rows, columns, channels = teacher.output_shape[1:]
    weights, found = weights_key(teacher), []
    for view in range(views):
        key = f"{weights} {asdict(config)} view {view}"
        cache = GridCache.open(cache_folder, key, (rows * columns, channels))
        indices = cache.fill(photos, extract_with(teacher), read=partial(read_view, size=config.size, view=view))
        readable = [int(i) for i in np.flatnonzero(indices != ABSENT)]
        found.append(Views(tuple(photos[i] for i in readable), view, indices[readable], cache))
        logger.info("teacher: view %d of %d, %d photos", view + 1, views, len(readable))
    return found


class Distillation:
    """One run: the student, the linear map on top of it, the optimiser and their checkpoints."""

    def __init__(self, student: ExtractorConfig, config: DistillConfig, views: Sequence[Views], folder: Path) -> None:
        """Build everything and go back to the last checkpoint, if the folder has one.

        Args:
            student: The extractor to train.
            config: Options of the run.
            views: What the teacher said, from `teacher_views`.
            folder: Where checkpoints, log and the finished extractor go.

        Raises:
            TrainingError: Too few photos, or the checkpoint is of another run.
        """
        keras.utils.set_random_seed(config.seed)
        self.student_config, self.config, self.folder = student, config, folder
        self.student = build_extractor(student)
        _, channels = views[0].cache.grid_shape
        rows, columns, _ = self.student.output_shape[1:]
        self._train, self._held_out = _hold_out(views, config)
        if len(self._train) < config.batch_size:
            raise TrainingError(
                f"{len(self._train)} views are too few for a batch of {config.batch_size} beside the held-out photos"
            )
        self._views = views
        self._grid = (rows, columns)
        self.steps_an_epoch = len(self._train) // config.batch_size
        self.total_steps = self.steps_an_epoch * config.epochs
        self.head = keras.Sequential([keras.Input((rows, columns, self.student.output_shape[-1]))])
        self.head.add(keras.layers.Conv2D(channels, 1, name="hint"))
        self._mean, self._scale = _channel_statistics(views[0])
        self.optimizer = keras.optimizers.AdamW(
            WarmupCosine(config.learning_rate, self.total_steps), weight_decay=config.weight_decay
        )
        self._variables = [*self.student.trainable_variables, *self.head.trainable_variables]
        self.optimizer.build(self._variables)
        self.step = tf.Variable(0, dtype=tf.int64, trainable=False)
        parts = {"student": self.student, "head": self.head, "optimizer": self.optimizer, "step": self.step}
        self._checkpoints = Checkpoints(folder / "checkpoints", _KEPT_CHECKPOINTS, parts)
        if self._checkpoints.restore():
            logger.info("going on at step %d of %d", int(self.step), self.total_steps)

    def run(self, on_step: Callable[[int, float], None] = lambda step, loss: None) -> Path:
        """Train to the end.

        Args:
            on_step: Called after every step with the step's number and loss, for a progress bar.

        Returns:
            The folder with the finished extractor, which `caption_train.inception.load_extractor` reads.

        Raises:
            TrainingError: The loss is no number any more, or a checkpoint cannot be written.
            ImageError: A photo is gone since the teacher saw it.
            OSError: The folder cannot be written.
        """
        history = [row for row in read_json_lines(self.folder / _HISTORY) if row["step"] <= int(self.step)]
        rewrite_json_lines(self.folder / _HISTORY, history)
        started, losses = time.monotonic(), list[float]()
        for photos, grids, seed in self._batches():
            with tensorflow_errors(f"step {int(self.step)}"):
                losses.append(float(self._train_step(photos, self._target(grids), seed)))
            if not math.isfinite(losses[-1]):
                raise TrainingError(
                    f"the loss is {losses[-1]} at step {int(self.step)}: lower the learning rate in a new folder"
                )
            self.step.assign_add(1)
            step = int(self.step)
            on_step(step, losses[-1])
            if step % self.config.checkpoint_steps == 0 or step == self.total_steps:
                record = {"step": step, "epoch": step / self.steps_an_epoch, "loss": float(np.mean(losses))}
                if step % self.steps_an_epoch < self.config.checkpoint_steps or step == self.total_steps:
                    record["val_loss"] = self.validate()
                record["seconds"] = time.monotonic() - started
                # The record goes first, as in `caption_train.training`: after a kill in between it is written again.
                append_json_line(self.folder / _HISTORY, record)
                self._checkpoints.save(step)
                losses.clear()
        save_extractor(self.student, self.student_config, self.folder)
        return self.folder

    def validate(self) -> float:
        """Mean squared error on the held-out photos, whole and unaugmented; 1 is as good as the teacher's mean."""
        losses = []
        whole = self._views[0]
        for start in range(0, len(self._held_out), self.config.batch_size):
            chosen = self._held_out[start : start + self.config.batch_size]
            photos = np.stack([read_view(whole.paths[i], self.student_config.size, 0) for i in chosen])
            prediction = self.head(self.student(photos, training=False), training=False)
            target = self._target(whole.cache.gather(whole.rows[chosen]))
            losses.append((float(tf.reduce_mean(tf.square(prediction - target))), len(chosen)))
        return float(np.average([loss for loss, _ in losses], weights=[count for _, count in losses]))

    def _target(self, grids: NDArray[np.float16]) -> NDArray[np.float32]:
        """The teacher's grids [n, P, C] as [n, rows, columns, C], every channel's root at mean 0 and variance 1."""
        normalised = (_root(grids) - self._mean) / self._scale
        return normalised.reshape(-1, *self._grid, grids.shape[-1])

    @tf.function
    def _train_step(self, photos: tf.Tensor, target: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        photos, target = _augment(tf.cast(photos, tf.float32), target, seed)
        with tf.GradientTape() as tape:
            prediction = self.head(self.student(photos, training=True), training=True)
            loss = tf.reduce_mean(tf.square(prediction - target))
        self.optimizer.apply(tape.gradient(loss, self._variables), self._variables)
        return loss

    def _batches(self) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.int32]]]:
        """Batches from the current step to the last, read ahead; the same ones after a stop as without it."""

        def load(chosen: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
            photos, grids = [], []
            for view, index in chosen:
                source = self._views[view]
                photos.append(read_view(source.paths[index], self.student_config.size, source.view))
                grids.append(source.cache.gather(source.rows[index : index + 1])[0])
            return np.stack(photos), np.stack(grids)

        def order() -> Iterator[NDArray[np.int64]]:
            size = self.config.batch_size
            for step in range(int(self.step), self.total_steps):
                epoch, position = divmod(step, self.steps_an_epoch)
                shuffled = np.random.default_rng([self.config.seed, epoch]).permutation(len(self._train))
                yield self._train[shuffled[position * size : (position + 1) * size]]

        waiting: deque[Future[tuple[NDArray[np.uint8], NDArray[np.float16]]]] = deque()
        upcoming = order()
        step = int(self.step)
        with ThreadPoolExecutor(1) as pool:
            while True:
                while len(waiting) < _LOOK_AHEAD and (chosen := next(upcoming, None)) is not None:
                    waiting.append(pool.submit(load, chosen))
                if not waiting:
                    return
                photos, grids = waiting.popleft().result()
                yield photos, grids, np.array([self.config.seed, step], np.int32)
                step += 1


def _hold_out(views: Sequence[Views], config: DistillConfig) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs (view, index) int64 [n, 2] to train on, and indices of whole photos to validate on.

    A held-out photo is held out in all of its views. A fifth of the photos at most is, and one at least.
    """
    count = len(views[0].paths)
    chosen = np.random.default_rng(config.seed).permutation(count)[: max(1, min(config.validation, count // 5))]
    held_out = {views[0].paths[i] for i in chosen}
    pairs = [
        (number, index)
        for number, source in enumerate(views)
        for index, path in enumerate(source.paths)
        if path not in held_out
    ]
    return np.array(pairs, np.int64), np.sort(chosen)


def _channel_statistics(views: Views, photos: int = 512) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and standard deviation of the roots of the teacher's channels, float32 [C] each, over the first photos."""
    grids = _root(views.cache.gather(views.rows[:photos]))
    grids = grids.reshape(-1, grids.shape[-1])
    # A channel that never fires has no scale of its own; the floor keeps noise in it from counting.
    return grids.mean(0), np.maximum(grids.std(0), 1e-2)


def _root(grids: NDArray[np.float16]) -> NDArray[np.float32]:
    """Square roots: a channel after its ReLU has a long tail, and a third of the squared error would come from it.

    Perronnin et al. 2010, "Improving the Fisher Kernel", section 3.2 (power normalisation).
    """
    return np.sqrt(np.maximum(grids.astype(np.float32), 0))


def _augment(photos: tf.Tensor, target: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Flip photo and grid together, and change the photo's light and colour, which the teacher's view stays true to.

    Args:
        photos: float32 [n, S, S, 3] in 0..255.
        target: float32 [n, rows, columns, C].
        seed: int32 [2]; the same seed draws the same.
    """
    count = tf.shape(photos)[0]
    draws = tf.random.stateless_uniform((4, count, 1, 1, 1), seed)
    flip = draws[0] < 0.5
    photos = tf.where(flip, photos[:, :, ::-1], photos)
    target = tf.where(flip, target[:, :, ::-1], target)
    brightness, contrast, saturation = (0.8 + 0.4 * draws[i] for i in (1, 2, 3))
    photos = photos * brightness
    mean = tf.reduce_mean(photos, axis=(1, 2, 3), keepdims=True)
    photos = mean + contrast * (photos - mean)
    grey = tf.reduce_mean(photos, axis=3, keepdims=True)
    photos = grey + saturation * (photos - grey)
    return tf.clip_by_value(photos, 0, 255), target


def run_distillation(
    photos: Sequence[Path],
    teacher_config: ExtractorConfig,
    teacher_weights: str,
    student_config: ExtractorConfig,
    config: DistillConfig,
    folder: Path,
    cache_folder: Path,
    progress: Callable[[int, int], AbstractContextManager[Callable[[int, float], None]]],
) -> None:
    """The whole of it: what the teacher says, then the student, then its description for model cards.

    Args:
        photos: Files without captions.
        teacher_config: The large extractor.
        teacher_weights: As `caption_train.inception.load_extractor_weights` takes them.
        student_config: The small extractor.
        config: Options.
        folder: Where the run goes and the finished extractor stays.
        cache_folder: Where the teacher's grids are kept.
        progress: Given all steps and those done, opens what is called after each step.

    Raises:
        OptionsError: The grids of student and teacher differ in size.
        TrainingError: The folder holds a run with other options; see `teacher_views` and `Distillation`.
        OSError: The folder cannot be written.
    """
    teacher = build_extractor(teacher_config)
    theirs, ours = teacher.output_shape[1:3], build_extractor(student_config).output_shape[1:3]
    if theirs != ours:  # found now rather than when the teacher has seen all photos
        raise OptionsError(
            f"the teacher's grid has {theirs[0]} x {theirs[1]} places and the student's {ours[0]} x {ours[1]}: choose "
            "layers that agree"
        )
    teacher_key = load_extractor_weights(teacher, teacher_weights)
    options = {
        "teacher": {**asdict(teacher_config), "weights": Path(teacher_weights).name, "sha256": teacher_key},
        "student": asdict(student_config),
        "options": asdict(config),
    }
    if (folder / _OPTIONS).exists():
        refuse_other_options(folder, read_json(folder / _OPTIONS), options)
    else:
        write_json(folder / _OPTIONS, options)
    views = teacher_views(teacher, teacher_config, photos, config.views, cache_folder)
    run = Distillation(student_config, config, views, folder)
    with progress(run.total_steps, int(run.step)) as on_step:
        run.run(on_step)
    record = {"photos": len(views[0].paths), **options, "validation_loss": run.validate()}
    del record["student"]  # that is extractor.json
    write_json(folder / DISTILLATION, {"distillation": record})

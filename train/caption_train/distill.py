"""Teaches a small extractor to see what a large one sees, from photos alone.

The student's grid, through a linear map that is thrown away afterwards, learns to reproduce the teacher's grid: hints
as in Romero et al. 2015, "FitNets", at every place of the grid. Both see the very same view of a photo, there are ever
new views, and there is no end to patience: Beyer et al. 2021, "Knowledge distillation: a good teacher is patient and
consistent". The teacher is slow, so a run goes in rounds: in each one the teacher looks at a new view of every photo,
and the student takes some passes' worth of steps over the views of the last few rounds, flipped together with their
grids every other time.

No weight of the teacher enters the student: it starts at random and sees the teacher's outputs only.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from caption_rt.errors import OptionsError
from caption_train.captioned import CaptionedImage
from caption_train.checkpoints import Checkpoints, tensorflow_errors
from caption_train.distill_progress import Examiner
from caption_train.distill_scale import Scale
from caption_train.distill_views import WHOLE, Teacher, Views, compute_in_bfloat16, read_view
from caption_train.errors import TrainingError, first_line
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
    save_extractor,
)
from caption_train.runs import Run

logger = logging.getLogger(__name__)

SMALL = "small.npz"
"""In a run folder: what another machine needs to go on, without the optimiser's state and in half the bytes."""

_LOOK_AHEAD = 4  # batches read while the network is busy
_KEPT_CHECKPOINTS = 2
_AVERAGED_STEPS = 1000
_WARMUP_STEPS = 300
_OPTIONS, _HISTORY = "options.json", "distill.jsonl"


@dataclass(frozen=True)
class DistillConfig:
    """Options of a distillation run."""

    rounds: int = 48
    """New views of every photo."""
    passes: int = 4
    """Passes' worth of steps a round."""
    window: int = 4
    """Rounds whose views are learnt from: the newest ones."""
    batch_size: int = 32
    """Views a step."""
    learning_rate: float = 1e-3
    """Peak of the schedule: a short linear warm-up, then a cosine down to zero over the whole run."""
    weight_decay: float = 2e-2
    """Decoupled, as in AdamW (Loshchilov and Hutter 2019)."""
    validation: int = 256
    """Photos that are held out to measure the loss on."""
    checkpoint_steps: int = 250
    """Steps between two checkpoints."""
    seed: int = 0
    """Of the initial weights, the held-out photos, and what is drawn in each step."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            OptionsError: A number out of its range.
        """
        for name in ("rounds", "passes", "window", "batch_size", "validation", "checkpoint_steps"):
            if getattr(self, name) < 1:
                raise OptionsError(f"distillation: {name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise OptionsError(f"distillation: learning_rate must be a positive number, not {self.learning_rate}")
        if not 0 <= self.weight_decay < math.inf:
            raise OptionsError(f"distillation: weight_decay must not be below 0, as {self.weight_decay} is")


class Distillation:
    """One run: the student, the linear map on top of it, their running means, the optimiser, and the checkpoints.

    What is used is the running mean of the weights over the last thousand steps or so (Polyak and Juditsky 1992): it is
    good at any moment, while the weights themselves are so only after the learning rate has gone down.
    """

    def __init__(
        self,
        student: ExtractorConfig,
        config: DistillConfig,
        teacher: Teacher,
        photos: Sequence[Path],
        folder: Path,
        start_from: Path | None = None,
    ) -> None:
        """Build everything and go back to the last checkpoint, if the folder has one.

        Args:
            student: The extractor to train.
            config: Options of the run.
            teacher: The teacher.
            photos: Files without captions.
            folder: Where checkpoints, log and the finished extractor go.
            start_from: A `SMALL` of the same student, with which a run begins that has no checkpoint yet: at the next
                round, with an optimiser that knows nothing. The log that lies beside it is gone on with.

        Raises:
            TrainingError: Too few photos, or the checkpoint is of another run.
        """
        keras.utils.set_random_seed(config.seed)
        self.student_config, self.config, self.folder, self.teacher = student, config, folder, teacher
        self._train, held_out = _hold_out(photos, config)
        if len(self._train) < config.batch_size:
            raise TrainingError(
                f"{len(self._train)} photos are too few for a batch of {config.batch_size} beside the held-out ones"
            )
        self._held_out = teacher.look(held_out, WHOLE)
        if not self._held_out.paths:
            raise TrainingError(f"none of the {len(held_out)} held-out photos can be read")
        self._scale = Scale.of(self._held_out)
        self.steps_a_round = max(1, len(self._train) * config.passes // config.batch_size)
        self.total_steps = self.steps_a_round * config.rounds
        self.student, self.head = build_extractor(student), _linear_map(student, teacher)
        self.average, self.average_head = build_extractor(student), _linear_map(student, teacher)
        for model in (self.student, self.head):
            compute_in_bfloat16(model)
        self.step = tf.Variable(0, dtype=tf.int64, trainable=False)
        self.first_round = tf.Variable(0, dtype=tf.int64, trainable=False)
        rate = _Rate(config.learning_rate, self.total_steps, self.step)
        self.optimizer = keras.optimizers.AdamW(rate, weight_decay=config.weight_decay)
        self._variables = [*self.student.trainable_variables, *self.head.trainable_variables]
        self.optimizer.build(self._variables)
        self._pairs = list(zip(self._weights(averages=True), self._weights(averages=False), strict=True))
        for mean, weight in self._pairs:
            mean.assign(weight)
        parts = {
            "student": self.student,
            "head": self.head,
            "average": self.average,
            "average_head": self.average_head,
            "optimizer": self.optimizer,
            "step": self.step,
            "first_round": self.first_round,
        }
        self._checkpoints = Checkpoints(folder / "checkpoints", _KEPT_CHECKPOINTS, parts)
        if self._checkpoints.restore():
            logger.info("going on at step %d of %d", int(self.step), self.total_steps)
        elif start_from is not None:
            self._start(start_from)

    def run(
        self,
        on_step: Callable[[int, float], None] = lambda step, loss: None,
        examiner: Examiner | None = None,
    ) -> Path:
        """Train to the end.

        Args:
            on_step: Called after every step with the step's number and loss, for a progress bar.
            examiner: Examines the student at the end of each round.

        Returns:
            The folder with the finished extractor, which `caption_train.inception.load_extractor` reads.

        Raises:
            TrainingError: The loss is no number any more, or a checkpoint or the teacher's grids cannot be written.
            ImageError: A photo is gone since the teacher saw it.
            OSError: The folder cannot be written.
        """
        if int(self.step) and self._described() != int(self.step):
            self._write_student()  # of a run that was killed before it did, or that began elsewhere
        history = [row for row in read_json_lines(self.folder / _HISTORY) if row["step"] <= int(self.step)]
        rewrite_json_lines(self.folder / _HISTORY, history)
        started, losses = time.monotonic(), list[float]()
        for photos, grids, seed in self._batches():
            with tensorflow_errors(f"step {int(self.step)}"):
                losses.append(float(self._train_step(photos, grids, seed)))
            if not math.isfinite(losses[-1]):
                raise TrainingError(
                    f"the loss is {losses[-1]} at step {int(self.step)}: lower the learning rate in a new folder"
                )
            self.step.assign_add(1)
            step = int(self.step)
            on_step(step, losses[-1])
            round_ends = step % self.steps_a_round == 0
            if step % self.config.checkpoint_steps == 0 or round_ends:
                record = {"step": step, "round": step / self.steps_a_round, "loss": float(np.mean(losses))}
                record |= self.validate()
                if examiner is not None and round_ends:
                    record["CIDEr"] = examiner.cider(self.teachers_grid, self.student_config.size)
                record["seconds"] = round(time.monotonic() - started, 1)
                logger.info("%s", ", ".join(f"{name} {value:.4g}" for name, value in record.items()))
                # The record goes first, as in `caption_train.training`: after a kill in between it is written again.
                append_json_line(self.folder / _HISTORY, record)
                self._checkpoints.save(step)
                self._write_student(record)
                losses.clear()
        return self.folder

    def validate(self) -> dict[str, float]:
        """How much of the variance of what the teacher says about the held-out photos the student's mean explains.

        Returns:
            ``explained``, at each place, and ``explained_means``, of the mean over a photo's places; 1 is all of it, 0
            what is the same for all photos explains.
        """
        errors = np.zeros(2)
        views, batch = self._held_out, self.config.batch_size
        for start in range(0, len(views.paths), batch):
            chosen = slice(start, start + batch)
            photos = np.stack([read_view(path, self.student_config.size, WHOLE) for path in views.paths[chosen]])
            prediction = self.average_head(self.average(photos, training=False), training=False)
            target = self._scale.target(views.cache.gather(views.rows[chosen]), self.teacher.grid_shape)
            errors += len(photos) * np.array([float(x) for x in self._scale.errors(prediction, target)])
        explained, explained_means = 1 - errors / len(views.paths)
        return {"explained": float(explained), "explained_means": float(explained_means)}

    def teachers_grid(self, photos: NDArray[np.uint8]) -> NDArray[np.float32]:
        """What the student's mean takes for the teacher's grids, float32 [n, P, C], of photos uint8 [n, S, S, 3]."""
        prediction = self.average_head(self.average(photos, training=False), training=False)
        return self._scale.grid(np.asarray(prediction))

    @tf.function(autograph=False)
    def _train_step(self, photos: tf.Tensor, grids: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        target = self._scale.target(grids, self.teacher.grid_shape)
        photos, target = _flip(photos, target, seed)
        with tf.GradientTape() as tape:
            prediction = self.head(self.student(tf.cast(photos, tf.float32), training=True), training=True)
            at_places, of_means = self._scale.errors(prediction, target)
            loss = at_places + of_means
        self.optimizer.apply(tape.gradient(loss, self._variables), self._variables)
        # Over few steps at first, so that the beginning is soon forgotten.
        share = tf.maximum(1 / _AVERAGED_STEPS, 1 / (tf.cast(self.step, tf.float32) / 10 + 2))
        for mean, weight in self._pairs:
            mean.assign_add((weight - mean) * share)
        return loss

    def _batches(self) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.int32]]]:
        """Batches from the current step to the last, read ahead; the same ones after a stop as without it."""
        kept: list[Views] = []
        while int(self.step) < self.total_steps:
            first, number = int(self.first_round), int(self.step) // self.steps_a_round
            oldest = max(first, number - self.config.window + 1)
            # By their numbers and before the teacher looks: a stop may have come when they should have been deleted.
            for earlier in range(first, oldest):
                self.teacher.forget(self._train, earlier + 1)
            kept = [views for views in kept if views.number > oldest]
            for earlier in range(oldest + len(kept), number + 1):
                kept.append(self.teacher.look(self._train, earlier + 1))
                logger.info("the teacher has seen view %d of %d photos", earlier + 1, len(kept[-1].paths))
            yield from self._batches_of(kept, (number + 1) * self.steps_a_round)

    def _batches_of(
        self, views: Sequence[Views], end: int
    ) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.int32]]]:
        """Batches from the current step up to another one, drawn from some views."""

        def load(step: int) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.int32]]:
            rng = np.random.default_rng([self.config.seed, step])
            photos, grids = [], []
            for source in (views[i] for i in rng.integers(len(views), size=self.config.batch_size)):
                i = int(rng.integers(len(source.paths)))
                photos.append(read_view(source.paths[i], self.student_config.size, source.number, self._train))
                grids.append(source.cache.gather(source.rows[i : i + 1])[0])
            return np.stack(photos), np.stack(grids), np.array([self.config.seed, step], np.int32)

        waiting: deque[Future[tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.int32]]]] = deque()
        steps = iter(range(int(self.step), end))
        with ThreadPoolExecutor(1) as pool:
            while True:
                while len(waiting) < _LOOK_AHEAD and (step := next(steps, None)) is not None:
                    waiting.append(pool.submit(load, step))
                if not waiting:
                    return
                yield waiting.popleft().result()

    def _weights(self, *, averages: bool) -> list[Any]:
        """All weights of student and map, normalisation's statistics included, or their running means."""
        models = (self.average, self.average_head) if averages else (self.student, self.head)
        return [weight.value for model in models for weight in model.weights]

    def _write_student(self, found: Mapping[str, float] | None = None) -> None:
        """Write the student as it is.

        Args:
            found: What `validate` found of it, if it was asked already.
        """
        self._write_small()
        save_extractor(self.average, self.student_config, self.folder)
        self._describe(found or self.validate())  # last: it says of which step the others are

    def _write_small(self) -> None:
        """Write `SMALL`: kernels in float16."""
        arrays = [np.asarray(weight) for weight in self._weights(averages=True)]
        arrays = [array.astype(np.float16) if array.ndim > 1 else array for array in arrays]
        temporary = self.folder / f"small-{os.getpid()}.npz"
        np.savez(temporary, *arrays, step=np.int64(int(self.step)))
        os.replace(temporary, self.folder / SMALL)

    def _described(self) -> int | None:
        """The step of the student that the folder has; None if it has none."""
        path = self.folder / DISTILLATION
        return int(read_json(path)["distillation"]["step"]) if path.exists() else None

    def _describe(self, found: Mapping[str, float]) -> None:
        """Write what model cards say of the extractor as it is."""
        facts = {
            "photos": len(self._train),
            "teacher": self.teacher.facts,
            "options": asdict(self.config),
            "step": int(self.step),
            **{name: found[name] for name in ("explained", "explained_means")},
        }
        write_json(self.folder / DISTILLATION, {"distillation": facts})

    def _start(self, path: Path) -> None:
        """Begin with what `_write_small` wrote, at the next round."""
        try:
            with np.load(path, allow_pickle=False) as found:
                step = int(found["step"])
                arrays = [found[f"arr_{i}"] for i in range(len(self._pairs))]
        # What NumPy stumbles over in a file that is no .npz depends on the file's first bytes.
        except (OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, zipfile.BadZipFile) as exc:
            raise TrainingError(f"{path} cannot be read as the start of a student: {first_line(exc)}") from exc
        for (mean, weight), array in zip(self._pairs, arrays, strict=True):
            if array.shape != tuple(weight.shape):
                raise TrainingError(f"{path} is of another student: it has {array.shape} where this has {weight.shape}")
            mean.assign(array.astype(np.float32))
            weight.assign(array.astype(np.float32))
        number = math.ceil(step / self.steps_a_round)
        self.step.assign(number * self.steps_a_round)
        self.first_round.assign(number)
        rewrite_json_lines(self.folder / _HISTORY, read_json_lines(path.with_name(_HISTORY)))
        logger.info("going on with %s at round %d of %d", path, number, self.config.rounds)


class _Rate(keras.optimizers.schedules.LearningRateSchedule):
    """A cosine over the run, under a warm-up of the optimiser, which may have begun later than the run did."""

    def __init__(self, peak: float, total_steps: int, run_step: tf.Variable) -> None:
        self._peak, self._total_steps, self._run_step = peak, total_steps, run_step
        self._warmup = max(1.0, min(_WARMUP_STEPS, 0.03 * total_steps))

    def __call__(self, step: Any) -> tf.Tensor:
        """The rate at a step of the optimiser."""
        share = tf.cast(self._run_step, tf.float32) / self._total_steps
        cosine = 0.5 * (1 + tf.cos(math.pi * tf.minimum(share, 1.0)))
        return self._peak * tf.minimum((tf.cast(step, tf.float32) + 1) / self._warmup, cosine)


def _linear_map(student: ExtractorConfig, teacher: Teacher) -> keras.Model:
    """From the student's grid to the teacher's channels, place by place: at first to their means."""
    rows, columns, channels = build_extractor(student).output_shape[1:]
    grid = keras.Input((rows, columns, channels))
    mapped = keras.layers.Conv2D(teacher.grid_shape[-1], 1, kernel_initializer="zeros", name="hint")(grid)
    return keras.Model(grid, keras.layers.Activation("linear", dtype="float32")(mapped))


def _hold_out(photos: Sequence[Path], config: DistillConfig) -> tuple[list[Path], list[Path]]:
    """Photos to learn from, and photos to measure on: a fifth of them at most, and one at least."""
    count = max(1, min(config.validation, len(photos) // 5))
    held_out = set(np.random.default_rng(config.seed).permutation(len(photos))[:count].tolist())
    train = [path for i, path in enumerate(photos) if i not in held_out]
    return train, [photos[i] for i in sorted(held_out)]


def _names(photos: Sequence[Path]) -> dict[str, Any]:
    """What a run notes of its photos; their order says which ones are held out."""
    names = "\n".join(path.name for path in photos)
    return {"photos": len(photos), "names_sha256": hashlib.sha256(names.encode()).hexdigest()}


def _flip(photos: tf.Tensor, target: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Flip every other photo together with its grid.

    Args:
        photos: uint8 [n, S, S, 3].
        target: float32 [n, rows, columns, C].
        seed: int32 [2]; the same seed draws the same.
    """
    flip = tf.random.stateless_uniform((tf.shape(photos)[0], 1, 1, 1), seed) < 0.5
    return tf.where(flip, tf.reverse(photos, [2]), photos), tf.where(flip, tf.reverse(target, [2]), target)


def run_distillation(
    photos: Sequence[Path],
    teacher: Teacher,
    student_config: ExtractorConfig,
    config: DistillConfig,
    folder: Path,
    progress: Callable[[int, int], AbstractContextManager[Callable[[int, float], None]]],
    *,
    start_from: Path | None = None,
    captioner: tuple[Run, Sequence[CaptionedImage]] | None = None,
) -> None:
    """The whole of it: teacher and student, round by round.

    Args:
        photos: Files without captions.
        teacher: The large extractor.
        student_config: The small extractor.
        config: Options.
        folder: Where the run goes and the finished extractor stays.
        progress: Given all steps and those done, opens what is called after each step.
        start_from: See `Distillation`.
        captioner: A run on the teacher's grids, and the photos whose captions show how far the student is.

    Raises:
        OptionsError: The grids of student and teacher differ in size.
        TrainingError: The folder holds a run with other options or photos; see `Distillation` and `Examiner`.
        OSError: The folder cannot be written.
    """
    theirs, ours = teacher.grid_shape[:2], build_extractor(student_config).output_shape[1:3]
    if theirs != ours:  # found now rather than when the teacher has seen all photos
        raise OptionsError(
            f"the teacher's grid has {theirs[0]} x {theirs[1]} places and the student's {ours[0]} x {ours[1]}: choose "
            "layers or sizes that agree"
        )
    options = {
        "teacher": teacher.facts,
        "student": asdict(student_config),
        "options": asdict(config),
        "dataset": _names(photos),
    }
    if (folder / _OPTIONS).exists():
        refuse_other_options(folder, read_json(folder / _OPTIONS), options)
    else:
        write_json(folder / _OPTIONS, options)
    examiner = Examiner(*captioner, teacher) if captioner is not None else None
    run = Distillation(student_config, config, teacher, photos, folder, start_from)
    with progress(run.total_steps, int(run.step)) as on_step:
        run.run(on_step, examiner)

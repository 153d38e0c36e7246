"""Checkpoints on disk, and TensorFlow's errors as this project's."""

from __future__ import annotations

import contextlib
import glob
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph

from caption_train.errors import TrainingError, first_line

logger = logging.getLogger(__name__)

# TensorFlow's reader of checkpoints turns some of its errors into Python's.
_UNREADABLE = (tf.errors.OpError, LookupError, RuntimeError)

_STATE = "checkpoint"  # CheckpointManager's file


def latest_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint of a folder, without the endings of its files; None where there never was one.

    TensorFlow's function of this name takes the folder for a pattern; see `plain_path`.

    Raises:
        TrainingError: What the folder says of its checkpoints is damaged, and there are none.
    """
    paths = _checkpoints(folder)
    return paths[-1] if paths else None


def _checkpoints(folder: Path) -> list[str]:
    """The checkpoints of a folder, oldest first: those that the manager wrote down, or else those that are there.

    TensorFlow does not wait until the disk has what it wrote down, so a power cut may leave an empty file.
    """
    if (state := _state(folder)) is not None:
        return list(state.all_model_checkpoint_paths) or [state.model_checkpoint_path]
    named = [re.fullmatch(r"ckpt-(\d+)\.index", path.name) for path in folder.glob("ckpt-*.index")]
    numbers = sorted(int(name[1]) for name in named if name)
    path = folder / _STATE
    if numbers:
        logger.warning("%s is missing or damaged: taking the checkpoints that are there", path)
    elif path.exists():
        raise TrainingError(f"{path}, which says what checkpoints there are, is damaged: put a copy of it in its place")
    return [str(folder / f"ckpt-{number}") for number in numbers]


def _state(folder: Path) -> Any:
    """Which checkpoints there are, as the manager wrote it down: a CheckpointState; None if that cannot be read."""
    try:
        return tf.train.get_checkpoint_state(str(folder))
    except ValueError:  # no text, or nothing in it
        return None


@contextlib.contextmanager
def plain_path(path: str) -> Iterator[str]:
    """A checkpoint under a path that TensorFlow can read.

    TensorFlow looks for a checkpoint's files by a pattern, for which it takes the path itself: those in a folder that
    is called "run[1]" are copied to one that is not, as long as they are read.

    Args:
        path: The checkpoint, without the endings of its files.
    """
    pattern = glob.escape(path)
    if pattern == path:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in glob.glob(f"{pattern}.*"):
            shutil.copy(file, f"{folder}/ckpt{file.removeprefix(path)}")
        yield f"{folder}/ckpt"


def read_checkpoint(path: str, parts: Mapping[str, Any], if_there: Mapping[str, Any] | None = None) -> None:
    """Restore some of what a checkpoint holds.

    Args:
        path: The checkpoint, without the endings of its files.
        parts: Names to models and variables; all of their values must be in it.
        if_there: The same of parts that the checkpoint may lack as a whole, which then stay as they are.

    Raises:
        TrainingError: It cannot be read, or is of something else.
    """
    try:
        with plain_path(path) as plain:
            if if_there:
                held = _parts_of(plain)
                parts = {**parts, **{name: part for name, part in if_there.items() if name in held}}
            # Partial is expected first: else TensorFlow logs what is left over when the check fails.
            tf.train.Checkpoint(**parts).restore(plain).expect_partial().assert_existing_objects_matched()
    except _UNREADABLE as exc:
        raise TrainingError(f"the checkpoint {path} cannot be read: {first_line(exc)}") from exc
    except (ValueError, AssertionError) as exc:
        raise TrainingError(f"the checkpoint {path} is of another model: {first_line(exc)}") from exc


def _parts_of(path: str) -> set[str]:
    """The names of what a checkpoint was made of."""
    graph = TrackableObjectGraph.FromString(tf.train.load_checkpoint(path).get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH"))
    return {child.local_name for child in graph.nodes[0].children}


@contextlib.contextmanager
def tensorflow_errors(doing: str) -> Iterator[None]:
    """Turns what TensorFlow raises (no memory, no disk) into an error with one sentence.

    Args:
        doing: What went on, for the sentence, such as "writing the checkpoint FOLDER/ckpt-7".

    Raises:
        TrainingError: In place of TensorFlow's error, which stays as ``__cause__``.
    """
    try:
        yield
    except tf.errors.ResourceExhaustedError as exc:
        raise TrainingError(f"{doing}: out of memory or disk space ({first_line(exc)})") from exc
    except tf.errors.OpError as exc:
        raise TrainingError(f"{doing}: {first_line(exc)}") from exc


class Checkpoints:
    """The newest checkpoints of a run in a folder of their own; older ones are deleted."""

    def __init__(self, folder: Path, keep: int, parts: Mapping[str, Any]) -> None:
        """Bind a folder to what is saved and restored.

        Args:
            folder: Created by the first `save`.
            keep: How many stay.
            parts: Names to models, optimisers and variables. A checkpoint must hold all of them and no others.
        """
        self._folder, self._keep = folder, keep
        self._checkpoint = tf.train.Checkpoint(**parts)

    @cached_property
    def _manager(self) -> tf.train.CheckpointManager:
        """What writes and deletes, made where something is written."""
        paths = _checkpoints(self._folder)
        if paths and _state(self._folder) is None:
            times = [Path(f"{path}.index").stat().st_mtime for path in paths]  # else it would not delete them
            tf.compat.v1.train.update_checkpoint_state(str(self._folder), paths[-1], paths, None, times)
        return tf.train.CheckpointManager(self._checkpoint, str(self._folder), max_to_keep=self._keep)

    def save(self, step: int) -> None:
        """Write a checkpoint, whole or not at all.

        Raises:
            TrainingError: It cannot be written.
        """
        with tensorflow_errors(f"writing a checkpoint to {self._folder}"):
            before = self._manager.checkpoints
            self._manager.save(step)
        # The manager takes the folder for a pattern when it deletes, too.
        for name in {Path(path).name for path in before} - {Path(path).name for path in self._manager.checkpoints}:
            for file in self._folder.glob(f"{name}.*"):
                file.unlink()

    def restore(self) -> bool:
        """Go back to the newest checkpoint that can be read.

        Returns:
            Whether there was one.

        Raises:
            TrainingError: A checkpoint is of something else, or there are some and none can be read.
        """
        # Not the manager's own list: it leaves out what is older than the clock says now, so that after a clock was set
        # back a run would begin anew.
        paths = _checkpoints(self._folder)
        for path in reversed(paths):
            try:
                with plain_path(path) as plain:
                    self._checkpoint.restore(plain).expect_partial().assert_consumed()
            # The disk, or a machine that went down, may have damaged the last one; that is what the others are for.
            except _UNREADABLE as exc:
                logger.warning("the checkpoint %s cannot be read (%s)", path, first_line(exc))
            except (ValueError, AssertionError) as exc:
                raise TrainingError(f"the checkpoint {path} is of another model: {first_line(exc)}") from exc
            else:
                return True
        if paths:
            raise TrainingError(f"no checkpoint in {self._folder} can be read: begin anew in another folder")
        return False

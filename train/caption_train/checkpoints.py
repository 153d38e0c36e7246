"""Checkpoints on disk, and TensorFlow's errors as this project's."""

from __future__ import annotations

import contextlib
import glob
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow as tf

from caption_train.errors import TrainingError, first_line

logger = logging.getLogger(__name__)

# TensorFlow's reader of checkpoints turns some of its errors into Python's.
_UNREADABLE = (tf.errors.OpError, LookupError, RuntimeError)


def latest_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint of a folder, without the endings of its files; None where there never was one.

    TensorFlow's function of this name takes the folder for a pattern; see `plain_path`.

    Raises:
        TrainingError: What the folder says of its checkpoints is damaged.
    """
    state = _state(folder)
    return None if state is None else str(state.model_checkpoint_path)


def _state(folder: Path) -> Any:
    """Which checkpoints there are, as the manager wrote it down: a CheckpointState, or None."""
    path = folder / "checkpoint"
    try:
        state = tf.train.get_checkpoint_state(str(folder))
    except ValueError:  # no text, or nothing in it
        state = None
    if state is None and path.exists():
        raise TrainingError(f"{path}, which says what checkpoints there are, is damaged: put a copy of it in its place")
    return state


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


def read_checkpoint(path: str, parts: Mapping[str, Any]) -> None:
    """Restore some of what a checkpoint holds.

    Args:
        path: The checkpoint, without the endings of its files.
        parts: Names to models and variables; all of their values must be in it.

    Raises:
        TrainingError: It cannot be read, or is of something else.
    """
    try:
        with plain_path(path) as plain:
            # Partial is expected first: else TensorFlow logs what is left over when the check fails.
            tf.train.Checkpoint(**parts).restore(plain).expect_partial().assert_existing_objects_matched()
    except _UNREADABLE as exc:
        raise TrainingError(f"the checkpoint {path} cannot be read: {first_line(exc)}") from exc
    except (ValueError, AssertionError) as exc:
        raise TrainingError(f"the checkpoint {path} is of another model: {first_line(exc)}") from exc


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

        Raises:
            TrainingError: What the folder says of its checkpoints is damaged.
        """
        _state(folder)
        self._folder = folder
        self._checkpoint = tf.train.Checkpoint(**parts)
        self._manager = tf.train.CheckpointManager(self._checkpoint, str(folder), max_to_keep=keep)

    def save(self, step: int) -> None:
        """Write a checkpoint, whole or not at all.

        Raises:
            TrainingError: It cannot be written.
        """
        before = self._manager.checkpoints
        with tensorflow_errors(f"writing a checkpoint to {self._folder}"):
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
        state = _state(self._folder)
        paths = list(state.all_model_checkpoint_paths) if state else []
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

"""Checkpoints on disk, and TensorFlow's errors as this project's."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow as tf

from caption_train.errors import TrainingError, first_line

logger = logging.getLogger(__name__)

# TensorFlow's reader of checkpoints turns some of its errors into Python's.
_UNREADABLE = (tf.errors.OpError, LookupError, RuntimeError)


def read_checkpoint(path: str, parts: Mapping[str, Any]) -> None:
    """Restore some of what a checkpoint holds.

    Args:
        path: The checkpoint, without the endings of its files.
        parts: Names to models and variables; all of their values must be in it.

    Raises:
        TrainingError: It cannot be read, or is of something else.
    """
    try:
        # Partial is expected first: else TensorFlow logs what is left over when the check fails.
        tf.train.Checkpoint(**parts).restore(path).expect_partial().assert_existing_objects_matched()
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
        """
        self._checkpoint = tf.train.Checkpoint(**parts)
        self._manager = tf.train.CheckpointManager(self._checkpoint, str(folder), max_to_keep=keep)

    def save(self, step: int) -> None:
        """Write a checkpoint, whole or not at all.

        Raises:
            TrainingError: It cannot be written.
        """
        with tensorflow_errors(f"writing a checkpoint to {self._manager.directory}"):
            self._manager.save(step)

    def restore(self) -> bool:
        """Go back to the newest checkpoint that can be read.

        Returns:
            Whether there was one.

        Raises:
            TrainingError: A checkpoint is of something else, or there are some and none can be read.
        """
        # Not the manager's own list: it leaves out what is older than the clock says now, so that after a clock was set
        # back a run would begin anew.
        state = tf.train.get_checkpoint_state(self._manager.directory)
        paths = list(state.all_model_checkpoint_paths) if state else []
        for path in reversed(paths):
            try:
                self._checkpoint.restore(path).expect_partial().assert_consumed()
            # The disk, or a machine that went down, may have damaged the last one; that is what the others are for.
            except _UNREADABLE as exc:
                logger.warning("the checkpoint %s cannot be read (%s)", path, first_line(exc))
            except (ValueError, AssertionError) as exc:
                raise TrainingError(f"the checkpoint {path} is of another model: {first_line(exc)}") from exc
            else:
                return True
        if paths:
            raise TrainingError(f"no checkpoint in {self._manager.directory} can be read: begin anew in another folder")
        return False

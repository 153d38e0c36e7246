"""What a run writes down while it goes: JSON lines, events for TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import tensorflow as tf

from caption_train.files import read_json_lines, rewrite_json_lines

HISTORY, STEPS, EVENTS = "history.jsonl", "steps.jsonl", "tensorboard"


class RunLog:
    """``steps.jsonl`` with a record a step, and ``tensorboard/`` with the same and what every epoch found.

    A step's record counts once a checkpoint has it: a run that goes on from a checkpoint takes later ones away and
    writes them again.
    """

    def __init__(self, folder: Path, step: int) -> None:
        """Go on after a step.

        Args:
            folder: Of the run.
            step: The last one that counts.

        Raises:
            TrainingError: What is there is no record of steps.
            OSError: The folder cannot be written.
        """
        path = folder / STEPS
        # Written anew whatever is kept: what is appended to a torn last line would be no record.
        rewrite_json_lines(path, [record for record in read_json_lines(path) if record["step"] <= step])
        self._path, self._events = path, tf.summary.create_file_writer(str(folder / EVENTS))

    def __enter__(self) -> Self:
        """Open the file."""
        # A line a write: what another program reads meanwhile ends with a whole record.
        self._file = self._path.open("a", encoding="utf-8", buffering=1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all."""
        self._file.close()
        self._events.close()

    def step(self, record: Mapping[str, float]) -> None:
        """Write down a step: its number as ``step``, and numbers by name."""
        self._file.write(json.dumps(record) + "\n")
        self._scalars("train", record)

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Write down, for TensorBoard, what an epoch found; ``history.jsonl`` is the trainer's."""
        self._scalars("epoch", record)
        self._events.flush()

    def _scalars(self, part: str, record: Mapping[str, Any]) -> None:
        with self._events.as_default(step=int(record["step"])):
            for name, value in record.items():
                if name != "step" and isinstance(value, int | float):
                    _write_scalar(f"{part}/{name}", value)


def _write_scalar(name: str, value: float) -> None:
    """What `tf.summary.scalar` writes, which asks for the package tensorboard to be installed."""
    metadata = tf.compat.v1.SummaryMetadata(
        plugin_data=tf.compat.v1.SummaryMetadata.PluginData(plugin_name="scalars"), data_class=1
    )
    tf.summary.write(name, tf.constant(value, tf.float32), metadata=metadata)

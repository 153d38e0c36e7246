"""What goes wrong in training, as errors that know their exit code."""

from typing import ClassVar

from caption_rt.errors import CaptionError


class DatasetError(CaptionError, ValueError):
    """A data set cannot be used: not found, in another format, or its photos are not there."""

    exit_code: ClassVar[int] = 6


class TrainingError(CaptionError, RuntimeError):
    """A training stage cannot go on: its checkpoint, weights, configuration or cache on disk do not serve."""

    exit_code: ClassVar[int] = 7


def first_line(exc: BaseException) -> str:
    """What a foreign error says, cut to its first line: Keras and TensorFlow append lists of every variable."""
    return next((line.strip() for line in str(exc).splitlines() if line.strip()), type(exc).__name__)

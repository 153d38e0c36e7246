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
    """What a foreign error says, cut to its first line: Keras and TensorFlow append lists of every variable.

    Of an error within a graph TensorFlow first says where in the program it was built; that is passed over.
    """
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    where = ("Graph execution error:", "Detected at node", 'File "', "<stack traces unavailable>")
    return next((line for line in lines if not line.startswith(where)), lines[0] if lines else type(exc).__name__)

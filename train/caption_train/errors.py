"""What goes wrong in training, as errors that know their exit code."""

from typing import ClassVar

from caption_rt.errors import CaptionError


class DatasetError(CaptionError, ValueError):
    """A data set cannot be used: not found, in another format, or its photos are not there."""

    exit_code: ClassVar[int] = 6


class TrainingError(CaptionError, RuntimeError):
    """A training stage cannot go on: its checkpoint, weights, configuration or cache on disk do not serve."""

    exit_code: ClassVar[int] = 7

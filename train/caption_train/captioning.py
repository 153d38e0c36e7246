"""Captions of any photo with TensorFlow, for looking at a model before it is exported."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from caption_rt.caption import Caption, Timing
from caption_rt.captioning import caption_of, photo_seeds, special_tokens
from caption_rt.guard import decode_guarded
from caption_rt.options import DecodeOptions
from caption_train.inception import extract_with
from caption_train.model import TensorFlowStepper
from caption_train.runs import Run

__all__ = ["RunCaptioner"]


class RunCaptioner:
    """A trained run that captions, by the runtime's own search: what `caption_rt.Captioner` gives after the export."""

    def __init__(self, run: Run) -> None:
        """Trace the networks.

        Args:
            run: The model.
        """
        self._run = run
        self._extract = extract_with(run.extractor)
        self._stepper = TensorFlowStepper(run.model)
        rows, columns, self._channels = run.extractor.output_shape[1:]
        self._grid = (int(rows), int(columns))

    @property
    def size(self) -> int:
        """Pixels on a side of the photos."""
        return self._run.extractor_config.size

    def caption_pixels(self, pixels: Sequence[NDArray[np.uint8]], options: DecodeOptions) -> list[Caption]:
        """Caption photos, all in one batch.

        Args:
            pixels: uint8 [S, S, 3] each, as `caption_rt.image.read_photo` gives them for `size`.
            options: How to decode; with the guard, if they ask for it.

        Raises:
            EngineError: The model gives values that are no numbers.
        """
        if not pixels:
            return []
        vocabulary = self._run.vocabulary
        start = time.perf_counter()
        grid = np.asarray(self._extract(np.stack(pixels)), np.float32)
        extracted = time.perf_counter()
        stepper = self._stepper.on(grid.reshape(len(pixels), -1, self._channels))
        encoded = time.perf_counter()
        found = decode_guarded(stepper, options, special_tokens(vocabulary, options), photo_seed=photo_seeds(pixels))
        decoded = time.perf_counter()
        each = (extracted - start, encoded - extracted, decoded - encoded)
        timing = Timing(0.0, *(seconds / len(pixels) for seconds in each))
        return [caption_of(guarded, vocabulary, self._grid, "TensorFlow", "fp32", timing) for guarded in found]

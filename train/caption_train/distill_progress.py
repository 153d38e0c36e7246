"""How far a student is, in captions: a captioner that was trained on the teacher's grids is given the student's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from caption_rt.image import read_photo
from caption_rt.options import DecodeOptions
from caption_train.captioned import CaptionedImage
from caption_train.distill_views import Teacher
from caption_train.errors import TrainingError
from caption_train.inception import weights_key
from caption_train.model import TensorFlowStepper
from caption_train.runs import Run
from caption_train.scores import score_captions
from caption_train.validation import search_captions

Predict = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""Photos uint8 [n, S, S, 3] to what the student takes for the teacher's grids, float32 [n, P, C]."""

_BATCH = 50


class Examiner:
    """Scores the captions that the teacher's captioner finds in the student's grids.

    The student is never taught by it. The scores are lower than those of a captioner that is trained on the student's
    own grid, and rise with them.
    """

    def __init__(self, run: Run, images: Sequence[CaptionedImage], teacher: Teacher) -> None:
        """Take a captioner.

        Args:
            run: Trained on the grids of this very teacher.
            images: Photos with captions that the student does not learn from.
            teacher: The teacher.

        Raises:
            TrainingError: The captioner was trained on other grids.
        """
        theirs = {**asdict(run.extractor_config), "sha256": weights_key(run.extractor)}
        if any(teacher.facts[name] != value for name, value in theirs.items()):
            raise TrainingError(f"{run.folder} was not trained on this teacher's grids: give a captioner that was")
        self._run, self._images = run, images
        self._stepper = TensorFlowStepper(run.model)
        self._options = DecodeOptions(max_words=run.max_words, guard=False)

    def cider(self, predict: Predict, size: int) -> float:
        """CIDEr, from 0 to 10, of greedy captions.

        Args:
            predict: The student, with the map to the teacher's grid.
            size: Pixels to a side of its photos.

        Raises:
            ImageError: A photo cannot be read.
        """

        def grids(chosen: NDArray[np.int64]) -> NDArray[np.float32]:
            return predict(np.stack([read_photo(self._images[i].path, size) for i in chosen]))

        vocabulary, everything = self._run.vocabulary, np.arange(len(self._images))
        found = search_captions(self._stepper, grids, everything, vocabulary, self._options, batch_size=_BATCH)
        captions = {str(i): vocabulary.decode(hypothesis.tokens) for i, hypothesis in enumerate(found)}
        return score_captions(captions, {str(i): image.captions for i, image in enumerate(self._images)})["CIDEr"]

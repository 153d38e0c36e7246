"""What an epoch is judged by: the validation captions' loss, and the scores of captions that the model makes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from caption_rt.captioning import special_tokens
from caption_rt.options import DecodeOptions
from caption_rt.search import decode
from caption_rt.strategies import Hypothesis
from caption_rt.vocabulary import Vocabulary
from caption_train.batches import Batch, CaptionData, load_batch, tutorial_loss
from caption_train.errors import TrainingError
from caption_train.model import CaptionModel, TensorFlowStepper
from caption_train.objectives import CrossEntropy
from caption_train.scores import score_captions
from caption_train.settings import Settings
from caption_train.sheets import SheetRow, draw_sheet
from caption_train.sources import FeatureSource

SHEETS = "sheets"
_SHEET_PHOTOS = 8

Grids = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""Rows int64 [n] of photos to their grids float32 [n, P, C]."""


@dataclass(frozen=True)
class Findings:
    """What a validation found."""

    record: Mapping[str, float]
    """``val_loss`` (nats a word), ``perplexity``, ``val_tutorial_loss``, and `score_captions`' scores."""
    hypotheses: tuple[Hypothesis, ...]
    """The captions of the photos that are captioned, in their order."""


class Validation:
    """Validates a model as it is when it is asked to."""

    def __init__(
        self, settings: Settings, model: CaptionModel, source: FeatureSource, data: CaptionData, vocabulary: Vocabulary
    ) -> None:
        """Choose the photos that are captioned: spread evenly over the data, the same every time.

        Args:
            settings: How many photos, and how long captions are.
            model: The captioner.
            source: Where grids come from.
            data: The validation captions.
            vocabulary: Words and ids.
        """
        self._model, self._source, self._data, self._vocabulary = model, source, data, vocabulary
        self._batch_size = settings.training.batch_size
        self._options = DecodeOptions(max_words=settings.captions.max_words, guard=False)
        self._photos = _spread(len(data.images), settings.evaluation.photos)
        self._stepper = TensorFlowStepper(model)
        cross_entropy = CrossEntropy(vocabulary.pad_id)
        loaded = tf.TensorSpec((None, *source.loaded_shape), tf.float16)

        @tf.function(
            input_signature=[
                loaded,
                tf.TensorSpec((None,), tf.int32),
                tf.TensorSpec((None, None), tf.int64),
                tf.TensorSpec((None,), tf.float32),
            ],
            autograph=False,
        )
        def loss(loaded: tf.Tensor, photos: tf.Tensor, tokens: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
            batch = Batch(loaded, photos, tokens, weights)
            found = cross_entropy.loss(model, source.grid(loaded, training=False), batch, None)
            return tf.stack([found.cross_entropy, found.words])

        @tf.function(input_signature=[loaded], autograph=False)
        def grid(loaded: tf.Tensor) -> tf.Tensor:
            return tf.cast(source.grid(loaded, training=False), tf.float32)

        self._loss, self._grid = loss, grid

    def run(self) -> Findings:
        """Loss over all validation captions, scores of greedy captions of the chosen photos.

        Raises:
            TrainingError: The loss is no number: there is nothing to search among what has no probability.
        """
        total, words = self.loss()
        if math.isnan(total):
            raise TrainingError("the validation loss is nan: lower the learning rate in a new run folder")
        data = self._data
        hypotheses = search_captions(
            self._stepper,
            lambda rows: np.asarray(self._grid(self._source.load(rows))),
            data.rows[self._photos],
            self._vocabulary,
            self._options,
            batch_size=self._batch_size,
        )
        photos = [data.images[i] for i in self._photos]
        captions = {
            str(photo.path): self._vocabulary.decode(found.tokens)
            for photo, found in zip(photos, hypotheses, strict=True)
        }
        scores = score_captions(captions, {str(photo.path): photo.captions for photo in photos})
        record = {
            "val_loss": total / words,
            "perplexity": math.exp(min(total / words, 700)),
            "val_tutorial_loss": tutorial_loss(total, data),
            **scores,
        }
        return Findings(record, tuple(hypotheses))

    def loss(self) -> tuple[float, int]:
        """Cross-entropy over all words of the validation captions, in nats, and the number of those words."""
        sums = np.zeros(2)
        for start in range(0, len(self._data), self._batch_size):
            chosen = np.arange(start, min(start + self._batch_size, len(self._data)))
            batch, _ = load_batch(self._data, chosen, self._source, self._vocabulary.pad_id)
            sums += np.asarray(self._loss(*batch))
        return float(sums[0]), int(sums[1])

    def draw_sheet(self, findings: Findings, folder: Path, epoch: int) -> None:
        """Write ``sheets/epoch-NNN.png``: the same eight photos, their captions, and where the model looked.

        Raises:
            TrainingError: It cannot be written.
        """
        rows = []
        for index in _spread(len(self._photos), _SHEET_PHOTOS):
            image, hypothesis = self._data.images[self._photos[index]], findings.hypotheses[index]
            side = math.isqrt(hypothesis.attention.shape[-1])
            words = tuple(self._vocabulary.words[token] for token in hypothesis.tokens)
            attention = hypothesis.attention[: len(words)].reshape(-1, side, side)
            rows.append(SheetRow(image.path, words, attention, image.captions[0]))
        draw_sheet(rows, folder / SHEETS / f"epoch-{epoch:03d}.png")


def search_captions(
    stepper: TensorFlowStepper,
    grids: Grids,
    rows: NDArray[np.int64],
    vocabulary: Vocabulary,
    options: DecodeOptions,
    *,
    batch_size: int = 64,
    on_photos: Callable[[int], None] = lambda count: None,
) -> list[Hypothesis]:
    """Caption photos in TensorFlow.

    Args:
        stepper: The model.
        grids: See there.
        rows: Of the photos, int64 [n].
        vocabulary: For the special ids.
        options: How to search.
        batch_size: Photos decoded together.
        on_photos: Called with the number of photos just captioned, for a progress bar.

    Returns:
        The best hypothesis of each photo, in order.
    """
    found: list[Hypothesis] = []
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        hypotheses: Any = decode(
            stepper.on(grids(chosen)),
            options,
            special_tokens(vocabulary, options),
        )
        found += [best[0] for best in hypotheses]
        on_photos(len(chosen))
    return found


def _spread(count: int, wanted: int) -> list[int]:
    """So many of 0 .. count - 1, evenly spread; all, if there are no more."""
    return [index * count // min(count, wanted) for index in range(min(count, wanted))]

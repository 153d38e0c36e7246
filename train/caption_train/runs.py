"""A run folder: everything of one training, from the extractor to the scores, and its stages in order.

- ``run.json``: data set, options and sizes, as they were when the run began;
- ``extractor.json``, ``extractor.weights.h5``: the extractor;
- ``vocabulary.json``;
- ``last/`` (five checkpoints), ``best/`` (the best by validation loss);
- ``history.jsonl``, ``loss.png``; ``scores.json``.

Grids go to a cache folder, which several runs may share. Each stage finds what it did before and goes on there.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from caption_rt.image import read_photo
from caption_rt.search import DecodeOptions, Hypothesis, decode
from caption_rt.vocabulary import Vocabulary
from caption_train.cache import ABSENT, GridCache
from caption_train.datasets import CaptionedImage, Dataset
from caption_train.errors import DatasetError, TrainingError
from caption_train.files import write_json
from caption_train.inception import (
    DISTILLATION,
    ExtractorConfig,
    build_extractor,
    extract_with,
    load_extractor,
    load_extractor_weights,
    save_extractor,
    weights_key,
)
from caption_train.model import CaptionModel, TensorFlowStepper
from caption_train.scores import score_captions
from caption_train.training import CaptionData, TrainConfig, Trainer, caption_data, model_config

logger = logging.getLogger(__name__)

_RUN, _VOCABULARY, _SCORES = "run.json", "vocabulary.json", "scores.json"


@dataclass(frozen=True)
class Run:
    """A trained captioner with what is known of it."""

    folder: Path
    """The run folder."""
    extractor: keras.Model
    """Photos [n, S, S, 3] in 0..255 -> grid float32 [n, rows, columns, C]."""
    extractor_config: ExtractorConfig
    """Width, size and layer."""
    model: CaptionModel
    """Encoder and decoder with the checkpoint's weights."""
    vocabulary: Vocabulary
    """Words and ids."""
    max_words: int
    """The longest caption that the model was trained on, in words."""
    facts: Mapping[str, Any]
    """``run.json`` and the epoch of the checkpoint: how and on what it was trained."""
    scores: Mapping[str, Any]
    """``scores.json``; empty before the first evaluation."""


@dataclass(frozen=True)
class Evaluation:
    """Generated captions beside real ones."""

    images: tuple[CaptionedImage, ...]
    """The photos, with their real captions."""
    hypotheses: tuple[Hypothesis, ...]
    """The best hypothesis for each photo."""
    captions: tuple[str, ...]
    """Their texts."""
    scores: Mapping[str, float]
    """As `caption_train.scores.score_captions` gives them."""


def start_run(
    folder: Path,
    dataset: Dataset,
    config: TrainConfig,
    extractor_config: ExtractorConfig,
    extractor_weights: str,
    *,
    facts: Mapping[str, Any],
) -> None:
    """Make a run folder, or see that the one there was begun with the same data and options.

    Args:
        folder: The run folder.
        dataset: The data, of which the counts are written down.
        config: Options of the training.
        extractor_config: The extractor, unless `extractor_weights` is a folder that brings its own.
        extractor_weights: ``imagenet``, ``none``, a weights file, or a folder that distillation wrote.
        facts: What else to write down, such as the seed and limit of the data set.

    Raises:
        TrainingError: The folder holds a run with other options, or the extractor cannot be had.
    """
    record = {
        "dataset": {
            "name": dataset.name,
            "training_photos": len(dataset.train),
            "training_captions": sum(len(image.captions) for image in dataset.train),
            "validation_photos": len(dataset.validation),
            **facts,
        },
        "training": asdict(config),
    }
    if (folder / _RUN).exists():
        before = _read_json(folder / _RUN)
        for part in ("dataset", "training"):
            differing = sorted(key for key in record[part] if before.get(part, {}).get(key) != record[part][key])
            if differing:
                raise TrainingError(
                    f"{folder} was begun with another {part} {differing[0]} "
                    f"({before.get(part, {}).get(differing[0])!r}, now {record[part][differing[0]]!r}): give the same "
                    "options to go on, or another folder to begin anew"
                )
        return
    source = Path(extractor_weights)
    if source.is_dir():
        extractor, extractor_config = load_extractor(source)
        origin = _read_json(source / DISTILLATION) if (source / DISTILLATION).exists() else {}
    else:
        keras.utils.set_random_seed(config.seed)
        extractor, origin = build_extractor(extractor_config), {}
        load_extractor_weights(extractor, extractor_weights)
    save_extractor(extractor, extractor_config, folder)
    record["extractor"] = {
        **asdict(extractor_config),
        "weights": source.name if source.exists() else extractor_weights,
        "sha256": weights_key(extractor),
        **origin,
    }
    write_json(folder / _RUN, record)  # last: a folder with it is a run


def open_cache(folder: Path, extractor: keras.Model, config: ExtractorConfig) -> GridCache:
    """The grid cache of an extractor: keyed by its weights, its configuration and the way photos are read."""
    rows, columns, channels = extractor.output_shape[1:]
    key = json.dumps({"weights": weights_key(extractor), **asdict(config), "reading": "bilinear"}, sort_keys=True)
    return GridCache.open(folder, key, (rows * columns, channels))


def grids_of(
    cache: GridCache, extractor: keras.Model, config: ExtractorConfig, images: Sequence[CaptionedImage]
) -> NDArray[np.int64]:
    """Rows of the photos' grids, int64 [len(images)]; what the cache lacks is computed, -1 is unreadable."""
    read = partial(read_photo, size=config.size)
    return cache.fill([image.path for image in images], extract_with(extractor), read=read)


def build_vocabulary(folder: Path, dataset: Dataset, max_words: int) -> Vocabulary:
    """The run's vocabulary, from the training captions; read back if it was written before."""
    path = folder / _VOCABULARY
    if path.exists():
        return Vocabulary.from_json(_read_json(path))
    captions = (caption for image in dataset.train for caption in image.captions)
    vocabulary = Vocabulary.build(captions, max_words)
    write_json(path, vocabulary.to_json())
    return vocabulary


def prepare(folder: Path, dataset: Dataset, cache_folder: Path) -> tuple[CaptionData, CaptionData, Vocabulary]:
    """The stages before training: grids and vocabulary.

    Returns:
        Training captions, validation captions, vocabulary.

    Raises:
        DatasetError: No photo can be read.
        TrainingError: The cache cannot be written.
    """
    extractor, extractor_config = load_extractor(folder)
    config = _train_config(folder)
    cache = open_cache(cache_folder, extractor, extractor_config)
    vocabulary = build_vocabulary(folder, dataset, config.vocabulary)
    train, validation = (
        caption_data(cache, images, grids_of(cache, extractor, extractor_config, images), vocabulary, config.max_words)
        for images in (dataset.train, dataset.validation)
    )
    return train, validation, vocabulary


def trainer_of(folder: Path, dataset: Dataset, cache_folder: Path) -> Trainer:
    """Grids, vocabulary, and the trainer at the last checkpoint."""
    train, validation, vocabulary = prepare(folder, dataset, cache_folder)
    return Trainer(_train_config(folder), train, validation, vocabulary, folder)


def open_run(folder: Path, which: str = "best") -> Run:
    """Open a trained run.

    Args:
        folder: The run folder.
        which: ``best`` (by validation loss) or ``last``.

    Raises:
        TrainingError: The folder holds no run, no checkpoint yet, or one that does not fit.
    """
    record = _read_json(folder / _RUN)
    config = _train_config(folder)
    vocabulary = Vocabulary.from_json(_read_json(folder / _VOCABULARY))
    extractor, extractor_config = load_extractor(folder)
    rows, columns, channels = extractor.output_shape[1:]
    model = CaptionModel(model_config(config, rows * columns, channels, len(vocabulary)))
    step = tf.Variable(0, dtype=tf.int64, trainable=False)
    path = tf.train.latest_checkpoint(str(folder / which))
    if path is None:
        raise TrainingError(f"{folder} has no checkpoint in {which}/ yet: train it first")
    checkpoint = tf.train.Checkpoint(encoder=model.encoder, decoder=model.decoder, step=step)
    try:
        checkpoint.restore(path).assert_existing_objects_matched().expect_partial()
    except (ValueError, AssertionError, tf.errors.OpError) as exc:
        raise TrainingError(f"checkpoint {path} does not fit {folder / _RUN}: {exc}") from exc
    facts = {**record, "checkpoint": {"which": which, "step": int(step)}}
    scores = _read_json(folder / _SCORES) if (folder / _SCORES).exists() else {}
    return Run(folder, extractor, extractor_config, model, vocabulary, config.max_words, facts, scores)


def evaluate(
    run: Run,
    images: Sequence[CaptionedImage],
    cache_folder: Path,
    options: DecodeOptions,
    *,
    batch_size: int = 64,
    on_photos: Callable[[int], None] = lambda count: None,
) -> Evaluation:
    """Caption photos in TensorFlow and score the captions.

    Args:
        run: The model.
        images: Photos with real captions.
        cache_folder: Where grids are kept.
        options: Decoding.
        batch_size: Photos decoded together.
        on_photos: Called with the number of photos just captioned, for a progress bar.

    Raises:
        DatasetError: No photo can be read.
    """
    cache = open_cache(cache_folder, run.extractor, run.extractor_config)
    rows = grids_of(cache, run.extractor, run.extractor_config, images)
    readable = [int(i) for i in np.flatnonzero(rows != ABSENT)]
    if not readable:
        raise DatasetError(f"none of the {len(images)} photos can be read")
    stepper, vocabulary = TensorFlowStepper(run.model), run.vocabulary
    hypotheses: list[Hypothesis] = []
    for start in range(0, len(readable), batch_size):
        chosen = readable[start : start + batch_size]
        found = decode(
            stepper.on(cache.gather(rows[chosen]).astype(np.float32)),
            options,
            start_id=vocabulary.start_id,
            end_id=vocabulary.end_id,
            banned=(vocabulary.pad_id, vocabulary.start_id, vocabulary.unk_id),
        )
        hypotheses += [best[0] for best in found]
        on_photos(len(chosen))
    kept = tuple(images[i] for i in readable)
    captions = tuple(vocabulary.decode(hypothesis.tokens) for hypothesis in hypotheses)
    names = [str(image.path) for image in kept]
    scores = score_captions(
        dict(zip(names, captions, strict=True)), {str(image.path): image.captions for image in kept}
    )
    return Evaluation(kept, tuple(hypotheses), captions, scores)


def record_scores(folder: Path, split: str, evaluation: Evaluation, options: DecodeOptions, which: str) -> None:
    """Put an evaluation's scores into ``scores.json`` beside those of other splits."""
    path = folder / _SCORES
    scores = _read_json(path) if path.exists() else {}
    scores[split] = {
        "photos": len(evaluation.images),
        "checkpoint": which,
        "beam_size": options.beam_size,
        "length_penalty": options.length_penalty,
        **{name: round(value, 4) for name, value in evaluation.scores.items()},
    }
    write_json(path, scores)


def _train_config(folder: Path) -> TrainConfig:
    try:
        return TrainConfig(**_read_json(folder / _RUN)["training"])
    except (KeyError, TypeError) as exc:
        raise TrainingError(f"{folder / _RUN} was not written by this version: {exc}") from exc


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise TrainingError(f"{path.parent} is no run folder: it has no {path.name}") from exc
    except (OSError, ValueError) as exc:
        raise TrainingError(f"{path} cannot be read: {exc}") from exc

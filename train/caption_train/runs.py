"""A run folder: everything of one training, from the extractor to the scores, and its stages in order.

- ``run.json``: data set, extractor and options, as they were when the run began;
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

from caption_rt.errors import OptionsError
from caption_rt.image import read_photo
from caption_rt.options import DecodeOptions
from caption_rt.search import decode
from caption_rt.strategies import Hypothesis
from caption_rt.vocabulary import Vocabulary
from caption_train.cache import ABSENT, GridCache
from caption_train.checkpoints import read_checkpoint
from caption_train.datasets import CaptionedImage, Dataset
from caption_train.errors import DatasetError, TrainingError
from caption_train.files import read_json, refuse_other_options, write_json
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
from caption_train.training import (
    BEST,
    HISTORY,
    LAST,
    CaptionData,
    TrainConfig,
    Trainer,
    caption_data,
    model_config,
)

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
    """``run.json``, and which checkpoint this is and of which step: how and on what it was trained."""
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
    extractor_weights: str,
    *,
    extractor_options: Mapping[str, Any],
    choices: Mapping[str, Any],
) -> None:
    """Make a run folder, or see that the one there was begun with the same data and options.

    Args:
        folder: The run folder.
        dataset: The data, of which the counts are written down.
        config: Options of the training.
        extractor_weights: ``imagenet``, ``none``, a weights file, or a folder that distillation wrote.
        extractor_options: What was asked for of `ExtractorConfig`; the rest is as in the folder of weights, else the
            default.
        choices: What of the data set was taken: the arguments of `load_dataset` that decide it.

    Raises:
        OptionsError: The folder of weights holds another extractor than was asked for.
        TrainingError: The folder holds a run with other options, or what is left of one, or the extractor cannot be
            had.
        OSError: The folder cannot be written.
    """
    record: dict[str, dict[str, Any]] = {
        "dataset": {**_counts(dataset), **choices},
        "training": asdict(config),
        "extractor": {**extractor_options, "weights": Path(extractor_weights).resolve().name},
    }
    if (folder / _RUN).exists():
        refuse_other_options(folder, read_json(folder / _RUN), record)
        return
    left = [name for name in (_VOCABULARY, HISTORY, LAST, BEST) if (folder / name).exists()]
    if left:
        raise TrainingError(f"{folder} has {left[0]} but no {_RUN}: what it was made with is not known; take another")
    extractor, extractor_config, origin = _make_extractor(extractor_weights, extractor_options, config.seed)
    save_extractor(extractor, extractor_config, folder)
    record["extractor"] |= {**asdict(extractor_config), "sha256": weights_key(extractor), **origin}
    write_json(folder / _RUN, record)  # last: a folder with it is a run


def _make_extractor(
    weights: str, options: Mapping[str, Any], seed: int
) -> tuple[keras.Model, ExtractorConfig, dict[str, Any]]:
    """The extractor of a new run, and what is known of where it comes from."""
    source = Path(weights)
    if weights in ("imagenet", "none") or not source.is_dir():
        config = ExtractorConfig(**options)
        keras.utils.set_random_seed(seed)
        extractor = build_extractor(config)
        load_extractor_weights(extractor, weights)
        return extractor, config, {}
    extractor, config = load_extractor(source)
    for name, value in options.items():
        if getattr(config, name) != value:
            raise OptionsError(f"the extractor in {source} has {name} {getattr(config, name)}, not {value}")
    origin = read_json(source / DISTILLATION) if (source / DISTILLATION).exists() else {}
    return extractor, config, origin


def _counts(dataset: Dataset) -> dict[str, Any]:
    return {
        "name": dataset.name,
        "training_photos": len(dataset.train),
        "training_captions": sum(len(image.captions) for image in dataset.train),
        "validation_photos": len(dataset.validation),
    }


def data_choices(folder: Path) -> dict[str, Any]:
    """What of the data set a run took, as `start_run` was told.

    Raises:
        TrainingError: The folder holds no run.
    """
    dataset = _part(folder, "dataset")
    return {name: value for name, value in dataset.items() if name in ("limit", "seed", "validation_share")}


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
        return Vocabulary.from_json(read_json(path))
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
        TrainingError: The folder holds no run, or the cache cannot be written.
    """
    config = _train_config(folder)
    extractor, extractor_config = load_extractor(folder)
    cache = open_cache(cache_folder, extractor, extractor_config)
    rows = grids_of(cache, extractor, extractor_config, [*dataset.train, *dataset.validation])
    vocabulary = build_vocabulary(folder, dataset, config.vocabulary)
    train, validation = np.split(rows, [len(dataset.train)])
    return (
        caption_data(cache, dataset.train, train, vocabulary, config.max_words),
        caption_data(cache, dataset.validation, validation, vocabulary, config.max_words),
        vocabulary,
    )


def trainer_of(folder: Path, dataset: Dataset, cache_folder: Path) -> Trainer:
    """Grids, vocabulary, and the trainer at the last checkpoint."""
    train, validation, vocabulary = prepare(folder, dataset, cache_folder)
    return Trainer(_train_config(folder), train, validation, vocabulary, folder)


def open_run(folder: Path, which: str = BEST) -> Run:
    """Open a trained run.

    Args:
        folder: The run folder.
        which: ``best`` (by validation loss) or ``last``.

    Raises:
        TrainingError: The folder holds no run, no checkpoint yet, or one that does not fit.
        BundleError: The vocabulary was tampered with.
    """
    record, config = read_json(folder / _RUN), _train_config(folder)
    path = tf.train.latest_checkpoint(str(folder / which))
    if path is None:
        raise TrainingError(f"{folder} has no checkpoint in {which}/ yet: train it first")
    vocabulary = Vocabulary.from_json(read_json(folder / _VOCABULARY))
    extractor, extractor_config = load_extractor(folder)
    rows, columns, channels = extractor.output_shape[1:]
    model = CaptionModel(model_config(config, rows * columns, channels, len(vocabulary)))
    step = tf.Variable(0, dtype=tf.int64, trainable=False)
    read_checkpoint(path, {"encoder": model.encoder, "decoder": model.decoder, "step": step})
    facts = {**record, "checkpoint": {"which": which, "step": int(step)}}
    scores = read_json(folder / _SCORES) if (folder / _SCORES).exists() else {}
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
            banned=vocabulary.unspoken_ids,
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


def record_scores(
    run: Run,
    dataset: Dataset,
    split: str,
    evaluation: Evaluation,
    options: DecodeOptions,
) -> bool:
    """Put an evaluation's scores into ``scores.json`` beside those of other splits.

    Returns:
        Whether they were written: only those on the run's own data set are, which a model card is to show.
    """
    own = run.facts["dataset"]
    if any(own.get(name) != value for name, value in _counts(dataset).items()):
        return False
    path = run.folder / _SCORES
    scores = read_json(path) if path.exists() else {}
    scores[split] = {
        "photos": len(evaluation.images),
        "checkpoint": run.facts["checkpoint"]["which"],
        "step": run.facts["checkpoint"]["step"],
        "beam_size": options.beam_size,
        "length_penalty": options.length_penalty,
        **{name: round(value, 4) for name, value in evaluation.scores.items()},
    }
    write_json(path, scores)
    return True


def _train_config(folder: Path) -> TrainConfig:
    try:
        return TrainConfig(**_part(folder, "training"))
    except (TypeError, OptionsError) as exc:
        raise TrainingError(f"{folder / _RUN} was not written by this version: {exc}") from exc


def _part(folder: Path, name: str) -> dict[str, Any]:
    """A part of ``run.json``."""
    part = read_json(folder / _RUN).get(name)
    if not isinstance(part, dict):
        raise TrainingError(f"{folder / _RUN} was not written by this version: it has no {name!r}")
    return part

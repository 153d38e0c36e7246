"""A run folder: everything of one training, from the extractor to the scores.

- ``settings.toml``: every setting; ``run.json``: data set and extractor as they were when the run began;
- ``extractor.json``, ``extractor.weights.h5``: the extractor;
- ``vocabulary.json``;
- ``last/`` (five checkpoints), ``best/`` (the best by the CIDEr of validation photos), ``start/`` (the weights that a
  run begins with that starts from another one);
- ``history.jsonl`` (a record an epoch), ``steps.jsonl`` (a record a step), ``tensorboard/``, ``loss.png``, ``sheets/``;
- ``scores.json``.

Grids go to a cache folder, which several runs may share. `caption_train.stages` makes a run; here it is read.
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
from caption_rt.image import READING, read_photo
from caption_rt.options import DecodeOptions
from caption_rt.strategies import Hypothesis
from caption_rt.vocabulary import Vocabulary
from caption_train.cache import ABSENT, GridCache
from caption_train.checkpoints import latest_checkpoint, read_checkpoint
from caption_train.datasets import CaptionedImage, Dataset
from caption_train.errors import DatasetError, TrainingError
from caption_train.files import read_json, write_json
from caption_train.finetune import upper_part
from caption_train.inception import ExtractorConfig, extract_with, load_extractor, weights_key
from caption_train.model import CaptionModel, TensorFlowStepper, model_config
from caption_train.scores import score_captions
from caption_train.settings import Settings, read_settings
from caption_train.training import BEST
from caption_train.validation import search_captions

logger = logging.getLogger(__name__)

RUN, SETTINGS, VOCABULARY, SCORES = "run.json", "settings.toml", "vocabulary.json", "scores.json"


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
    settings: Settings
    """How it was trained."""
    facts: Mapping[str, Any]
    """How and on what it was trained: ``run.json``, with what this checkpoint's extractor is; the settings by sections;
    which checkpoint this is."""
    scores: Mapping[str, Any]
    """``scores.json``; empty before the first evaluation."""

    @property
    def max_words(self) -> int:
        """The longest caption that the model was trained on, in words."""
        return self.settings.captions.max_words


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


def counts(dataset: Dataset) -> dict[str, Any]:
    """What a run notes of its data set."""
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
    names = ("limit", "seed", "validation_share", "validation_limit")
    return {name: value for name, value in dataset.items() if name in names}


def open_cache(folder: Path, extractor: keras.Model, config: ExtractorConfig) -> GridCache:
    """The grid cache of an extractor: keyed by its weights, its configuration and the way photos are read."""
    rows, columns, channels = extractor.output_shape[1:]
    key = json.dumps({"weights": weights_key(extractor), **asdict(config), "reading": READING}, sort_keys=True)
    return GridCache.open(folder, key, (rows * columns, channels))


def grids_of(
    cache: GridCache, extractor: keras.Model, config: ExtractorConfig, images: Sequence[CaptionedImage]
) -> NDArray[np.int64]:
    """Rows of the photos' grids, int64 [len(images)]; what the cache lacks is computed, -1 is unreadable."""
    read = partial(read_photo, size=config.size)
    return cache.fill([image.path for image in images], extract_with(extractor), read=read)


def open_run(folder: Path, which: str = BEST) -> Run:
    """Open a trained run.

    Args:
        folder: The run folder.
        which: ``best`` (by the CIDEr of validation photos) or ``last``.

    Raises:
        TrainingError: The folder holds no run, no checkpoint yet, or one that does not fit.
        BundleError: The vocabulary was tampered with.
    """
    record, settings = read_json(folder / RUN), run_settings(folder)
    path = latest_checkpoint(folder / which)
    if path is None:
        raise TrainingError(f"{folder} has no checkpoint in {which}/ yet: train it first")
    vocabulary = Vocabulary.from_json(read_json(folder / VOCABULARY))
    extractor, extractor_config = load_extractor(folder)
    rows, columns, channels = extractor.output_shape[1:]
    model = CaptionModel(model_config(settings, rows * columns, channels, len(vocabulary)))
    step = tf.Variable(0, dtype=tf.int64, trainable=False)
    parts = {"encoder": model.encoder, "decoder": model.decoder, "step": step}
    block = settings.extractor.learns_from
    learnt = {} if block is None else {"extractor": upper_part(extractor, block)}
    # Its file has what was learnt once training has ended; what is kept of a run (models/keep.py) has it there alone.
    read_checkpoint(path, parts, if_there=learnt)
    # How an imported model was trained is not known.
    unknown = {"training", "evaluation"} if "imported_from" in record else set()
    sections = {name: values for name, values in settings.as_dict().items() if name not in record.keys() | unknown}
    extractor_facts = {**record["extractor"], "sha256": weights_key(extractor)}
    if block is not None:
        extractor_facts["learnt_from_captions"] = f"from {block} on"
    facts = {**record, "extractor": extractor_facts, **sections, "checkpoint": {"which": which, "step": int(step)}}
    scores = read_json(folder / SCORES) if (folder / SCORES).exists() else {}
    return Run(folder, extractor, extractor_config, model, vocabulary, settings, facts, scores)


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
    hypotheses = search_captions(
        stepper,
        lambda chosen: cache.gather(chosen).astype(np.float32),
        rows[readable],
        vocabulary,
        options,
        batch_size=batch_size,
        on_photos=on_photos,
    )
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
    if any(own.get(name) != value for name, value in counts(dataset).items()):
        return False
    path = run.folder / SCORES
    scores = read_json(path) if path.exists() else {}
    scores[split] = {
        "photos": len(evaluation.images),
        "checkpoint": run.facts["checkpoint"]["which"],
        "step": run.facts["checkpoint"]["step"],
        "beam_size": options.beam_size,
        "length_penalty": options.length_penalty,
        "sample": options.sample,
        "max_words": options.max_words,
        **{name: round(value, 4) for name, value in evaluation.scores.items()},
    }
    write_json(path, scores)
    return True


def run_settings(folder: Path) -> Settings:
    """The settings of a run.

    Raises:
        TrainingError: The folder holds no run, or one that was not written by this version.
    """
    if not (folder / RUN).exists():
        raise TrainingError(f"{folder} is no run folder: it has no {RUN}")
    try:
        return read_settings(folder / SETTINGS)
    except OptionsError as exc:
        raise TrainingError(f"{folder} was not written by this version: {exc}") from exc


def _part(folder: Path, name: str) -> dict[str, Any]:
    """A part of ``run.json``."""
    part = read_json(folder / RUN).get(name)
    if not isinstance(part, dict):
        raise TrainingError(f"{folder / RUN} was not written by this version: it has no {name!r}")
    return part

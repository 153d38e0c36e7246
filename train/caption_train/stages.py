"""Making a run, stage by stage: folder, grids, vocabulary, trainer. Each finds what was done and goes on there."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
from numpy.typing import NDArray

from caption_rt.errors import OptionsError
from caption_rt.vocabulary import Vocabulary
from caption_train.batches import CaptionData, caption_data
from caption_train.cache import GridCache
from caption_train.checkpoints import Checkpoints
from caption_train.datasets import CaptionedImage, Dataset
from caption_train.distributed import Distribution
from caption_train.errors import TrainingError
from caption_train.files import one_process, read_json, refuse_other_options, write_json, write_text
from caption_train.finetune import FineTunedBlocks, check_cut, lower_part
from caption_train.inception import (
    DISTILLATION,
    ExtractorConfig,
    build_extractor,
    load_extractor,
    load_extractor_weights,
    save_extractor,
    weights_key,
)
from caption_train.logs import HISTORY
from caption_train.model import CaptionModel
from caption_train.precision import dtype_of_products
from caption_train.runs import (
    RUN,
    SETTINGS,
    VOCABULARY,
    Run,
    counts,
    grids_of,
    open_cache,
    open_run,
    run_settings,
)
from caption_train.self_critical import Rules, SelfCritical, reward_of
from caption_train.settings import CONFIGS, KEYS, Settings, asked_for, load_settings, render, settings_from
from caption_train.sources import CachedGrids, FeatureSource
from caption_train.training import BEST, LAST, START, Trainer

logger = logging.getLogger(__name__)

LOCK = "lock"
_GRID_SETTINGS = ("width", "size", "layer")  # of the extractor: a folder of weights brings its own
_GRIDS = frozenset(f"extractor.{name}" for name in _GRID_SETTINGS)
_OF_THE_WEIGHTS = (  # what a run has in common with the one that it starts from
    _GRIDS | {"extractor.weights"} | {key for key in KEYS if key.startswith(("model.", "captions."))}
) - {"model.dropout"}


@contextlib.contextmanager
def trained_by_one(folder: Path, workers: Distribution) -> Iterator[None]:
    """Keep other commands from training in a run folder at the same time; the chief of this one does.

    Args:
        folder: Made if it is not there, and taken away again if no run comes of it.
        workers: The processes that train together.

    Raises:
        TrainingError: Another command trains there.
        OSError: The folder cannot be written.
    """
    if not workers.is_chief:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with one_process(folder / LOCK, TrainingError(f"another process trains in {folder}: wait for it, or end it")):
        try:
            yield
        finally:
            if not (folder / RUN).exists():
                with contextlib.suppress(OSError):  # what a stage has written stays
                    (folder / LOCK).unlink()
                    folder.rmdir()


class Prepared(NamedTuple):
    """What training needs, made by the stages before it."""

    train: CaptionData
    validation: CaptionData
    vocabulary: Vocabulary
    source: FeatureSource


def start_run(
    folder: Path,
    dataset: Dataset,
    *,
    choices: Mapping[str, Any],
    config: str | None = None,
    changes: Sequence[str] = (),
    start_from: Path | None = None,
) -> Settings:
    """Make a run folder, or see that what is asked for is what the one there was begun with.

    Args:
        folder: The run folder.
        dataset: The data, of which the counts are written down.
        choices: What of the data set was taken: the arguments of `load_dataset` that decide it.
        config: Name or file of the settings (see `load_settings`). If not given: those of a run that is there, or of
            the run to start from, else the default.
        changes: ``section.key=value`` each.
        start_from: A run whose best weights, vocabulary and extractor this one begins with.

    Returns:
        The settings.

    Raises:
        OptionsError: A setting is wrong, or does not fit what the run begins with.
        TrainingError: The folder holds a run that was begun otherwise, or what is left of one, or the extractor cannot
            be had.
        OSError: The folder cannot be written.
    """
    data = {"dataset": {**counts(dataset), **choices}}
    if (folder / RUN).exists():
        return _go_on(folder, data, config, changes, start_from)
    left = [name for name in (HISTORY, LAST, BEST, START, VOCABULARY) if (folder / name).exists()]
    if start_from is not None and START in left:
        left = [name for name in left if name not in (START, VOCABULARY)]  # of such a start that was killed
    if left:
        raise TrainingError(f"{folder} has {left[0]} but no {RUN}: what it was made with is not known; take another")
    record: dict[str, Any]
    if start_from is None:
        settings = load_settings(config or "default", changes)
        extractor, extractor_config, origin = make_extractor(settings, _explicit(config, changes))
        settings = settings.changed({f"extractor.{name}": getattr(extractor_config, name) for name in _GRID_SETTINGS})
        record = {"weights": Path(settings.extractor.weights).name, **asdict(extractor_config)}
        record |= {"sha256": weights_key(extractor), **origin}
        record = {**data, "extractor": record}
        save_extractor(extractor, extractor_config, folder)
    else:
        begun = open_run(start_from)
        settings = _settings_from(begun, config, changes)
        _check_learns(settings, begun.extractor_config)
        record = {**data, "extractor": begun.facts["extractor"], "start_from": _start_facts(begun, settings)}
        _write_start(folder, begun)
    write_text(folder / SETTINGS, render(settings, config or "default"))
    write_json(folder / RUN, record)  # last: a folder with it is a run
    return settings


def _go_on(
    folder: Path,
    data: Mapping[str, Any],
    config: str | None,
    changes: Sequence[str],
    start_from: Path | None,
) -> Settings:
    """See that a run is asked for again as it was begun."""
    settings, record = run_settings(folder), read_json(folder / RUN)
    begun, explicit = settings.as_dict(), _explicit(config, changes)
    # Of a shipped file, what the run may have from another one, or from a folder of weights, says nothing.
    brought = _OF_THE_WEIGHTS if "start_from" in record else _GRIDS
    for key, value in asked_for(config, changes).items():
        if key in brought and key not in explicit:
            continue
        section, _, name = key.partition(".")
        before = begun[section][name]
        if key == "extractor.weights":  # may have been moved
            before, value = Path(before).name, Path(value).name
        if before != value:
            raise TrainingError(
                f"{folder} was begun with other settings: {key} was {before!r} and is now {value!r}; give the same "
                "ones to go on, or another folder to begin anew"
            )
    started = {} if start_from is None else {"start_from": {"run": start_from.resolve().name}}
    refuse_other_options(folder, record, {**data, **started})
    return settings


def _explicit(config: str | None, changes: Sequence[str]) -> dict[str, Any]:
    """What somebody has written down, rather than a shipped file."""
    return asked_for(config if config is not None and config not in CONFIGS else None, changes)


def make_extractor(
    settings: Settings, explicit: Mapping[str, Any]
) -> tuple[keras.Model, ExtractorConfig, dict[str, Any]]:
    """The extractor of a new run, and what is known of where it comes from."""
    chosen = settings.extractor
    weights, source = chosen.weights, Path(chosen.weights)
    if weights in ("imagenet", "none") or not source.is_dir():
        config = ExtractorConfig(chosen.width, chosen.size, chosen.layer)
        _check_learns(settings, config)
        keras.utils.set_random_seed(settings.training.seed)
        extractor = build_extractor(config)
        load_extractor_weights(extractor, weights, learnt_from=chosen.learns_from)
        return extractor, config, {}
    extractor, config = load_extractor(source)
    for name in _GRID_SETTINGS:
        asked = explicit.get(f"extractor.{name}", getattr(config, name))
        if asked != getattr(config, name):
            raise OptionsError(f"the extractor in {source} has {name} {getattr(config, name)}, not {asked}")
    _check_learns(settings, config)
    origin = read_json(source / DISTILLATION) if (source / DISTILLATION).exists() else {}
    return extractor, config, origin


def _check_learns(settings: Settings, config: ExtractorConfig) -> None:
    """See that what is to learn of an extractor is a part of it."""
    if (block := settings.extractor.learns_from) is not None:
        check_cut(config.layer, block)


def _settings_from(begun: Run, config: str | None, changes: Sequence[str]) -> Settings:
    """Settings of a run that starts from another one: those of that one, unless told otherwise."""
    before = begun.settings.as_dict()
    for key, value in _explicit(config, changes).items():
        section, _, name = key.partition(".")
        if key in _OF_THE_WEIGHTS and value != before[section][name]:
            raise OptionsError(
                f"{key} is {before[section][name]!r} in {begun.folder}, so it is in a run that starts from there: "
                f"not {value!r}"
            )
    return settings_from(begun.settings, config, changes, without=_OF_THE_WEIGHTS)


def _start_facts(begun: Run, settings: Settings) -> dict[str, Any]:
    """Where a run begins that starts from another one, and what was set otherwise there; with where that one began."""
    now, before = settings.as_dict(), begun.facts.get("start_from")
    differed = {
        f"{section}.{name}": value
        for section, values in begun.settings.as_dict().items()
        for name, value in values.items()
        if value != now[section][name]
    }
    facts = {"run": begun.folder.resolve().name, "step": begun.facts["checkpoint"]["step"], "settings": differed}
    return facts | ({"start_from": before} if before else {})


def _write_start(folder: Path, begun: Run) -> None:
    """Copy what a run begins with out of another one, which is not needed afterwards."""
    save_extractor(begun.extractor, begun.extractor_config, folder)
    Checkpoints(folder / START, 1, {"encoder": begun.model.encoder, "decoder": begun.model.decoder}).save(0)
    write_json(folder / VOCABULARY, begun.vocabulary.to_json())  # after START, which tells whose it is


def build_vocabulary(folder: Path, dataset: Dataset, settings: Settings) -> Vocabulary:
    """The run's vocabulary, from the training captions; read back if it was written before."""
    path = folder / VOCABULARY
    if path.exists():
        return Vocabulary.from_json(read_json(path))
    captions = (caption for image in dataset.train for caption in image.captions)
    chosen = settings.captions
    vocabulary = Vocabulary.build(captions, chosen.vocabulary_size, min_count=chosen.min_count)
    write_json(path, vocabulary.to_json())
    return vocabulary


def prepare(folder: Path, dataset: Dataset, cache_folder: Path, workers: Distribution | None = None) -> Prepared:
    """The stages before training: grids and vocabulary.

    Args:
        folder: Of the run.
        dataset: The data.
        cache_folder: Where grids are kept.
        workers: The processes that train together; the chief computes, the others find what it has made.

    Raises:
        DatasetError: No photo can be read.
        TrainingError: The folder holds no run, or the cache cannot be written.
    """
    workers = workers or Distribution()
    settings = run_settings(folder)
    images = [*dataset.train, *dataset.validation]
    with workers.chief_first():
        cache, rows = _cached(settings, folder, cache_folder, images, fill=workers.is_chief)
        vocabulary = build_vocabulary(folder, dataset, settings)
    max_words = settings.captions.max_words
    train, validation = np.split(rows, [len(dataset.train)])
    return Prepared(
        caption_data(dataset.train, train, vocabulary, max_words),
        caption_data(dataset.validation, validation, vocabulary, max_words),
        vocabulary,
        _source_of(settings, folder, cache, workers),
    )


def _cached(
    settings: Settings, folder: Path, cache_folder: Path, images: Sequence[CaptionedImage], *, fill: bool
) -> tuple[GridCache, NDArray[np.int64]]:
    """What is kept of photos, and their rows; what the cache lacks is computed if it may be filled."""
    extractor, config = load_extractor(folder)
    if (block := settings.extractor.learns_from) is not None:
        extractor, config = lower_part(extractor, config, block)
    cache = open_cache(cache_folder, extractor, config)
    return cache, grids_of(cache, extractor, config, images) if fill else cache.rows([image.path for image in images])


def _source_of(settings: Settings, folder: Path, cache: GridCache, workers: Distribution) -> FeatureSource:
    """Where grids come from. All processes make a network that learns at the same time: its weights are the chief's."""
    if (block := settings.extractor.learns_from) is None:
        return CachedGrids(cache)
    with workers.scope():
        extractor, config = load_extractor(folder)
        return FineTunedBlocks(cache, extractor, config, block, dtype_of_products(settings.training.precision))


def trainer_of(folder: Path, dataset: Dataset, cache_folder: Path, workers: Distribution | None = None) -> Trainer:
    """Grids, vocabulary, and the trainer at the last checkpoint; see `prepare`."""
    settings, prepared = run_settings(folder), prepare(folder, dataset, cache_folder, workers)
    objectives = {"cross_entropy": None, "self_critical": partial(_self_critical, settings, prepared)}
    make_objective = objectives[settings.training.objective]
    return Trainer(settings, *prepared, folder, make_objective=make_objective, workers=workers)


def _self_critical(settings: Settings, prepared: Prepared, model: CaptionModel) -> SelfCritical:
    """The objective of self-critical training; its reward knows the training photos alone."""
    chosen = settings.training
    return SelfCritical(
        model,
        prepared.source,
        reward_of(prepared.train.images, prepared.vocabulary),
        Rules.of(prepared.vocabulary, settings.captions.max_words),
        samples=chosen.samples,
        baseline=chosen.baseline,
        seed=chosen.seed,
    )

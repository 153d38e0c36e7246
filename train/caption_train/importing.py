"""A run folder made of what somebody else's training left."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import tensorflow as tf

from caption_train.checkpoints import Checkpoints
from caption_train.errors import TrainingError
from caption_train.files import write_json, write_text
from caption_train.inception import save_extractor, weights_key
from caption_train.model import CaptionModel, model_config
from caption_train.runs import RUN, SETTINGS, VOCABULARY
from caption_train.settings import load_settings, render
from caption_train.stages import make_extractor
from caption_train.training import BEST
from caption_train.tutorial import fill_model, read_tutorial

__all__ = ["import_tutorial"]


def import_tutorial(folder: Path, checkpoint: Path, tokenizer: Path, extractor_weights: str, max_words: int) -> None:
    """Make a run folder of a checkpoint of TensorFlow's image-captioning tutorial.

    Its recurrence is "reset" and its first state zeros, as the tutorial's code goes.

    Args:
        folder: The run folder, which holds no run yet.
        checkpoint: See `caption_train.tutorial.read_tutorial`.
        tokenizer: See there.
        extractor_weights: ``imagenet``, ``none``, a weights file, or a folder with an extractor.
        max_words: Captions are cut after so many.

    Raises:
        OptionsError: A setting out of its range.
        TrainingError: The folder holds a run; checkpoint or tokenizer do not serve; the extractor cannot be had, or
            gives another grid than the model was trained on.
        OSError: The folder cannot be written.
    """
    if (folder / RUN).exists():
        raise TrainingError(f"{folder} holds a run already: take another folder")
    tutorial = read_tutorial(checkpoint, tokenizer)
    changes = {
        "model.embedding_dim": tutorial.embedding_dim,
        "model.units": tutorial.units,
        "captions.vocabulary_size": len(tutorial.vocabulary) - len(tutorial.vocabulary.special_ids),
        "captions.max_words": max_words,
        "extractor.weights": extractor_weights,
    }
    settings = load_settings("tutorial").changed(changes)
    extractor, config, origin = make_extractor(settings, {})
    rows, columns, channels = extractor.output_shape[1:]
    if channels != tutorial.channels:
        raise TrainingError(
            f"the checkpoint {checkpoint} was trained on a grid of {tutorial.channels} channels, and the extractor's "
            f"has {channels}: give the weights of another one"
        )
    settings = settings.changed({f"extractor.{name}": value for name, value in asdict(config).items()})
    model = CaptionModel(model_config(settings, rows * columns, channels, len(tutorial.vocabulary)))
    fill_model(model, tutorial)
    save_extractor(extractor, config, folder)
    write_json(folder / VOCABULARY, tutorial.vocabulary.to_json())
    step = tf.Variable(0, dtype=tf.int64, trainable=False)
    Checkpoints(folder / BEST, 1, {"encoder": model.encoder, "decoder": model.decoder, "step": step}).save(0)
    write_text(folder / SETTINGS, render(settings, "tutorial"))
    record = {
        "dataset": {},  # not known
        "extractor": {
            "weights": Path(extractor_weights).resolve().name,
            **asdict(config),
            "sha256": weights_key(extractor),
            **origin,
        },
        "imported_from": {"checkpoint": tutorial.checkpoint, "tokenizer": tokenizer.name},
    }
    write_json(folder / RUN, record)  # last: a folder with it is a run

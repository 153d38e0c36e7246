"""Training data and settings of a few kB: drawn photos in place of a network's grids, and what a trainer needs."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from caption_rt.image import read_photo
from caption_rt.vocabulary import Vocabulary
from caption_train.batches import CaptionData, caption_data
from caption_train.cache import GridCache
from caption_train.datasets import CaptionedImage
from caption_train.settings import Settings, load_settings
from caption_train.sources import CachedGrids
from caption_train.training import Trainer
from shapes import shape_photo

# 20 captions in batches of 4: 5 steps an epoch, a checkpoint within each epoch and at its end.
CHANGES = (
    *("model.embedding_dim=12", "model.units=16", "captions.max_words=12", "training.precision=float32"),
    *("training.batch_size=4", "training.epochs=3", "training.learning_rate=0.02", "training.checkpoint_steps=3"),
)


class Made(NamedTuple):
    """What a trainer is given besides its settings and its folder."""

    train: CaptionData
    validation: CaptionData
    vocabulary: Vocabulary
    source: CachedGrids


def tiny_settings(*changes: str) -> Settings:
    """Settings of a tiny run, with changes to them."""
    return load_settings(changes=[*CHANGES, *changes])


def tiny_data(folder: Path) -> Made:
    """Ten photos to train on and four to validate on, with two captions each."""
    folder.mkdir(exist_ok=True)
    images = []
    for index in range(14):
        photo, caption = shape_photo(index)
        path = folder / f"{index}.png"
        photo.save(path)
        images.append(CaptionedImage(path, (caption, f"There is {caption}, in the middle.")))
    cache = GridCache.open(folder / "cache", "key", (4, 12))
    rows = cache.fill([image.path for image in images], _extract, read=lambda path: read_photo(path, 4))
    train, validation = images[:10], images[10:]
    vocabulary = Vocabulary.build((caption for image in train for caption in image.captions), 50)
    return Made(
        caption_data(train, rows[:10], vocabulary, 12),
        caption_data(validation, rows[10:], vocabulary, 12),
        vocabulary,
        CachedGrids(cache),
    )


def tiny_trainer(made: Made, folder: Path, *changes: str) -> Trainer:
    """A trainer of a tiny run."""
    return Trainer(tiny_settings(*changes), *made, folder)


def _extract(photos: NDArray[np.uint8]) -> NDArray[np.float32]:
    """In place of a network: each quarter's pixels as they are. Photos uint8 [n, 4, 4, 3] -> [n, 4, 12]."""
    quarters = photos.astype(np.float32).reshape(-1, 2, 2, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5)
    return quarters.reshape(-1, 4, 12) / 127.5 - 1

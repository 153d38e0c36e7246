"""Photos with captions: what a caption file says, and what of it is there to train on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Part = Literal["train", "validation", "test"]
"""The parts of a data set."""


@dataclass(frozen=True)
class CaptionedImage:
    """One photo and what people wrote about it."""

    path: Path
    """Where the photo lies."""
    captions: tuple[str, ...]
    """At least one caption, as written: neither lower-cased nor stripped of punctuation."""


@dataclass(frozen=True)
class Dataset:
    """A caption data set in its parts; each is sorted by path, and no photo is in two of them."""

    name: str
    """What the set is called: "flickr8k", "flickr30k", "coco", else the name of the caption file without its ending."""
    train: tuple[CaptionedImage, ...]
    """What the model learns from."""
    validation: tuple[CaptionedImage, ...]
    """What chooses the best checkpoint, and what scores are given for."""
    missing: int
    """How many photos of the set are not on disk, and so are in none of the parts."""
    test: tuple[CaptionedImage, ...] = ()
    """The set's own test part, where it has one and it is there."""
    wordless: int = 0
    """How many captions were left out because they hold no word."""
    own_split: bool = False
    """Whether the set itself says what is validated on; otherwise that was drawn."""


@dataclass(frozen=True)
class Record:
    """One photo as a caption file has it, before it is looked for on the disk."""

    name: str
    """Its path within the folder of photos, with "/" between folders; see `caption_train.caption_text.photo_name`."""
    captions: tuple[str, ...]
    """As written, but for white space at both ends; some may be empty, and there may be none."""
    part: Part | None = None
    """Where the set itself puts it; None to have it drawn."""


@dataclass(frozen=True)
class CaptionFile:
    """All that one caption file says, or several that belong together."""

    name: str
    """As in `Dataset`."""
    source: Path
    """What errors name."""
    records: tuple[Record, ...]
    """The photos; no name is there twice."""
    roots: tuple[Path, ...]
    """Folders in which the photos are looked for where the caller names none."""
    folders: tuple[str, ...]
    """Names of folders of photos, to be found in the roots or in the caller's folder."""

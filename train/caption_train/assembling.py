"""From what a caption file says to a data set: the photos that are there, as many as are wanted, in their parts.

What is drawn at random, by a limit and by a split that the set does not bring, is drawn by hashing the seed with each
photo's name. So it depends neither on the order of files and lines nor on a library's generator, and a smaller limit
takes a subset of what a larger one takes.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from caption_rt.errors import OptionsError
from caption_rt.vocabulary import normalize_caption
from caption_train.captioned import CaptionedImage, CaptionFile, Dataset, Part, Record
from caption_train.errors import DatasetError
from caption_train.ptb import ptb_tokens

logger = logging.getLogger(__name__)

_LETTER = re.compile(r"[A-Za-z0-9]")


@dataclass(frozen=True)
class Choices:
    """What of a data set is taken.

    Raises:
        OptionsError: A number is out of its range.
    """

    limit: int | None = None
    """At most so many photos: of the training part where the set brings a split (validation stays whole, so that scores
    compare), of all photos before they are split where it does not."""
    seed: int = 0
    """Draws the photos of the limits, and those of a split that the set does not bring."""
    validation_share: float = 0.2
    """Validation's share of the photos where the set brings no split, above 0 and below 1."""
    max_missing_share: float = 0.0
    """How large a share of the set's photos may be missing on disk, 0 to 1."""
    validation_limit: int | None = None
    """At most so many photos to validate on, whoever made the split: MS-COCO's own part of 2014 has 40,504."""

    def __post_init__(self) -> None:
        """Check the values."""
        for what, limit in (("limit", self.limit), ("validation limit", self.validation_limit)):
            if limit is not None and limit < 1:
                raise OptionsError(f"a {what} of {limit} photos leaves nothing to work with; give 1 or more")
        if not 0 < self.validation_share < 1:
            raise OptionsError(f"the validation share {self.validation_share:g} is not between 0 and 1")
        if not 0 <= self.max_missing_share <= 1:
            raise OptionsError(f"the largest missing share {self.max_missing_share:g} is not between 0 and 1")


def assemble(captions: CaptionFile, images: Path | None, choices: Choices, *, find_photos: bool = True) -> Dataset:
    """Find the photos, and put them into their parts.

    Args:
        captions: What a caption file says.
        images: The folder of the photos; None for where the set usually has them.
        choices: What of it is taken.
        find_photos: As in `caption_train.datasets.load_dataset`.

    Returns:
        The data set.

    Raises:
        DatasetError: There is no caption, no folder of photos, too many photos are missing, or too few are left.
    """
    records, wordless = _with_words(captions)
    if find_photos:
        found = _find_photos(captions, records, images, choices.max_missing_share)
    else:
        found = [_Found(record, Path(record.name)) for record in records]
    missing = len(records) - len(found)
    parts: dict[Part | None, list[_Found]] = {"train": [], "validation": [], "test": [], None: []}
    for photo in found:
        parts[photo.record.part].append(photo)
    # A set that names no validation photos, such as one with a test part alone, has them drawn.
    loose = parts[None] + ([] if parts["validation"] else parts["train"])
    own_split = not loose
    if own_split:
        train, validation = _draw(parts["train"], choices.limit, choices.seed), parts["validation"]
    elif parts["validation"]:
        raise DatasetError(
            f"{captions.source}: {len(parts[None]):,} photos are in no part, such as {parts[None][0].record.name}, "
            "though others are there to validate on; give each photo a part, or none"
        )
    else:
        train, validation = _split(_draw(loose, choices.limit, choices.seed), choices.validation_share, choices.seed)
    if choices.validation_limit is not None:
        validation = _ranked(validation, choices.seed, "limit")[: choices.validation_limit]
    if not train or not validation:
        raise DatasetError(
            f"{captions.source}: {len(train)} photos to train on and {len(validation)} to validate on are too few; "
            "one of each is the least"
        )
    return Dataset(
        name=captions.name,
        train=_images(train),
        validation=_images(validation),
        missing=missing,
        test=_images(parts["test"]),
        wordless=wordless,
        own_split=own_split,
    )


@dataclass(frozen=True)
class _Found:
    """A record and its photo."""

    record: Record
    path: Path


def _with_words(captions: CaptionFile) -> tuple[list[Record], int]:
    """Drops captions without a word, which would teach the model to say nothing, and photos left without captions."""
    kept, wordless = [], 0
    for record in captions.records:
        texts = tuple(text for text in record.captions if _has_word(text))
        wordless += len(record.captions) - len(texts)
        if texts:
            kept.append(Record(record.name, texts, record.part))
    if wordless:
        logger.warning("%s: %d captions without a word are left out", captions.source, wordless)
    if len(kept) < len(captions.records):
        bare = len(captions.records) - len(kept)
        logger.warning("%s: %d photos without a caption are left out", captions.source, bare)
    if not kept:
        raise DatasetError(f"{captions.source} holds no captions")
    return kept, wordless


def _has_word(text: str) -> bool:
    """Whether a caption has a word for the model and one for the scores, to which an emoji or an apostrophe is none."""
    # A letter is a token of the scores or part of one; to ask for the tokens takes half a minute for MS-COCO.
    return bool(normalize_caption(text)) and (_LETTER.search(text) is not None or bool(ptb_tokens(text)))


def _find_photos(
    captions: CaptionFile, records: Sequence[Record], images: Path | None, max_missing_share: float
) -> list[_Found]:
    """The records whose photos are on disk."""
    folders = _folders(captions, images)
    found = []
    for record in records:
        candidates = (folder / record.name for folder in folders)
        path = next((candidate for candidate in candidates if candidate.is_file()), None)
        if path is not None:
            found.append(_Found(record, path))
    if len(found) == len(records):
        return found
    there = {photo.record.name for photo in found}
    example = next(record.name for record in records if record.name not in there)
    share = (len(records) - len(found)) / len(records)
    places = images or " or ".join(map(str, folders))
    count = (
        f"{len(records) - len(found):,} of the {len(records):,} photos of {captions.source} are not in {places}, "
        f"such as {example}"
    )
    if not found:
        raise DatasetError(f"{count}; none is there, so look whether this is the right folder")
    if share > max_missing_share:
        raise DatasetError(
            f"{count}; get them, or raise max_missing_share from {max_missing_share:g} to "
            f"{math.ceil(share * 1000) / 1000:g} to go on without them"
        )
    logger.warning("%s; going on without them", count)
    return found


def _folders(captions: CaptionFile, images: Path | None) -> list[Path]:
    """The folders of photos that are there."""
    if images is not None:
        if not images.is_dir():
            raise DatasetError(f"{images}: there is no such folder of photos")
        return [images, *(images / name for name in captions.folders if (images / name).is_dir())]
    folders = [root / name for root in captions.roots for name in captions.folders]
    there = [folder for folder in folders if folder.is_dir()]
    if not there:
        names = " or ".join(name for name in captions.folders if name != ".")
        named = f" named {names}" if names else ""
        raise DatasetError(
            f"{captions.source}: there is no folder of photos{named} beside the captions; say which folder holds the "
            "photos, with --images"
        )
    return there


def _draw(photos: list[_Found], limit: int | None, seed: int) -> list[_Found]:
    return photos if limit is None else _ranked(photos, seed, "limit")[:limit]


def _split(photos: list[_Found], share: float, seed: int) -> tuple[list[_Found], list[_Found]]:
    """Training and validation part: at least one photo each, where there are two."""
    count = min(max(1, round(share * len(photos))), len(photos) - 1)
    ranked = _ranked(photos, seed, "split")
    return ranked[count:], ranked[:count]


def _ranked(photos: list[_Found], seed: int, purpose: str) -> list[_Found]:
    """The photos in an order that only the seed, the purpose and their names decide."""

    def rank(photo: _Found) -> bytes:
        return hashlib.sha256(f"{purpose}/{seed}/{photo.record.name}".encode()).digest()

    return sorted(photos, key=rank)


def _images(photos: Sequence[_Found]) -> tuple[CaptionedImage, ...]:
    return tuple(
        CaptionedImage(photo.path, photo.record.captions) for photo in sorted(photos, key=lambda photo: photo.path)
    )

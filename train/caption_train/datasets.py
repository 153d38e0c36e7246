"""Caption data sets as they are published, read into photos with their captions.

Flickr8k (Hodosh, Young and Hockenmaier 2013) comes as text files beside a folder of photos, MS-COCO (Chen et al. 2015,
https://cocodataset.org/#format-data) as one JSON file and a folder of photos. Both become a `Dataset`.

What is drawn at random, by `limit` and by a split that the set does not bring, is drawn by hashing the seed with each
photo's name. So it depends neither on the order of files and lines nor on a library's generator, and a smaller `limit`
takes a subset of what a larger one takes.
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from caption_rt.errors import OptionsError
from caption_rt.vocabulary import normalize_caption
from caption_train.errors import DatasetError

logger = logging.getLogger(__name__)

T = TypeVar("T")

FLICKR8K_CAPTIONS = "Flickr8k.token.txt"
FLICKR8K_SPLITS = {
    "train": "Flickr_8k.trainImages.txt",
    "validation": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
FLICKR8K_IMAGE_FOLDERS = ("images", "Flicker8k_Dataset")  # the second is the set's own spelling
PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".avif"})


@dataclass(frozen=True)
class CaptionedImage:
    """One photo and what people wrote about it."""

    path: Path
    """Where the photo lies."""
    captions: tuple[str, ...]
    """At least one caption, as written: neither lower-cased nor stripped of punctuation."""


@dataclass(frozen=True)
class Dataset:
    """A caption data set in its parts; each is sorted by file name, and no photo is in two of them."""

    name: str
    """"flickr8k" or "coco"."""
    train: tuple[CaptionedImage, ...]
    """What the model learns from."""
    validation: tuple[CaptionedImage, ...]
    """What chooses the best checkpoint, and what scores are given for."""
    missing: int
    """How many photos of the set are not on disk, and so are in none of the parts."""
    test: tuple[CaptionedImage, ...] = ()
    """The set's own test part, where it has one and it is there."""


def load_dataset(
    path: Path,
    *,
    images: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    validation_share: float = 0.2,
    max_missing_share: float = 0.0,
) -> Dataset:
    """Reads a data set in the format that its path shows: Flickr8k's folder, or MS-COCO's caption JSON.

    Args:
        path: A folder with `Flickr8k.token.txt`, or a `.json` file of COCO captions.
        images: The folder of the photos. COCO's captions need it; Flickr8k finds its own beside its captions.
        limit: As in `load_flickr8k` and `load_coco`.
        seed: As there.
        validation_share: As there.
        max_missing_share: As there.

    Returns:
        The data set.

    Raises:
        DatasetError: The path is neither of the two, or what is there cannot be used.
        OptionsError: An argument is out of its range.
    """
    options: dict[str, Any] = {
        "limit": limit,
        "seed": seed,
        "validation_share": validation_share,
        "max_missing_share": max_missing_share,
    }
    if path.is_dir():
        return load_flickr8k(path, images=images, **options)
    if not path.exists():
        raise DatasetError(f"{path}: there is no such data set; give a folder with {FLICKR8K_CAPTIONS} or a .json")
    if path.suffix.lower() != ".json":
        raise DatasetError(f"{path} is no data set; give a folder with {FLICKR8K_CAPTIONS}, or COCO captions (.json)")
    if images is None:
        raise DatasetError(f"{path}: COCO's captions come without photos; say which folder holds the photos as well")
    return load_coco(path, images, **options)


def load_flickr8k(
    folder: Path,
    *,
    images: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    validation_share: float = 0.2,
    max_missing_share: float = 0.0,
) -> Dataset:
    """Reads Flickr8k's own files: `Flickr8k.token.txt` and, where they are, the lists of its standard split.

    With the lists, the training and dev parts are the set's own and photos that are in no list are left out. Without
    them, all photos (but those of the test list, should that be there) are split at random.

    Args:
        folder: Where `Flickr8k.token.txt` lies, one `NAME.jpg#K<TAB>caption` a line.
        images: The folder of the photos; by default `images` or `Flicker8k_Dataset` in `folder`.
        limit: At most so many photos, drawn by `seed`: of the training part where the set brings a split (validation
            stays whole, so that scores compare), of all photos before they are split where it does not.
        seed: Draws the photos of `limit` and of a split that the set does not bring.
        validation_share: Validation's share of the photos where the set brings no split, above 0 and below 1.
        max_missing_share: How large a share of the set's photos may be missing on disk, 0 to 1.

    Returns:
        The data set.

    Raises:
        DatasetError: A file is missing or malformed (with its line), or too many photos are missing.
        OptionsError: An argument is out of its range.
    """
    _check_options(limit, validation_share, max_missing_share)
    captions = _flickr8k_captions(folder / FLICKR8K_CAPTIONS)
    splits = _flickr8k_splits(folder, captions)
    if images is None:
        candidates = [folder / name for name in FLICKR8K_IMAGE_FOLDERS]
        images = next((candidate for candidate in candidates if candidate.is_dir()), None)
        if images is None:
            raise DatasetError(f"{folder}: there is no folder of photos named {' or '.join(FLICKR8K_IMAGE_FOLDERS)}")
    own_split = "train" in splits
    if not own_split:
        splits["train"] = [name for name in captions if name not in set(splits.get("test", ()))]
    wanted = {name: captions[name] for names in splits.values() for name in names}
    found, missing = _find_photos(images, wanted, max_missing_share, source=folder)
    parts = {part: [found[name] for name in names if name in found] for part, names in splits.items()}
    train = _draw(parts["train"], limit, seed)
    validation = parts.get("validation", [])
    if not own_split:
        train, validation = _split(train, validation_share, seed)
    return _dataset("flickr8k", folder, train, validation, missing, parts.get("test", []))


def load_coco(
    annotations: Path,
    images: Path,
    *,
    limit: int | None = None,
    seed: int = 0,
    validation_share: float = 0.2,
    max_missing_share: float = 0.0,
) -> Dataset:
    """Reads MS-COCO's caption annotations (`captions_*.json`) and splits its photos at random.

    Args:
        annotations: The JSON file: `images` with `id` and `file_name`, `annotations` with `image_id` and `caption`.
        images: The folder where `file_name` is to be found.
        limit: At most so many photos, drawn by `seed` from those on disk before they are split.
        seed: Draws the photos of `limit` and of the split.
        validation_share: Validation's share of the photos, above 0 and below 1.
        max_missing_share: How large a share of the set's photos may be missing on disk, 0 to 1.

    Returns:
        The data set.

    Raises:
        DatasetError: The file is missing or not in this format, or too many photos are missing.
        OptionsError: An argument is out of its range.
    """
    _check_options(limit, validation_share, max_missing_share)
    captions = _coco_captions(annotations)
    found, missing = _find_photos(images, captions, max_missing_share, source=annotations)
    train, validation = _split(_draw(list(found.values()), limit, seed), validation_share, seed)
    return _dataset("coco", annotations, train, validation, missing)


def photos_in(folder: Path) -> tuple[Path, ...]:
    """Lists the photos of a folder and the folders within it, sorted by path; hidden files and folders are left out.

    Args:
        folder: Where to look. Links to folders are not followed.

    Returns:
        The files whose suffix is one of `PHOTO_SUFFIXES`; their content is not looked at.

    Raises:
        DatasetError: The folder is not there, or holds no photo.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder}: there is no such folder of photos")
    photos: list[Path] = []
    for here, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = (name for name in files if not name.startswith("."))
        photos.extend(Path(here, name) for name in names if Path(name).suffix.lower() in PHOTO_SUFFIXES)
    if not photos:
        raise DatasetError(f"{folder}: no photo is in this folder or below it")
    return tuple(sorted(photos))


def _check_options(limit: int | None, validation_share: float, max_missing_share: float) -> None:
    if limit is not None and limit < 1:
        raise OptionsError(f"a limit of {limit} photos leaves nothing to train on; give 1 or more")
    if not 0 < validation_share < 1:
        raise OptionsError(f"the validation share {validation_share:g} is not between 0 and 1")
    if not 0 <= max_missing_share <= 1:
        raise OptionsError(f"the largest missing share {max_missing_share:g} is not between 0 and 1")


def _read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark."""
    try:
        content = path.read_bytes()
    except OSError as exc:
        raise DatasetError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = content.count(b"\n", 0, exc.start) + 1
        raise DatasetError(f"{path}, line {line}: this is not UTF-8 text") from exc


def _lines(path: Path) -> Iterable[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers from 1."""
    for number, line in enumerate(_read_text(path).split("\n"), 1):  # splitlines would also split within captions
        if line.strip():
            yield number, line.rstrip("\r")


def _flickr8k_captions(path: Path) -> dict[str, tuple[str, ...]]:
    """File name -> captions, in the order of the lines."""
    if not path.is_file():
        raise DatasetError(f"{path}: there is no such file, so this is not Flickr8k's folder")
    captions: dict[str, list[str]] = {}
    for number, line in _lines(path):
        key, tab, caption = line.partition("\t")
        name, mark, index = key.rpartition("#")
        if not (tab and mark and name and index.isdecimal()):
            raise DatasetError(f"{path}, line {number}: expected NAME.jpg#K<TAB>caption, found {line[:60]!r}")
        captions.setdefault(name, []).append(caption)
    return _with_words(captions, path)


def _flickr8k_splits(folder: Path, captions: Mapping[str, tuple[str, ...]]) -> dict[str, list[str]]:
    """Part -> file names, of the lists that are there; train and validation are there both or neither."""
    splits: dict[str, list[str]] = {}
    seen: dict[str, str] = {}
    for part, list_name in FLICKR8K_SPLITS.items():
        path = folder / list_name
        if not path.exists():
            continue
        splits[part] = []
        for number, line in _lines(path):
            name = line.strip()
            if name not in captions:
                raise DatasetError(f"{path}, line {number}: {name} has no caption in {FLICKR8K_CAPTIONS}")
            if name in seen:
                raise DatasetError(f"{path}, line {number}: {name} is listed twice, here and in {seen[name]}")
            seen[name] = list_name
            splits[part].append(name)
    if ("train" in splits) != ("validation" in splits):
        there, absent = sorted(("train", "validation"), key=lambda part: part not in splits)
        raise DatasetError(
            f"{folder} has {FLICKR8K_SPLITS[there]} but not {FLICKR8K_SPLITS[absent]}; "
            "add it, or take the other away to have the photos split at random"
        )
    return splits


def _coco_captions(path: Path) -> dict[str, tuple[str, ...]]:
    """File name -> captions, of the images that have any."""
    try:
        content = json.loads(_read_text(path))
    except json.JSONDecodeError as exc:
        raise DatasetError(f"{path}, line {exc.lineno}: this is not JSON: {exc.msg}") from exc
    names: dict[int, str] = {}
    captions: dict[str, list[str]] = {}
    for index, record in enumerate(_records(path, content, "images")):
        where = f"{path}, images[{index}]"
        number, name = _field(record, "id", int, where), _field(record, "file_name", str, where)
        if number in names or name in captions:
            raise DatasetError(f"{where}: the image {number} ({name}) is there twice")
        names[number] = name
        captions[name] = []
    for index, record in enumerate(_records(path, content, "annotations")):
        where = f"{path}, annotations[{index}]"
        number, caption = _field(record, "image_id", int, where), _field(record, "caption", str, where)
        if number not in names:
            raise DatasetError(f"{where}: there is no image {number} in the file")
        captions[names[number]].append(caption.strip())
    return _with_words(captions, path)


def _records(path: Path, content: object, name: str) -> list[object]:
    records = content.get(name) if isinstance(content, dict) else None
    if not isinstance(records, list):
        raise DatasetError(f"{path} is not COCO's caption format: it has no list {name!r}")
    return records


def _field(record: object, name: str, kind: type[T], where: str) -> T:
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, kind):
        raise DatasetError(f"{where}: {name!r} is missing or not of type {kind.__name__}")
    return value


def _with_words(captions: Mapping[str, Sequence[str]], source: Path) -> dict[str, tuple[str, ...]]:
    """Drops captions without a word, which would teach the model to say nothing, and images left without captions."""
    kept = {name: tuple(text for text in texts if normalize_caption(text)) for name, texts in captions.items()}
    dropped = sum(map(len, captions.values())) - sum(map(len, kept.values()))
    if dropped:
        logger.warning("%s: %d captions without a word are left out", source, dropped)
    kept = {name: texts for name, texts in kept.items() if texts}
    if not kept:
        raise DatasetError(f"{source} holds no captions")
    return kept


def _find_photos(
    images: Path, captions: Mapping[str, tuple[str, ...]], max_missing_share: float, *, source: Path
) -> tuple[dict[str, CaptionedImage], int]:
    """The photos that are on disk, by file name, and how many are not."""
    if not images.is_dir():
        raise DatasetError(f"{images}: there is no such folder of photos")
    everything = {name: CaptionedImage(images / name, texts) for name, texts in captions.items()}
    found = {name: image for name, image in everything.items() if image.path.is_file()}
    missing = [name for name in captions if name not in found]
    if not missing:
        return found, 0
    share = len(missing) / len(captions)
    count = f"{len(missing):,} of the {len(captions):,} photos of {source} are not in {images}, such as {missing[0]}"
    if not found:
        raise DatasetError(f"{count}; none is there, so look whether this is the right folder")
    if share > max_missing_share:
        raise DatasetError(
            f"{count}; get them, or raise max_missing_share from {max_missing_share:g} to "
            f"{math.ceil(share * 1000) / 1000:g} to go on without them"
        )
    logger.warning("%s; going on without them", count)
    return found, len(missing)


def _draw(images: list[CaptionedImage], limit: int | None, seed: int) -> list[CaptionedImage]:
    return images if limit is None else _ranked(images, seed, "limit")[:limit]


def _split(images: list[CaptionedImage], share: float, seed: int) -> tuple[list[CaptionedImage], list[CaptionedImage]]:
    """Training and validation part: at least one photo each, where there are two."""
    count = min(max(1, round(share * len(images))), len(images) - 1)
    ranked = _ranked(images, seed, "split")
    return ranked[count:], ranked[:count]


def _ranked(images: list[CaptionedImage], seed: int, purpose: str) -> list[CaptionedImage]:
    """The images in an order that only the seed, the purpose and their names decide."""

    def rank(image: CaptionedImage) -> bytes:
        return hashlib.sha256(f"{purpose}/{seed}/{image.path.name}".encode()).digest()

    return sorted(images, key=rank)


def _dataset(
    name: str,
    source: Path,
    train: list[CaptionedImage],
    validation: list[CaptionedImage],
    missing: int,
    test: Sequence[CaptionedImage] = (),
) -> Dataset:
    if not train or not validation:
        raise DatasetError(
            f"{source}: {len(train)} photos to train on and {len(validation)} to validate on are too few; "
            "one of each is the least"
        )
    parts = [tuple(sorted(part, key=lambda image: image.path)) for part in (train, validation, test)]
    return Dataset(name=name, train=parts[0], validation=parts[1], missing=missing, test=parts[2])

"""MS-COCO's caption JSON (Chen et al. 2015, https://cocodataset.org/#format-data), and Karpathy's split JSON.

The split of Karpathy and Fei-Fei 2015 ("Deep Visual-Semantic Alignments for Generating Image Descriptions") is passed
on as ``dataset_coco.json``, ``dataset_flickr8k.json`` and ``dataset_flickr30k.json``: photos, captions and parts in one
file.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from caption_train.caption_text import field, part_name, photo_name, read_json, records_of
from caption_train.captioned import CaptionFile, Part, Record
from caption_train.errors import DatasetError

logger = logging.getLogger(__name__)

COCO_CAPTIONS = "captions_*.json"
_SUBSET = re.compile(r"captions_(?P<subset>(?P<part>train|val)(?P<year>\w*))\.json")
_COCO_PARTS: dict[str, Part] = {"train": "train", "val": "validation"}
_FOLDERS = ("images", "Images", "Flicker8k_Dataset", "flickr30k-images", "flickr30k_images", ".")


def read_json_set(path: Path) -> CaptionFile:
    """Read a JSON file of captions: MS-COCO's, or Karpathy's.

    Args:
        path: The file.

    Returns:
        What it says; of MS-COCO's, nothing of parts.

    Raises:
        DatasetError: The file is not JSON (with the line), or not in one of these formats (with the record).
    """
    content = read_json(path)
    images = content.get("images") if isinstance(content, dict) else None
    if isinstance(images, list) and any(isinstance(image, dict) and "sentences" in image for image in images):
        return _karpathy(path, content)
    return CaptionFile("coco", path, _coco_records(path, content, None), *_coco_places(path))


def read_coco_folder(paths: Sequence[Path], *, find_photos: bool = True) -> CaptionFile:
    """Read MS-COCO's files of a folder: where training and validation captions are both there, that is the split.

    A file whose photos nobody fetched is left out, as long as those of the other are there: the annotations come in
    one archive, the photos in two.

    Args:
        paths: One or two caption files of one year.
        find_photos: Whether photos are looked for; if not, no file is left out.

    Returns:
        What they say.

    Raises:
        DatasetError: They are not of one year, or cannot be read.
    """
    with_photos = [path for path in paths if find_photos and any(map(Path.is_dir, _photo_folders(path)))]
    for path in paths:
        if with_photos and path not in with_photos:
            logger.warning("%s: its photos are not there; going on without it", path)
    chosen = with_photos or list(paths)
    if len(chosen) == 1:
        return read_json_set(chosen[0])
    found = [_SUBSET.fullmatch(path.name) for path in chosen]
    years = {match["year"] if match else None for match in found}
    parts = [match["part"] for match in found if match]
    if len(years) > 1 or sorted(parts) != ["train", "val"]:
        names = ", ".join(path.name for path in chosen)
        raise DatasetError(f"{chosen[0].parent} has {names}, which are no pair of one year; name one of the files")
    records: dict[str, Record] = {}
    for path, part in zip(chosen, parts, strict=True):
        for record in _coco_records(path, read_json(path), _COCO_PARTS[part]):
            if record.name in records:
                raise DatasetError(f"{path}: the photo {record.name} is in the other file as well")
            records[record.name] = record
    places = [_coco_places(path) for path in chosen]
    folders = tuple(dict.fromkeys(folder for _, group in places for folder in group))
    return CaptionFile("coco", chosen[0].parent, tuple(records.values()), places[0][0], folders)


def _coco_places(path: Path) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Where MS-COCO's photos are looked for: beside the captions, or beside their folder ``annotations``."""
    found = _SUBSET.fullmatch(path.name)
    subset = [found["subset"]] if found else []
    above = (path.parent.parent,) if path.parent.name == "annotations" else ()
    return (*above, path.parent), tuple(folder for name in subset for folder in (name, f"images/{name}"))


def _photo_folders(path: Path) -> list[Path]:
    roots, folders = _coco_places(path)
    return [root / folder for root in roots for folder in folders]


def _coco_records(path: Path, content: object, part: Part | None) -> tuple[Record, ...]:
    """The photos of one of MS-COCO's caption files, those without captions too."""
    names: dict[int, str] = {}
    captions: dict[str, list[str]] = {}
    for index, record in enumerate(_list(path, content, "images")):
        where = f"{path}, images[{index}]"
        number = field(record, "id", int, where)
        name = photo_name(field(record, "file_name", str, where), where)
        if number in names or name in captions:
            raise DatasetError(f"{where}: the image {number} ({name}) is there twice")
        names[number] = name
        captions[name] = []
    seen: set[int] = set()
    for index, record in enumerate(_list(path, content, "annotations")):
        where = f"{path}, annotations[{index}]"
        number, caption = field(record, "image_id", int, where), field(record, "caption", str, where)
        if number not in names:
            raise DatasetError(f"{where}: there is no image {number} in the file")
        if isinstance(record, dict) and "id" in record:
            own = field(record, "id", int, where)
            if own in seen:
                raise DatasetError(f"{where}: the annotation {own} is there twice")
            seen.add(own)
        captions[names[number]].append(caption)
    return records_of(captions, {} if part is None else dict.fromkeys(captions, part))


def _list(path: Path, content: object, name: str) -> list[object]:
    records = content.get(name) if isinstance(content, dict) else None
    if not isinstance(records, list):
        raise DatasetError(f"{path} is not COCO's caption format: it has no list {name!r}")
    return records


def _karpathy(path: Path, content: dict[str, Any]) -> CaptionFile:
    records: dict[str, Record] = {}
    for index, image in enumerate(content["images"]):
        where = f"{path}, images[{index}]"
        name = field(image, "filename", str, where)
        if "filepath" in image:  # MS-COCO's only: train2014 or val2014
            name = f"{field(image, 'filepath', str, where)}/{name}"
        name = photo_name(name, where)
        if name in records:
            raise DatasetError(f"{where}: the photo {name} is there twice")
        part = part_name(field(image, "split", str, where), where)
        texts = [
            field(sentence, "raw", str, f"{where}, sentences[{number}]").strip()
            for number, sentence in enumerate(field(image, "sentences", list, where))
        ]
        records[name] = Record(name, tuple(texts), part)
    known = content.get("dataset")
    set_name = known if isinstance(known, str) and known else path.stem
    return CaptionFile(set_name, path, tuple(records.values()), (path.parent,), _FOLDERS)

"""Caption data sets as they are published or as people make them, read into photos with their captions.

Which format a file or folder is in is seen from its name and its beginning: `caption_train.flickr_sets`,
`caption_train.json_sets` and `caption_train.table_sets` read them, `caption_train.assembling` finds the photos and
splits them. `docs/data.md` describes the formats.
"""

from __future__ import annotations

import os
from pathlib import Path

from caption_rt._sniff import PHOTO_SUFFIXES
from caption_train.assembling import Choices, assemble
from caption_train.caption_text import read_text, text_lines
from caption_train.captioned import CaptionedImage, CaptionFile, Dataset
from caption_train.errors import DatasetError
from caption_train.flickr_sets import (
    FLICKR8K_CAPTIONS,
    FLICKR30K_CAPTIONS,
    is_results_line,
    is_token_line,
    read_results,
    read_tokens,
)
from caption_train.json_sets import COCO_CAPTIONS, read_coco_folder, read_json_set
from caption_train.table_sets import TABLES, read_table

__all__ = ["CaptionedImage", "Dataset", "load_dataset", "photos_in", "read_captions"]

_TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
_TEXT_SUFFIXES = (".txt", ".token")
_KNOWN = (
    f"a folder with {FLICKR8K_CAPTIONS}, {' or '.join(FLICKR30K_CAPTIONS)}, {COCO_CAPTIONS}, dataset_*.json or "
    "captions.csv, or such a file"
)


def load_dataset(
    path: Path,
    *,
    images: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    validation_share: float = 0.2,
    max_missing_share: float = 0.0,
    validation_limit: int | None = None,
    find_photos: bool = True,
) -> Dataset:
    """Read a data set in the format that its path shows.

    Args:
        path: A file of captions or the folder that it lies in; see `read_captions`.
        images: The folder of the photos; by default where the set usually has them.
        limit: As in `caption_train.assembling.Choices`.
        seed: As there.
        validation_share: As there.
        max_missing_share: As there.
        validation_limit: As there.
        find_photos: Whether the photos are looked for. If not, all are taken to be there, and their paths are those
            within the folder of photos, whose place nobody knows.

    Returns:
        The data set.

    Raises:
        DatasetError: The path is no data set, or what is there cannot be used; with file and line, or record.
        OptionsError: An argument is out of its range.
    """
    choices = Choices(limit, seed, validation_share, max_missing_share, validation_limit)
    return assemble(read_captions(path, find_photos=find_photos), images, choices, find_photos=find_photos)


def read_captions(path: Path, *, find_photos: bool = True) -> CaptionFile:
    """Read a file of captions, or the one that a folder holds; what it says, whether or not its photos are there.

    Args:
        path: A folder with one data set; or one of Flickr's token files, Flickr30k's ``results.csv``, MS-COCO's caption
            JSON, Karpathy's JSON, or a table (CSV, JSON lines) of photos and captions.
        find_photos: Whether one of MS-COCO's two files is left out where the photos of the other alone are there.

    Returns:
        What it says.

    Raises:
        DatasetError: It is not there, in no known format or malformed, or the folder holds several data sets.
    """
    if path.is_dir():
        return _read_folder(path, find_photos)
    if not path.exists():
        raise DatasetError(f"{path}: there is no such data set; give {_KNOWN}")
    suffix = path.suffix.lower()
    if suffix == ".json":
        return read_json_set(path)
    if suffix in (".jsonl", ".ndjson"):
        return read_table(path)
    if suffix not in (*_TABLE_SUFFIXES, *_TEXT_SUFFIXES):
        raise DatasetError(f"{path} is no data set; give {_KNOWN}")
    first = next((line for _, line in text_lines(read_text(path))), "")
    if is_token_line(first) or path.name in (FLICKR8K_CAPTIONS, FLICKR30K_CAPTIONS[0]):
        return read_tokens(path)
    if is_results_line(first):
        return read_results(path)
    return read_table(path)


def _read_folder(folder: Path, find_photos: bool) -> CaptionFile:
    """The data set of a folder that holds one."""
    coco = sorted([*folder.glob(COCO_CAPTIONS), *folder.glob(f"annotations/{COCO_CAPTIONS}")])
    others = [
        *(folder / name for name in (FLICKR8K_CAPTIONS, *FLICKR30K_CAPTIONS, *TABLES)),
        *sorted(folder.glob("dataset_*.json")),
    ]
    found = [path for path in others if path.is_file()] + coco[:1]
    if not found:
        raise DatasetError(f"{folder} holds no captions in a known format; give {_KNOWN}")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise DatasetError(f"{folder} holds several data sets ({names}); name the file of the one that is meant")
    return read_coco_folder(coco, find_photos=find_photos) if coco else read_captions(found[0])


def photos_in(folder: Path) -> tuple[Path, ...]:
    """List the photos of a folder and the folders within it, sorted by path; hidden files and folders are left out.

    Args:
        folder: Where to look. Links to folders are not followed.

    Returns:
        The files that have the ending of a photo, as `caption-rt` takes them; their content is not looked at.

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

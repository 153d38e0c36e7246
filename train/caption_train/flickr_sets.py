"""Flickr8k (Hodosh, Young and Hockenmaier 2013) and Flickr30k (Young et al. 2014), in the files they come in.

Captions stand in a token file, ``NAME.jpg#K<TAB>caption`` a line: ``Flickr8k.token.txt``,
``results_20130124.token``. Flickr30k is also passed on as ``results.csv``, ``image_name| comment_number| comment`` a
line. Flickr8k's split is three lists of file names beside its captions; Flickr30k has none of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from caption_train.caption_text import photo_name, read_text, records_of, text_lines
from caption_train.captioned import CaptionFile, Part
from caption_train.errors import DatasetError

FLICKR8K_CAPTIONS = "Flickr8k.token.txt"
FLICKR30K_CAPTIONS = ("results_20130124.token", "results.csv")
SPLIT_LISTS: dict[Part, str] = {
    "train": "Flickr_8k.trainImages.txt",
    "validation": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
_FLICKR8K_FOLDERS = ("images", "Flicker8k_Dataset", "Images")  # the second is the set's own spelling
_FLICKR30K_FOLDERS = ("images", "flickr30k-images", "flickr30k_images", ".")

_TOKEN_LINE = re.compile(r"(?P<name>.+)#(?P<number>\d+)\t(?P<caption>.*)")
# In the file that is passed on, one line lacks its second bar: "2199200615.jpg| 4   A dog runs across the grass ."
_RESULTS_LINE = re.compile(r"(?P<name>[^|]+)\|\s*(?P<number>\d+)(?:\s*\|\s*|\s{2,}|$)(?P<caption>.*)")
_RESULTS_HEADER = re.compile(r"\s*image_name\s*\|\s*comment_number\s*\|\s*comment\s*")


def is_token_line(line: str) -> bool:
    """Whether a line is one of a token file."""
    return _TOKEN_LINE.fullmatch(line) is not None


def is_results_line(line: str) -> bool:
    """Whether a line is the first of Flickr30k's results.csv."""
    return _RESULTS_HEADER.fullmatch(line) is not None or _RESULTS_LINE.fullmatch(line) is not None


def read_tokens(path: Path) -> CaptionFile:
    """Read a token file, and Flickr8k's lists where they lie beside it.

    With the lists, the training and dev parts are the set's own and photos in no list are left out. Without them, all
    photos (but those of the test list, should that be there) are to be drawn from.

    Args:
        path: The token file.

    Returns:
        What it says.

    Raises:
        DatasetError: A file is missing or malformed; with its line.
    """
    captions = _captions(path, _TOKEN_LINE, "NAME.jpg#K<TAB>caption")
    splits = _splits(path, captions)
    parts = {name: part for part, names in splits.items() for name in names}
    kept = {name: texts for name, texts in captions.items() if name in parts} if "train" in splits else captions
    thirty = path.name in FLICKR30K_CAPTIONS
    return CaptionFile(
        "flickr30k" if thirty else "flickr8k",
        path.parent,
        records_of(kept, parts),
        (path.parent,),
        _FLICKR30K_FOLDERS if thirty else _FLICKR8K_FOLDERS,
    )


def read_results(path: Path) -> CaptionFile:
    """Read Flickr30k's ``results.csv``, which has no split.

    Args:
        path: The file.

    Returns:
        What it says.

    Raises:
        DatasetError: The file is malformed; with its line.
    """
    captions = _captions(path, _RESULTS_LINE, "NAME.jpg| K| caption", header=_RESULTS_HEADER)
    return CaptionFile("flickr30k", path, records_of(captions), (path.parent,), _FLICKR30K_FOLDERS)


def _captions(
    path: Path, pattern: re.Pattern[str], shape: str, *, header: re.Pattern[str] | None = None
) -> dict[str, list[str]]:
    """File name -> captions, in the order of the lines."""
    captions: dict[str, list[str]] = {}
    seen: dict[tuple[str, int], int] = {}
    for number, line in text_lines(read_text(path)):
        where = f"{path}, line {number}"
        if header is not None and not seen and header.fullmatch(line):
            continue
        found = pattern.fullmatch(line)
        if found is None:
            raise DatasetError(f"{where}: expected {shape}, found {line[:60]!r}")
        name = photo_name(found["name"].strip(), where)
        key = name, int(found["number"][:9])
        if key in seen:
            raise DatasetError(f"{where}: caption {key[1]} of {name} is there twice, here and in line {seen[key]}")
        seen[key] = number
        captions.setdefault(name, []).append(found["caption"])
    return captions


def _splits(path: Path, captions: Mapping[str, Sequence[str]]) -> dict[Part, list[str]]:
    """Part -> file names, of the lists that are there; train and validation are there both or neither."""
    folder = path.parent
    splits: dict[Part, list[str]] = {}
    seen: dict[str, str] = {}
    for part, list_name in SPLIT_LISTS.items():
        listing = folder / list_name
        if not listing.exists():
            continue
        splits[part] = []
        for number, line in text_lines(read_text(listing)):
            name = line.strip()
            if name not in captions:
                raise DatasetError(f"{listing}, line {number}: {name} has no caption in {path.name}")
            if name in seen:
                raise DatasetError(f"{listing}, line {number}: {name} is listed twice, here and in {seen[name]}")
            seen[name] = list_name
            splits[part].append(name)
    if ("train" in splits) != ("validation" in splits):
        there: Part = "train" if "train" in splits else "validation"
        absent: Part = "validation" if "train" in splits else "train"
        raise DatasetError(
            f"{folder} has {SPLIT_LISTS[there]} but not {SPLIT_LISTS[absent]}; "
            "add it, or take the other away to have the photos split at random"
        )
    return splits

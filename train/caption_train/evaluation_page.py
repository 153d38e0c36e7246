"""The photos with the worst captions, as an HTML page in one file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from caption_rt.errors import ImageError, printable
from caption_rt.gallery import thumbnail_of
from caption_rt.image import open_photo
from caption_train.files import write_text

__all__ = ["Judged", "write_worst_page"]

WORST = 20

# The look of the runtime's gallery, and what this page has beside it.
_STYLE = resources.files("caption_rt").joinpath("gallery.css").read_text("utf-8") + (
    "header p { margin: 0; color: var(--soft); font-variant-numeric: tabular-nums; }\n"
    ".score { float: right; margin-left: .6rem; color: var(--soft); font-variant-numeric: tabular-nums; }\n"
    "ul { margin: .5rem 0 0; padding-left: 1.1rem; color: var(--soft); font-size: .9rem; }\n"
)
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()


@dataclass(frozen=True)
class Judged:
    """A photo with its captions and what they are worth."""

    path: Path
    """The photo."""
    caption: str
    """What the model said."""
    references: Sequence[str]
    """What people wrote."""
    cider: float
    """CIDEr-D of the caption, 0 to 10."""


def write_worst_page(path: Path, photos: Sequence[Judged], title: str, scores: Mapping[str, float]) -> None:
    """Write the worst twenty photos by CIDEr, the worst first, those of equal worth by name.

    Args:
        path: Where the page goes; one that is there is replaced.
        photos: All photos.
        title: What was evaluated.
        scores: Of all photos, by name.

    Raises:
        OSError: The file cannot be written.
    """
    worst = sorted(photos, key=lambda photo: (photo.cider, photo.path.name))[:WORST]
    numbers = " · ".join(f"{name} {value:.3f}" for name, value in scores.items())
    head = f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_escaped(title)}: the worst captions</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>{_escaped(title)}</h1>
<p>the {len(worst)} worst of {len(photos)} photos by CIDEr · all: {_escaped(numbers)}</p>
</header>
"""
    figures = "".join(map(_figure, worst))
    write_text(path, f"{head}{figures}</body>\n</html>\n")


def _figure(photo: Judged) -> str:
    try:
        data = base64.b64encode(thumbnail_of(open_photo(photo.path))).decode()
        picture = f'<img src="data:image/jpeg;base64,{data}" alt="{_escaped(photo.caption or "(no words)")}">'
    except ImageError:  # it was there when its grid was computed
        picture = ""
    real = "".join(f"<li>{_escaped(text)}</li>" for text in photo.references)
    return (
        f'<figure><div class="photo">{picture}</div><figcaption><span class="score">CIDEr {photo.cider:.3f}</span>'
        f'<p class="words" dir="auto">{_escaped(photo.caption or "(no words)")}</p><ul dir="auto">{real}</ul>'
        f'<p class="name"><bdi>{_escaped(photo.path.name)}</bdi></p></figcaption></figure>\n'
    )


def _escaped(text: object) -> str:
    """Text from outside, safe in HTML and in a quoted attribute, on one line."""
    return html.escape(printable(text))

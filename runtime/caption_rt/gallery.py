"""The HTML gallery: photos, captions, confidence, and where the model looked for the word under the pointer.

One file that needs nothing else and never touches the network: its content security policy allows this very script and
style, and pictures that stand in the file. The header opens the document, each record is one line, and HTML lets the
end of `body` and `html` go unwritten, so that a file may be appended to or cut at any line. Everything that comes from
outside is escaped.
"""

import base64
import hashlib
import html
import io
import math
from importlib import resources
from typing import TYPE_CHECKING

from caption_rt.errors import CaptionError, printable
from caption_rt.records import Record

if TYPE_CHECKING:
    from PIL import Image

    from caption_rt.caption import Caption

__all__ = ["HEADER", "confidence_of", "figure", "thumbnail_of"]

# On the long side: sharp on a card of a dense screen, and about 20 kB.
_THUMBNAIL_PIXELS = 448

_FAULTS = {
    "repetition": "repeats itself",
    "no_end": "cut before its end",
    "low_log_prob": "very unlikely words",
}


def _source(text: str) -> str:
    """What a content security policy calls a script or style by (CSP Level 3, section 2.3.1)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


_STYLE, _SCRIPT = (
    resources.files("caption_rt").joinpath(f"gallery.{kind}").read_text("utf-8") for kind in ("css", "js")
)

HEADER = f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src {_source(_STYLE)}; script-src {_source(_SCRIPT)}; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Captions</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Crect \
width='16' height='16' rx='4' fill='%23d99a00'/%3E%3Cpath d='M3 6h10M3 10h6' stroke='%23fff' stroke-width='2' \
stroke-linecap='round'/%3E%3C/svg%3E">
<style>{_STYLE}</style>
<script>{_SCRIPT}</script>
</head>
<body>
<header>
<h1>Captions</h1>
<output></output>
<form hidden>
<input type="search" placeholder="Search captions" aria-label="Search captions and names" autocomplete="off">
<select aria-label="Order" autocomplete="off"><option value="given">As captioned<option value="best">Most confident
<option value="worst">Least confident</select>
</form>
</header>
<details>
<summary>How to read this page</summary>
<p>Point at a word, tap it, or go to it with the keyboard (Tab from photo to photo, arrow keys from word to word): the
photo stays bright where the model looked for this word, and the percentage is the probability that the model gave it.
Each word is scaled by its own strongest place.</p>
<p>Confidence is the geometric mean of the probabilities of a caption's words. It tells photos apart on which the model
was more or less sure of its words; it is not the probability that the caption is right.</p>
</details>
""".encode()
"""The page as far as the first photo."""


def figure(record: Record) -> bytes:
    """A photo, as one line of HTML.

    Args:
        record: the record, with a thumbnail; one without has an empty frame.
    """
    name = f'<p class="name"><bdi>{_escaped(record.path)}</bdi></p>'
    result = record.result
    if isinstance(result, CaptionError):
        photo = _image(record.thumbnail, "")
        text = f'<p class="note">{_escaped(result)}</p>'
        return _line(f'<figure class="bad">{photo}<figcaption>{text}{name}</figcaption></figure>')
    if not result.words:
        text = '<p class="note">(no words)</p>'
    else:
        sure = confidence_of(result)
        bar = f'<progress value="{sure:.4f}" aria-hidden="true"></progress>'
        text = f'{_words(result)}<p class="sure"><span>Confidence {100 * sure:.0f}%</span>{bar}</p>'
    notes = ", ".join(_FAULTS.get(fault, fault) for fault in result.faults)
    note = f'<p class="note">Doubtful: {_escaped(notes)}</p>' if notes else ""
    photo = _image(record.thumbnail, result.text or "(no words)")
    return _line(f"<figure>{photo}<figcaption>{text}{note}{name}</figcaption></figure>")


def confidence_of(caption: "Caption") -> float:
    """The geometric mean of the probabilities of a caption's words, 0 to 1; 0 where it has none.

    A mean, because the probability of the whole gets smaller with every word; of the words alone, because a caption
    that was cut has no end token.
    """
    if not caption.word_log_probs:
        return 0.0
    return math.exp(math.fsum(caption.word_log_probs) / len(caption.word_log_probs))


def thumbnail_of(photo: "Image.Image") -> bytes:
    """A small copy of a photo for `Record.thumbnail`.

    Args:
        photo: RGB, upright. It is not changed.

    Returns:
        A JPEG file without metadata, of the photo's aspect ratio, at most 448 pixels on the long side.
    """
    from PIL import Image  # the page itself needs no imaging

    scale = min(1.0, _THUMBNAIL_PIXELS / max(photo.size))
    size = max(1, round(photo.width * scale)), max(1, round(photo.height * scale))
    buffer = io.BytesIO()
    small = photo.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
    small.save(buffer, "JPEG", quality=76, optimize=True)
    return buffer.getvalue()


def _words(caption: "Caption") -> str:
    """The words of a caption, each with its attention: 0 to 255 a place of the grid, in base64."""
    _, rows, columns = caption.attention.shape
    words = []
    for index, word in enumerate(caption.words):
        grid = caption.attention[index]
        strongest = float(grid.max())
        look = (grid * (255 / strongest if strongest > 0 else 0)).round().clip(0, 255).astype("uint8").tobytes()
        words.append(
            f'<span role="button" tabindex="{-1 if index else 0}" '
            f'data-sure="{100 * math.exp(caption.word_log_probs[index]):.0f}" '
            f'data-look="{base64.b64encode(look).decode()}">{_escaped(word)}</span>'
        )
    return (
        f'<p class="words" dir="auto" role="toolbar" aria-label="Words of the caption" data-grid="{rows}x{columns}">'
        f"{' '.join(words)}</p>"
    )


def _image(thumbnail: bytes | None, text: str) -> str:
    if thumbnail is None:
        return '<div class="photo"></div>'
    data = base64.b64encode(thumbnail).decode()
    return (
        f'<div class="photo"><img src="data:image/jpeg;base64,{data}" alt="{_escaped(text)}" loading="lazy" '
        f'decoding="async"></div>'
    )


def _line(markup: str) -> bytes:
    return markup.encode() + b"\n"


def _escaped(text: object) -> str:
    """Text from outside, safe in HTML and in a quoted attribute, on one line."""
    return html.escape(printable(text))

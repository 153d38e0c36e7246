"""The bundle's own check: small images, and the captions that TensorFlow gives them.

The images are drawn here by arithmetic, so that the bundle holds nobody's photo, with edges, colours and areas for a
network to see. They go through the same reading and resizing as photos.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from caption_export.parity import LOG_PROB_TOLERANCE, Photo
from caption_export.pipelines import Pipeline, best_captions
from caption_rt.image import read_photo
from caption_rt.options import DecodeOptions
from caption_rt.vocabulary import Vocabulary

_SIDE = 64


def selftest_pngs() -> dict[str, bytes]:
    """The images of the self-test as PNG files, by name; the same bytes at each call."""
    return {name: _png(pixels) for name, pixels in {"field": _field(), "tiles": _tiles()}.items()}


def selftest_photos(pngs: Mapping[str, bytes], size: int) -> list[Photo]:
    """The images as the extractor takes them.

    Args:
        pngs: Name to PNG.
        size: S of the extractor, in pixels.
    """
    return [Photo(f"self-test image {name}", read_photo(png, size)) for name, png in pngs.items()]


def selftest_json(
    reference: Pipeline, pngs: Mapping[str, bytes], size: int, max_words: int, vocabulary: Vocabulary
) -> dict[str, Any]:
    """The object of ``selftest.json``: images, and what TensorFlow makes of them by greedy search.

    Args:
        reference: The networks in TensorFlow.
        pngs: Name to PNG.
        size: S of the extractor, in pixels.
        max_words: Captions are cut after so many words.
        vocabulary: For the special ids.
    """
    options = DecodeOptions(max_words=max_words)
    images = np.stack([photo.pixels for photo in selftest_photos(pngs, size)])
    captions = best_captions(reference, images, options, vocabulary)
    return {
        "inputs": [{"name": name, "png_base64": base64.b64encode(png).decode()} for name, png in pngs.items()],
        "expected": [
            {
                "token_ids": list(caption.tokens),
                "log_prob": round(caption.log_prob, 6),
                "word_log_probs": [round(value, 6) for value in caption.log_probs],
            }
            for caption in captions
        ],
        "options": {
            "beam_size": options.beam_size,
            "length_penalty": options.length_penalty,
            "max_words": options.max_words,
        },
        "tolerance": {"log_prob": LOG_PROB_TOLERANCE},
    }


def _field() -> NDArray[np.uint8]:
    """A green field under a blue sky with a brown shape on it, uint8 [64, 48, 3]: not square, as photos are."""
    y, x = np.mgrid[:_SIDE, :48]
    pixels = np.where((y < 24)[..., None], [90, 150, 230], [60, 140, 50])
    pixels = pixels + ((x * 5 + y * 3) % 16)[..., None]  # so that no area is entirely flat
    body = ((x - 24) / 14) ** 2 + ((y - 38) / 9) ** 2 < 1
    head = (x - 37) ** 2 + (y - 29) ** 2 < 30
    legs = (y >= 40) & (y < 54) & ((abs(x - 16) < 2) | (abs(x - 31) < 2))
    pixels[body | head | legs] = [120, 80, 40]
    field: NDArray[np.uint8] = pixels.astype(np.uint8)
    return field


def _tiles() -> NDArray[np.uint8]:
    """Coloured stripes and tiles of several sizes, uint8 [64, 64, 3]."""
    y, x = np.mgrid[:_SIDE, :_SIDE]
    pixels = np.stack([(x // 8 + y // 8) % 2 * 200 + 30, (x // 4) % 2 * 120 + y * 2, 255 - x * 3], axis=-1)
    tiles: NDArray[np.uint8] = np.clip(pixels, 0, 255).astype(np.uint8)
    return tiles


def _png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return file.getvalue()

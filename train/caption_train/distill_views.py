"""What student and teacher look at: views of photos, each the same for both, and what the teacher says about them."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import keras
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from caption_rt.bundle import Bundle
from caption_rt.engine import Engine
from caption_rt.image import READING, open_photo, read_photo
from caption_train.cache import ABSENT, Extract, GridCache
from caption_train.errors import TrainingError
from caption_train.inception import ExtractorConfig, build_extractor, extract_with, load_extractor_weights
from caption_train.precision import dtype_of_products

logger = logging.getLogger(__name__)

WHOLE = 0
"""The view that is the whole photo as it is; those that are learnt from are numbered from 1."""

_CROP_AREA = (0.25, 1.0)
_CROP_ASPECT = (3 / 4, 4 / 3)
_MIXED = 0.3  # of the views have a second photo in them
_SECOND = (0.1, 0.5)  # its share
_COLOUR = (0.6, 1.4)
_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@dataclass(frozen=True)
class Views:
    """One view of each photo, and what the teacher says about it."""

    number: int
    """Which view, as `read_view` numbers them."""
    paths: tuple[Path, ...]
    """The photos that can be read."""
    rows: NDArray[np.int64]
    """The rows of the teacher's grids in the cache, int64 [len(paths)]."""
    cache: GridCache
    """Where the grids are."""


def read_view(path: Path, size: int, number: int, others: Sequence[Path] = ()) -> NDArray[np.uint8]:
    """Read one view of a photo: the same whoever asks, at the size that is asked for.

    A view is a crop in another light and other colours, and three in ten have a second photo shining through (Zhang et
    al. 2018, "mixup: Beyond Empirical Risk Minimization"). All of it is drawn by the photo's content and the number.

    Args:
        path: The photo.
        size: Height and width of the view, in pixels.
        number: `WHOLE`, or any other number.
        others: The photos of which one may shine through.

    Returns:
        uint8 [size, size, 3] RGB.

    Raises:
        ImageError: The photo, or the second one, cannot be read.
    """
    if number == WHOLE:
        return read_photo(path, size)
    photo = open_photo(path)
    rng = np.random.default_rng([number, *hashlib.sha256(photo.tobytes()).digest()[:8]])
    view = _crop(photo, size, rng)
    if others and rng.random() < _MIXED:
        share, second = rng.uniform(*_SECOND), others[int(rng.integers(len(others)))]
        view = Image.blend(view, _crop(open_photo(second), size, rng), share)
    for enhancer in _ENHANCERS:
        view = enhancer(view).enhance(rng.uniform(*_COLOUR))
    return np.asarray(view)


def _crop(photo: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A part of a photo, of a random size and shape, squeezed into a square as whole photos are."""
    area = photo.width * photo.height * rng.uniform(*_CROP_AREA)
    aspect = math.exp(rng.uniform(math.log(_CROP_ASPECT[0]), math.log(_CROP_ASPECT[1])))
    width = min(photo.width, max(1, round(math.sqrt(area * aspect))))
    height = min(photo.height, max(1, round(math.sqrt(area / aspect))))
    left, top = (int(rng.integers(0, room + 1)) for room in (photo.width - width, photo.height - height))
    return photo.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))


class Teacher:
    """The large extractor, and what it has said.

    A view's grids are kept as long as they are learnt from: 164 kB a photo at 8 x 8 places of 1,280 channels.
    """

    def __init__(
        self,
        extract: Extract,
        grid_shape: tuple[int, int, int],
        facts: Mapping[str, Any],
        computes_in: str,
        cache_folder: Path,
    ) -> None:
        """Take an extractor as a function; callers use `of_network` or `of_bundle`.

        Args:
            extract: Photos uint8 [n, S, S, 3] to grids float32 [n, P, C].
            grid_shape: Rows, columns and channels of its grid.
            facts: Its ``width``, ``size``, ``layer``, and the ``sha256`` of its weights, by `weights_key`.
            computes_in: The precision, which its grids depend on in their last digits.
            cache_folder: Where its grids are kept.
        """
        self.grid_shape, self.facts = grid_shape, dict(facts)
        self._extract, self._computes_in, self._folder = extract, computes_in, cache_folder

    @classmethod
    def of_network(cls, config: ExtractorConfig, weights: str, cache_folder: Path) -> Self:
        """An extractor in TensorFlow, in bfloat16 where this machine is faster then.

        Args:
            config: Width, size and block.
            weights: As `caption_train.inception.load_extractor_weights` takes them.
            cache_folder: Where its grids are kept.

        Raises:
            TrainingError: The weights cannot be had.
        """
        extractor = build_extractor(config)
        key = load_extractor_weights(extractor, weights)
        compute_in_bfloat16(extractor)
        rows, columns, channels = extractor.output_shape[1:]
        facts = {**asdict(config), "weights": Path(weights).name, "sha256": key}
        computes_in = dtype_of_products("auto").name
        return cls(extract_with(extractor), (rows, columns, channels), facts, computes_in, cache_folder)

    @classmethod
    def of_bundle(cls, path: Path, cache_folder: Path) -> Self:
        """The extractor of a bundle in ONNX Runtime, in the bundle's best precision for this machine.

        Args:
            path: A bundle that `caption-export` made.
            cache_folder: Where its grids are kept.

        Raises:
            BundleError: It cannot be opened.
            EngineError: ONNX Runtime cannot load it.
            TrainingError: It does not say what its extractor is.
        """
        bundle = Bundle.open(path)
        facts = bundle.manifest.training.get("extractor")
        if not isinstance(facts, dict) or "sha256" not in facts:
            raise TrainingError(f"{path} does not say what its extractor is: export it anew with caption-export")
        engine, grid = Engine(bundle), bundle.manifest.grid

        def extract(photos: NDArray[np.uint8]) -> NDArray[np.float32]:
            grids = engine.extract(photos)
            return grids if isinstance(grids, np.ndarray) else grids.numpy()

        kept = {name: facts[name] for name in ("width", "size", "layer", "weights", "sha256")}
        shape = (grid.rows, grid.columns, grid.channels)
        return cls(extract, shape, kept, f"{engine.precision} of {bundle.sha256}", cache_folder)

    def look(self, photos: Sequence[Path], number: int) -> Views:
        """Compute, or find in the cache, what it says about one view of every photo, of which any may shine through.

        Raises:
            TrainingError: The cache cannot be written.
        """
        rows, columns, channels = self.grid_shape
        cache = GridCache.open(self._folder, self._key(photos, number), (rows * columns, channels))
        read = partial(read_view, size=self.facts["size"], number=number, others=photos)
        found = cache.fill(photos, self._extract, read=read)
        readable = [int(i) for i in np.flatnonzero(found != ABSENT)]
        return Views(number, tuple(photos[i] for i in readable), found[readable], cache)

    def forget(self, photos: Sequence[Path], number: int) -> None:
        """Delete what it said about one view of these photos, if that is there, because it is not learnt from any more.

        Raises:
            TrainingError: It cannot be deleted.
        """
        GridCache.delete(self._folder, self._key(photos, number))

    def _key(self, photos: Sequence[Path], number: int) -> str:
        key = f"{json.dumps(self.facts, sort_keys=True)} {self._computes_in} reading {READING} view {number}"
        if number == WHOLE:
            return key
        names = hashlib.sha256("\n".join(path.name for path in photos).encode()).hexdigest()
        return f"{key} among {names}"


def compute_in_bfloat16(model: keras.Model) -> None:
    """Have all layers but the last, which gives float32, compute in bfloat16 where this machine is faster then."""
    if dtype_of_products("auto").name == "bfloat16":
        for layer in model.layers[:-1]:
            layer.dtype_policy = keras.DTypePolicy("mixed_bfloat16")

"""Grids of real (very small) extractors: what keys a cache, and an extraction that a real kill ends."""

import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from caption_rt.image import READING
from caption_train.captioned import CaptionedImage
from caption_train.inception import ExtractorConfig, build_extractor, save_extractor
from caption_train.runs import grids_of, open_cache
from shapes import shape_photo

pytestmark = pytest.mark.tf

TINY = ExtractorConfig(0.1, 75, "mixed0")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[CaptionedImage]:
    folder = tmp_path_factory.mktemp("photos")
    found = []
    for i in range(150):
        photo, caption = shape_photo(i)
        pixels = np.asarray(photo).copy()
        pixels[0, 0] = i  # shapes come again, photos do not
        path = folder / f"{i:03}.png"
        Image.fromarray(pixels).save(path)
        found.append(CaptionedImage(path, (caption,)))
    return found


def test_weights_layer_size_and_the_way_of_reading_are_the_key(
    tmp_path: Path, images: list[CaptionedImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    keras.utils.set_random_seed(0)
    first = build_extractor(TINY)
    keys = {open_cache(tmp_path, first, TINY).folder}
    rows = grids_of(open_cache(tmp_path, first, TINY), first, TINY, images[:4])
    with monkeypatch.context() as patch:
        patch.setattr("caption_train.runs.READING", READING + 1)
        keys.add(open_cache(tmp_path, first, TINY).folder)
    for config in (replace(TINY, layer="mixed1"), replace(TINY, size=96)):
        keys.add(open_cache(tmp_path, build_extractor(config), config).folder)
    changed = first.get_layer("conv_3")
    weights = changed.get_weights()
    weights[0][0, 0, 0, 0] += 1e-6
    changed.set_weights(weights)
    after = open_cache(tmp_path, first, TINY)
    keys.add(after.folder)
    assert len(keys) == 5
    assert (after.rows([image.path for image in images[:4]]) == -1).all()
    assert rows.tolist() == [0, 1, 2, 3]


CHILD = """
import sys, time
from pathlib import Path
from caption_train import cache
from caption_train.captioned import CaptionedImage
from caption_train.inception import load_extractor
from caption_train.runs import grids_of, open_cache

folder, photos = map(Path, sys.argv[1:])
extractor, config = load_extractor(folder / "extractor")
images = [CaptionedImage(path, ("a",)) for path in sorted(photos.iterdir())]
write_at = cache._write_at
cache._write_at = lambda *arguments: (time.sleep(0.1), write_at(*arguments))  # time enough to be killed in
grids_of(open_cache(folder / "cache", extractor, config), extractor, config, images)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="SIGKILL is of Unix")
def test_a_killed_extraction_goes_on_to_the_same_grids(tmp_path: Path, images: list[CaptionedImage]) -> None:
    extractor = build_extractor(TINY)
    save_extractor(extractor, TINY, tmp_path / "extractor")
    cache = open_cache(tmp_path / "cache", extractor, TINY)
    index = cache.folder / "index.jsonl"
    arguments = [sys.executable, "-c", textwrap.dedent(CHILD), str(tmp_path), str(images[0].path.parent)]
    with subprocess.Popen(arguments, stderr=subprocess.DEVNULL) as child:
        deadline = time.monotonic() + 120
        while not (index.exists() and index.stat().st_size):
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        child.kill()
    kept = len(open_cache(tmp_path / "cache", extractor, TINY))
    assert 0 < kept < len(images)
    rows = grids_of(cache, extractor, TINY, images)
    assert sorted(rows.tolist()) == list(range(len(images)))
    whole = open_cache(tmp_path / "unbroken", extractor, TINY)
    other = grids_of(whole, extractor, TINY, images)
    # Batches fall otherwise, and the network's sums with them.
    np.testing.assert_allclose(cache.gather(rows), whole.gather(other), rtol=2e-3, atol=1e-3)

"""The malformed photos: each gives pixels or one sentence, whatever is wrong, and none takes the reader down."""

import io
import json
import struct
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from caption_rt._containers import take_apart
from caption_rt.image import read_photo
from runtime.make_malformed_images import NOT_PHOTOS, make

# Reads in a process of its own, where a crash shows as its exit code and what libraries print shows as well.
READER = """
import json, logging, sys, time, warnings
from caption_rt.errors import ImageError
from caption_rt.image import read_photo

logging.lastResort = None
found = []
with warnings.catch_warnings(record=True, action="always") as leaked:
    for path in json.load(sys.stdin):
        start = time.perf_counter()
        try:
            pixels = read_photo(path, 75)
            result = [str(pixels.dtype), list(pixels.shape)]
        except ImageError as exc:
            result = str(exc)
        found.append([path, result, time.perf_counter() - start])
# Not ru_maxrss, which a child inherits from the process that forked it.
peak = next((int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM')), 0)
print(json.dumps({"found": found, "warnings": [str(w.message) for w in leaked], "peak_kb": peak}))
"""


def read_all(paths, timeout):
    """Read files in another process; path -> pixels' type and shape, or the error's text."""
    done = subprocess.run(
        [sys.executable, "-c", READER],
        input=json.dumps([str(path) for path in paths]),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)
    assert said["warnings"] == []
    assert [path for path, _, _ in said["found"]] == [str(path) for path in paths]
    assert {path: seconds for path, _, seconds in said["found"] if seconds > 10} == {}
    return {path: result for path, result, _ in said["found"]}, said["peak_kb"]


def check(results):
    for path, result in results.items():
        if isinstance(result, str):
            assert result.startswith(f"{path} "), result
            assert result.isprintable(), path
            assert len(result) < len(path) + 300, path
        else:
            assert result == ["uint8", [75, 75, 3]], path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make(tmp_path_factory.mktemp("malformed"))


@pytest.fixture(scope="module")
def results(corpus):
    return read_all(corpus, timeout=120)


def test_each_gives_pixels_or_one_sentence_with_its_name(corpus, results):
    check(results[0])
    assert len(results[0]) == len(corpus) > 500
    errors = sum(isinstance(result, str) for result in results[0].values())
    assert 200 < errors < len(corpus) - 100


def test_memory_stays_small_before_files_that_state_huge_sizes(results):
    assert results[1] < 600 * 1024


def test_what_stands_in_a_file_many_times_takes_no_more_than_the_file(photos):
    """Memory in take_apart; and where each would cost a copy of the file, this test does not end."""
    jpeg, png, gif = photos[0].read_bytes(), made("PNG"), made("GIF")
    palette = 13 + (3 << (gif[10] & 7) + 1)
    chunks = png.index(b"IDAT") - 4
    empty = {name: struct.pack(">I4sI", 0, name, zlib.crc32(name)) for name in (b"IDAT", b"tEXt")}
    for kind, data, at, unit in (
        ("JPEG", jpeg, 2, b"\xff"),
        ("JPEG", jpeg[:2], 2, b"\xff"),
        ("JPEG", jpeg, 2, b"\xff\xfe\0\2\xff"),  # a comment and a fill byte
        ("JPEG", jpeg, 2, b"\xff\xe1\0\x09Exif\0\0a"),
        ("PNG", png, chunks, empty[b"IDAT"]),
        ("PNG", png, chunks, empty[b"tEXt"] + empty[b"IDAT"]),
        ("GIF", gif, palette, b"!\xf9\4\x1c\0\0\0\0"),
    ):
        size = 2**20 if kind == "GIF" else 2**17
        hostile = data[:at] + unit * (size // len(unit)) + data[at:]
        tracemalloc.start()
        taken = take_apart(kind, hostile)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2.5 * len(hostile), (kind, unit)
        if len(data) > 2:
            assert np.array_equal(read_photo(hostile, 75), read_photo(data, 75))
        if kind == "GIF":
            assert taken.data.count(b"!\xf9\4\0\0\0\0\0") == hostile.count(unit)


def made(kind):
    """A picture in a format of Pillow."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 30, 40)).save(file, kind)
    return file.getvalue()


def test_every_cut_file_that_is_refused_says_that_it_is_cut_short(results):
    refused = {path: text for path, text in results[0].items() if "/cut-" in path and isinstance(text, str)}
    short = [path for path, text in refused.items() if "is cut short: " in text]
    assert len(short) / len(refused) > 0.85  # of the others too little is left to tell a photo


def test_every_bomb_is_called_one(results):
    bombs = {path: text for path, text in results[0].items() if "/bomb-p" in path or "/bomb-g" in path}
    stated = [text for path, text in bombs.items() if not path.endswith((".avif", ".heic"))]
    assert len(stated) >= 5
    assert all("is a decompression bomb" in text for text in stated)


def test_what_is_no_photo_is_called_so(results):
    for path, text in results[0].items():
        if path.rpartition("/")[2] in NOT_PHOTOS:
            assert "named like a photo and holds" in text or "is not an image" in text, path


def test_broken_metadata_and_wrong_names_cost_no_photo(results):
    kept = {path: result for path, result in results[0].items() if "/metadata-" in path or "/named-" in path}
    assert len(kept) > 30
    assert {path for path, result in kept.items() if isinstance(result, str)} == set()


def test_the_corpus_is_the_same_on_every_run(corpus, tmp_path):
    again = make(tmp_path / "again")
    assert [path.name for path in again] == [path.name for path in corpus]
    differing = [
        path.name for path, other in zip(corpus, again, strict=True) if path.read_bytes() != other.read_bytes()
    ]
    assert [name for name in differing if not name.endswith((".avif", ".heic"))] == []


@pytest.mark.slow
def test_many_more_give_pixels_or_one_sentence(tmp_path):
    results, _ = read_all(make(tmp_path / "thorough", thorough=True), timeout=1200)
    check(results)

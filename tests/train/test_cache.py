import errno
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from caption_rt.image import read_photo
from caption_train.cache import GridCache
from caption_train.errors import TrainingError

SIZE = 8
SHAPE = (4, 3)


def read(path: Path) -> NDArray[np.uint8]:
    return read_photo(path, SIZE)


def extract(photos: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The mean colour of each quarter, on a scale that float16 has to round."""
    quarters = photos.astype(np.float32).reshape(-1, 2, SIZE // 2, 2, SIZE // 2, 3)
    return quarters.mean(axis=(2, 4)).reshape(-1, *SHAPE) / 7


def expected(paths: list[Path]) -> NDArray[np.float16]:
    return extract(np.stack([read(path) for path in paths])).astype(np.float16)


class Counting:
    """The extractor, with the number of photos of each call."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, photos: NDArray[np.uint8]) -> NDArray[np.float32]:
        assert photos.dtype == np.uint8
        assert photos.shape[1:] == (SIZE, SIZE, 3)
        self.calls.append(len(photos))
        return extract(photos)


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (10, 12, 16, 3), dtype=np.uint8)
    paths = [folder / f"{i}.png" for i in range(len(pixels))]
    for path, array in zip(paths, pixels, strict=True):
        Image.fromarray(array).save(path)
    return paths


def open_cache(tmp_path: Path, key: str = "key", shard_rows: int = 4) -> GridCache:
    return GridCache.open(tmp_path / "cache", key, SHAPE, shard_rows=shard_rows)


def test_grids_come_back_as_float16(tmp_path: Path, photos: list[Path]) -> None:
    cache = open_cache(tmp_path)
    rows = cache.fill(photos, extract, read=read, batch_size=3)
    assert rows.dtype == np.int64
    assert rows.tolist() == list(range(10))
    grids = cache.gather(rows)
    assert grids.dtype == np.float16
    np.testing.assert_array_equal(grids, expected(photos))
    order = np.array([9, 0, 4, 4, 7, 3])
    np.testing.assert_array_equal(cache.gather(order), expected([photos[i] for i in order]))
    assert cache.gather(np.array([], np.int64)).shape == (0, *SHAPE)


def test_few_files_of_the_documented_layout(tmp_path: Path, photos: list[Path]) -> None:
    cache = open_cache(tmp_path)
    cache.fill(photos, extract, read=read)
    sizes = {path.name: path.stat().st_size for path in cache.folder.glob("shard-*")}
    row = 4 * 3 * 2
    assert sizes == {"shard-00000.f16": 4 * row, "shard-00001.f16": 4 * row, "shard-00002.f16": 2 * row}
    facts = json.loads((cache.folder / "key.json").read_text(encoding="utf-8"))
    assert facts == {"format_version": 1, "key": "key", "grid_shape": [4, 3], "dtype": "float16", "shard_rows": 4}
    assert len((cache.folder / "index.jsonl").read_text(encoding="utf-8").splitlines()) == 10


def test_half_of_the_tutorials_space(tmp_path: Path, photos: list[Path]) -> None:
    """The tutorial keeps InceptionV3's 8 x 8 x 2048 as float32, 512 KiB a photo."""
    cache = GridCache.open(tmp_path / "cache", "key", (64, 2048))
    cache.fill(photos, lambda images: np.ones((len(images), 64, 2048), np.float32), read=read)
    whole = sum(path.stat().st_size for path in cache.folder.iterdir())
    assert whole / len(photos) == pytest.approx(256 * 1024, rel=1e-3)


def test_writing_goes_on_while_the_network_works(tmp_path: Path, photos: list[Path]) -> None:
    """The second batch is computed before the first has reached the disk, and an error of the first still comes up."""
    cache = open_cache(tmp_path)
    second, store = threading.Event(), cache._store

    def late(*arguments: Any) -> int:
        assert second.wait(60)
        return store(*arguments)

    def extract_seen(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        if len(calls) == 1:
            second.set()
        calls.append(len(images))
        return extract(images)

    calls: list[int] = []
    cache._store = late  # type: ignore[method-assign]
    rows = cache.fill(photos, extract_seen, read=read, batch_size=5)
    assert calls == [5, 5]
    np.testing.assert_array_equal(cache.gather(rows), expected(photos))


def test_only_what_is_missing_is_computed(tmp_path: Path, photos: list[Path]) -> None:
    counting = Counting()
    first = open_cache(tmp_path).fill(photos[:6], counting, read=read, batch_size=4)
    assert counting.calls == [4, 2]
    again = open_cache(tmp_path)
    assert len(again) == 6
    assert again.rows(photos).tolist() == [0, 1, 2, 3, 4, 5, -1, -1, -1, -1]
    rows = again.fill([photos[8], *photos[:6], photos[7]], counting, read=read, batch_size=4)
    assert counting.calls == [4, 2, 2]
    assert rows.tolist() == [6, *first, 7]
    np.testing.assert_array_equal(again.gather(rows[[0, 7]]), expected([photos[8], photos[7]]))
    again.fill(photos[:9], counting, read=read, batch_size=4)
    assert counting.calls == [4, 2, 2, 1]


def test_a_photo_is_known_by_its_content(tmp_path: Path, photos: list[Path]) -> None:
    cache, counting = open_cache(tmp_path), Counting()
    before = cache.fill(photos[:2], counting, read=read)
    moved = photos[0].rename(photos[0].with_name("moved.png"))
    twin = Path(shutil.copy(moved, photos[0].with_name("twin.png")))
    shutil.copy(photos[5], photos[1])  # another photo under the old name
    rows = cache.fill([moved, twin, photos[1], photos[5]], counting, read=read)
    assert counting.calls == [2, 1]
    assert rows.tolist() == [before[0], before[0], 2, 2]
    np.testing.assert_array_equal(cache.gather(rows), expected([moved, moved, photos[5], photos[5]]))


def test_another_key_sees_nothing(tmp_path: Path, photos: list[Path]) -> None:
    open_cache(tmp_path).fill(photos, extract, read=read)
    other = open_cache(tmp_path, key="other weights")
    assert len(other) == 0
    assert (other.rows(photos) == -1).all()
    assert len(open_cache(tmp_path)) == 10


def test_a_cache_keeps_its_own_shard_size(tmp_path: Path, photos: list[Path]) -> None:
    open_cache(tmp_path, shard_rows=4).fill(photos[:6], extract, read=read)
    cache = open_cache(tmp_path, shard_rows=100)
    assert cache.shard_rows == 4
    np.testing.assert_array_equal(cache.gather(cache.fill(photos, extract, read=read)), expected(photos))


def test_a_cache_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    with pytest.raises(TrainingError, match="another key, shape or format; delete that folder") as caught:
        GridCache.open(tmp_path / "cache", "key", (4, 5))
    assert caught.value.exit_code == 7
    (cache.folder / "key.json").write_text("{", encoding="utf-8")
    with pytest.raises(TrainingError, match=r"key.json is damaged; delete that folder"):
        open_cache(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="cannot be used: Not a directory"):
        GridCache.open(tmp_path / "file", "key", SHAPE)


def test_unreadable_photos_are_left_out_and_named(
    tmp_path: Path, photos: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    photos[2].write_bytes(photos[2].read_bytes()[:60])
    paths = [photos[0], photos[1].with_name("nowhere.png"), photos[2], photos[3]]
    cache, counting = open_cache(tmp_path), Counting()
    with caplog.at_level(logging.WARNING):
        rows = cache.fill(paths, counting, read=read, batch_size=2)
    assert rows.tolist() == [0, -1, -1, 1]
    assert counting.calls == [2]
    assert "nowhere.png" in caplog.text
    assert "2.png" in caplog.text
    assert "2 of 4 photos could not be read" in caplog.text
    np.testing.assert_array_equal(cache.gather(rows[[0, 3]]), expected([photos[0], photos[3]]))


@pytest.mark.parametrize("value", [7e4, -1e30, np.nan])
def test_values_beyond_float16_are_an_error(tmp_path: Path, photos: list[Path], value: float) -> None:
    def overflowing(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        grids = extract(images)
        if len(grids) == 2:
            grids[1, 3, 2] = value
        return grids

    cache = open_cache(tmp_path)
    with pytest.raises(TrainingError, match=r"4.png reach (70000|1e\+30|nan), and float16 ends at 65504"):
        cache.fill(photos[:5], overflowing, read=read, batch_size=3)
    assert len(open_cache(tmp_path)) == 3  # the batch before is kept
    largest = cache.fill(photos[3:5], lambda images: np.full((2, *SHAPE), 65504, np.float32), read=read)
    assert (cache.gather(largest) == 65504).all()


def test_grids_of_another_shape_are_an_error(tmp_path: Path, photos: list[Path]) -> None:
    with pytest.raises(TrainingError, match=r"shape \(10, 3, 4\), the cache holds \(10, 4, 3\)"):
        open_cache(tmp_path).fill(photos, lambda images: extract(images).reshape(-1, 3, 4), read=read)


@pytest.mark.parametrize("row", [-1, 10])
def test_a_row_that_is_not_there(tmp_path: Path, photos: list[Path], row: int) -> None:
    cache = open_cache(tmp_path)
    cache.fill(photos, extract, read=read)
    with pytest.raises(IndexError, match="not all among the cache's 10"):
        cache.gather(np.array([0, row]))


def test_too_small_a_disk_is_seen_beforehand(
    tmp_path: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10 * 24 - 1))
    with pytest.raises(TrainingError, match=r"features of 10 photos take 0.0 GB and .* make room"):
        cache.fill(photos, extract, read=read)
    assert [path.name for path in cache.folder.glob("shard-*")] == []
    assert cache.fill(photos[:9], extract, read=read).tolist() == list(range(9))


def test_a_disk_that_fills_up_leaves_a_usable_cache(
    tmp_path: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(tmp_path)
    cache.fill(photos[:3], extract, read=read)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(TrainingError, match="cannot be written: No space left on device"):
            cache.fill(photos, extract, read=read)
    for usable in (cache, open_cache(tmp_path)):
        assert len(usable) == 3
    np.testing.assert_array_equal(cache.gather(cache.fill(photos, extract, read=read)), expected(photos))


@pytest.mark.skipif(sys.platform == "win32", reason="the lock is of Unix")
def test_one_process_fills_at_a_time(tmp_path: Path, photos: list[Path]) -> None:
    def fill_again(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with pytest.raises(TrainingError, match="another process is filling the cache"):
            open_cache(tmp_path).fill(photos, extract, read=read)
        assert early.fill(photos[3::-1], extract, read=read).tolist() == [3, 2, 1, 0]  # which are all there
        return extract(images)

    cache, early, late = open_cache(tmp_path), open_cache(tmp_path), open_cache(tmp_path)
    cache.fill(photos[:4], extract, read=read)
    cache.fill(photos, fill_again, read=read)
    counting = Counting()
    late.fill(photos, counting, read=read)  # opened while the cache was empty, and sees what came since
    assert counting.calls == []


def test_a_cache_that_cannot_be_written_gives_what_it_has(tmp_path: Path, photos: list[Path]) -> None:
    cache = open_cache(tmp_path)
    cache.fill(photos[:4], extract, read=read)
    (cache.folder / "lock").unlink()
    (cache.folder / "lock").mkdir()  # stands for any trouble of the disk
    assert open_cache(tmp_path).fill(photos[:4], extract, read=read).tolist() == [0, 1, 2, 3]
    with pytest.raises(TrainingError, match="cannot be written: Is a directory"):
        open_cache(tmp_path).fill(photos, extract, read=read)


def test_a_torn_index_line_does_not_count(tmp_path: Path, photos: list[Path]) -> None:
    cache = open_cache(tmp_path)
    cache.fill(photos[:6], extract, read=read)
    index = cache.folder / "index.jsonl"
    for cut in (1, 30):
        index.write_bytes(index.read_bytes()[:-cut])
        again, counting = open_cache(tmp_path), Counting()
        assert len(again) == 5
        rows = again.fill(photos[:6], counting, read=read)
        assert counting.calls == [1]
        np.testing.assert_array_equal(open_cache(tmp_path).gather(rows), expected(photos[:6]))


def test_rows_whose_data_is_gone_do_not_count(tmp_path: Path, photos: list[Path]) -> None:
    cache = open_cache(tmp_path)
    cache.fill(photos, extract, read=read)
    shard = cache.folder / "shard-00001.f16"
    shard.write_bytes(shard.read_bytes()[:-5])
    again, counting = open_cache(tmp_path), Counting()
    assert len(again) == 7
    np.testing.assert_array_equal(again.gather(again.fill(photos, counting, read=read)), expected(photos))
    assert counting.calls == [3]


CHILD = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
from caption_rt.image import read_photo
from caption_train import cache as cache_module

folder, kill_at = Path(sys.argv[1]), int(sys.argv[2])
written = 0

def kill_self(write):
    def wrapped(path, offset, data):
        global written
        written += 1
        if written == kill_at:  # half of the data is on the disk when the process dies
            write(path, offset, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, offset, data)
    return wrapped

def extract(photos):
    if kill_at == 0:
        time.sleep(0.02)
    quarters = photos.astype(np.float32).reshape(-1, 2, 4, 2, 4, 3)
    return quarters.mean(axis=(2, 4)).reshape(-1, 4, 3) / 7

cache_module._write_at = kill_self(cache_module._write_at)
cache = cache_module.GridCache.open(folder / "cache", "key", (4, 3), shard_rows=4)
paths = sorted((folder / "photos").iterdir())
cache.fill(paths, extract, read=lambda path: read_photo(path, 8), batch_size=3 if kill_at else 1)
"""


def start_child(folder: Path, kill_at: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(CHILD), str(folder), str(kill_at)])


needs_sigkill = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="SIGKILL is of Unix")


@needs_sigkill
@pytest.mark.parametrize(("kill_at", "kept"), [(1, 0), (2, 1), (3, 3), (4, 3), (5, 4)])
def test_killed_in_the_middle_of_any_write(tmp_path: Path, photos: list[Path], kill_at: int, kept: int) -> None:
    # Batches of 3 in shards of 4: the writes are shard 0, index, shard 0, shard 1, index, ...
    child = start_child(tmp_path, kill_at)
    assert child.wait(60) == -signal.SIGKILL
    cache, counting = open_cache(tmp_path), Counting()
    assert len(cache) == kept
    rows = cache.fill(photos, counting, read=read, batch_size=3)
    assert sum(counting.calls) == 10 - kept
    np.testing.assert_array_equal(cache.gather(rows), expected(photos))
    unbroken = GridCache.open(tmp_path / "unbroken", "key", SHAPE, shard_rows=4)
    unbroken.fill(photos, extract, read=read, batch_size=3)
    for path in unbroken.folder.iterdir():
        assert (cache.folder / path.name).read_bytes() == path.read_bytes()


@needs_sigkill
def test_killed_from_outside_and_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    paths = [folder / f"{i:03d}.png" for i in range(200)]
    for i, path in enumerate(paths):
        Image.new("RGB", (SIZE, SIZE), (i, 255 - i, i // 2)).save(path)
    index = open_cache(tmp_path).folder / "index.jsonl"
    child = start_child(tmp_path, 0)
    deadline = time.monotonic() + 60
    while not (index.exists() and index.read_bytes().count(b"\n") >= 20) and time.monotonic() < deadline:
        time.sleep(0.005)
    child.kill()
    assert child.wait(60) == -signal.SIGKILL
    cache, counting = open_cache(tmp_path), Counting()
    kept = len(cache)
    assert 20 <= kept < 200
    rows = cache.fill(paths, counting, read=read)
    assert sum(counting.calls) == 200 - kept
    np.testing.assert_array_equal(cache.gather(rows), expected(paths))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_progress_bar_on_a_terminal_only(
    tmp_path: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    open_cache(tmp_path).fill(photos[:3], extract, read=read)
    assert capfd.readouterr() == ("", "")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    open_cache(tmp_path).fill(photos[:5], extract, read=read, progress=False)
    assert terminal.getvalue() == ""
    open_cache(tmp_path).fill(photos, extract, read=read)
    assert "features" in terminal.getvalue()
    assert "5/5" in terminal.getvalue()

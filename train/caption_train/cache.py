"""The extractor's grids on disk, so that a photo goes through the large network once however long training takes.

A cache is a folder with one folder for each key (which extractor, which layer, which preprocessing), and in that:

- `key.json`: the key and the shape of a row;
- `shard-00000.f16`, ...: the rows, float16 little-endian [rows, P, C] without a header, `shard_rows` to a file;
- `index.jsonl`: one line a row, in order: the SHA-256 of the photo's bytes whose grid the row is.

A photo is known by its content and not by its name, so a photo that was changed or replaced is computed again, and one
that was moved is not. A row counts from the moment its line stands in the index; that line is written after the row has
reached the disk. What a killed process leaves behind a last whole line is written over by the next one.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import click
import numpy as np
from numpy.typing import NDArray

from caption_rt.errors import ImageError
from caption_rt.threads import usable_cpus
from caption_train.errors import TrainingError
from caption_train.files import one_process, write_json

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
ABSENT = -1
"""The row of a photo that is not in the cache."""
ROW_DTYPE = np.dtype("<f2")

Extract = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""Photos uint8 [n, S, S, 3] to grids float32 [n, P, C]."""
ReadPhoto = Callable[[Path], NDArray[np.uint8]]
"""A photo file to uint8 [S, S, 3]; raises ImageError where it cannot."""


class GridCache:
    """Grids float16 [P, C] of photos, addressed by row; see the module's docstring for the files.

    Reading is safe from several threads and processes at a time; of filling processes there can be one a key.
    """

    def __init__(self, folder: Path, grid_shape: tuple[int, int], shard_rows: int) -> None:
        """Takes over a folder that `open` has prepared; callers use `open`."""
        self.folder = folder
        """The key's own folder."""
        self.grid_shape = grid_shape
        """Places P and channels C of a row."""
        self.shard_rows = shard_rows
        """Rows of a full shard file."""
        self._rows: dict[str, int] = {}
        self._index_bytes = 0
        self._shards: dict[int, NDArray[np.float16]] = {}
        self._lock = threading.Lock()
        self._read_index()

    @classmethod
    def open(cls, folder: Path, key: str, grid_shape: tuple[int, int], *, shard_rows: int = 1024) -> Self:
        """Opens the cache of one key, and creates it where there is none.

        Args:
            folder: The cache folder, which may hold caches of other keys too.
            key: All that decides a photo's grid besides its content: the extractor's weights, the layer, the image
                size and the way it is read. Another key never sees this one's rows.
            grid_shape: Places P and channels C of one grid.
            shard_rows: Rows of a shard file in a new cache; an existing cache keeps its own number.

        Returns:
            The cache, with the rows that earlier runs have completed.

        Raises:
            TrainingError: The folder cannot be written, or what it holds under this key has another shape or format.
        """
        own = cls._own(folder, key)
        facts = {
            "format_version": FORMAT_VERSION,
            "key": key,
            "grid_shape": list(grid_shape),
            "dtype": "float16",
            "shard_rows": shard_rows,
        }
        try:
            facts_path = own / "key.json"
            if facts_path.exists():
                found = json.loads(facts_path.read_text(encoding="utf-8"))
            else:
                write_json(facts_path, facts)
                found = facts
            shard_rows = found["shard_rows"]
            if found != facts | {"shard_rows": shard_rows}:
                raise TrainingError(f"{own} holds a cache of another key, shape or format; delete that folder")
            return cls(own, grid_shape, shard_rows)
        except OSError as exc:
            raise TrainingError(f"the cache folder {own} cannot be used: {exc.strerror or exc}") from exc
        except (ValueError, KeyError, TypeError) as exc:
            raise TrainingError(f"{own / 'key.json'} is damaged; delete that folder") from exc

    @classmethod
    def delete(cls, folder: Path, key: str) -> None:
        """Deletes the cache of one key, where there is one.

        Args:
            folder: As for `open`.
            key: As for `open`.

        Raises:
            TrainingError: It cannot be deleted.
        """
        own = cls._own(folder, key)
        try:
            if own.exists():
                shutil.rmtree(own)
        except OSError as exc:
            raise TrainingError(f"the cache folder {own} cannot be deleted: {exc.strerror or exc}") from exc

    @staticmethod
    def _own(folder: Path, key: str) -> Path:
        """A key's own folder."""
        return folder / hashlib.sha256(key.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        """How many photos are in the cache."""
        return len(self._rows)

    def rows(self, paths: Sequence[Path]) -> NDArray[np.int64]:
        """Looks photos up by their content, which is read for it.

        Args:
            paths: Photo files.

        Returns:
            Their rows, int64 [len(paths)]; -1 where the cache does not have the photo or the file cannot be read.
        """
        return self._lookup(_hash_files(paths))

    def gather(self, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        """Reads grids.

        Args:
            rows: Rows as `fill` and `rows` give them, int64 [n].

        Returns:
            The grids, float16 [n, P, C], a copy in memory.

        Raises:
            IndexError: A row is not in the cache; -1 is not either.
        """
        rows = np.asarray(rows, np.int64)
        if rows.size and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} are not all among the cache's {len(self)}")
        grids = np.empty((len(rows), *self.grid_shape), ROW_DTYPE)
        shards = rows // self.shard_rows
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            offsets = rows[here] % self.shard_rows
            grids[here] = self._shard(int(shard), int(offsets.max()) + 1)[offsets]
        return grids

    def fill(
        self,
        paths: Sequence[Path],
        extract: Extract,
        *,
        read: ReadPhoto,
        batch_size: int = 32,
        progress: bool = True,
    ) -> NDArray[np.int64]:
        """Computes and keeps the grids of those photos that the cache does not have.

        Every finished batch is kept, whatever ends the call: the next call goes on from there.

        Args:
            paths: Photo files; the same photo may be there more than once.
            extract: The network, called from this thread with photos uint8 [n, S, S, 3], 1 <= n <= batch_size;
                returns their grids float32 [n, P, C].
            read: Reads one photo as uint8 [S, S, 3], such as `caption_rt.image.read_photo` with its size given; called
                from several threads. Of several ways to read, each needs a key of its own.
            batch_size: Photos a call of `extract`.
            progress: Show a progress bar on stderr, if that is a terminal.

        Returns:
            The photos' rows, int64 [len(paths)]; -1 for a photo that cannot be read, which is logged.

        Raises:
            TrainingError: A photo is not there yet, and the disk is too small, full or read-only, another process fills
                this cache, or a grid has another shape than the cache's or values that float16 cannot hold.
        """
        digests = _hash_files(paths)
        photos = {digest: path for digest, path in zip(digests, paths, strict=True) if digest is not None}
        self._read_index()  # what others have written since
        if not photos.keys() <= self._rows.keys():
            with self._only_writer():
                wanted = {digest: path for digest, path in photos.items() if digest not in self._rows}
                self._check_free_space(len(wanted))
                logger.info("extracting the features of %d photos; %d are in the cache", len(wanted), len(self))
                self._extract_all(wanted, extract, read, batch_size, progress=progress)
        rows = self._lookup(digests)
        unread = int(np.count_nonzero(rows == ABSENT))
        if unread:
            logger.warning("%d of %d photos could not be read and are left out", unread, len(paths))
        return rows

    def _lookup(self, digests: Sequence[str | None]) -> NDArray[np.int64]:
        return np.array([ABSENT if d is None else self._rows.get(d, ABSENT) for d in digests], np.int64)

    def _extract_all(
        self, wanted: dict[str, Path], extract: Extract, read: ReadPhoto, batch_size: int, *, progress: bool
    ) -> None:
        """Photos (content hash -> file) through the network and to the disk, batch by batch.

        Photos are read ahead, and a batch is written while the network has the next one: whatever ends the loop, the
        writer finishes what it was given.
        """
        digests: list[str] = []
        photos: list[NDArray[np.uint8]] = []
        writing: list[Future[int]] = []  # one batch at most
        with (
            _progress_bar(len(wanted), shown=progress) as advance,
            contextlib.closing(_read_ahead(wanted, read, window=2 * batch_size)) as ahead,
            ThreadPoolExecutor(1) as writer,
        ):

            def finish_writing() -> None:
                while writing:
                    advance(writing.pop().result())

            def finish_batch() -> None:
                grids = extract(np.stack(photos))
                finish_writing()
                writing.append(writer.submit(self._store, tuple(digests), grids, [wanted[d] for d in digests]))
                digests.clear()
                photos.clear()

            for digest, photo in ahead:
                if photo is None:
                    advance(1)
                    continue
                digests.append(digest)
                photos.append(photo)
                if len(photos) == batch_size:
                    finish_batch()
            if photos:
                finish_batch()
            finish_writing()

    def _store(self, digests: Sequence[str], grids: NDArray[np.float32], paths: Sequence[Path]) -> int:
        """Keep a batch; how many photos that are."""
        self._append(digests, self._to_float16(grids, paths))
        return len(digests)

    def _to_float16(self, grids: NDArray[np.float32], paths: Sequence[Path]) -> NDArray[np.float16]:
        expected = (len(paths), *self.grid_shape)
        if grids.shape != expected:
            raise TrainingError(f"the extractor gave an array of shape {grids.shape}, the cache holds {expected}")
        with np.errstate(over="ignore"):  # looked for below, with the photo's name
            rows = np.asarray(grids).astype(ROW_DTYPE)
        finite = np.isfinite(rows).all(axis=(1, 2))
        if not finite.all():
            bad = int(np.argmin(finite))
            raise TrainingError(
                f"the features of {paths[bad]} reach {np.abs(grids[bad]).max():g}, and float16 ends at 65504; "
                "these weights do not serve as an extractor"
            )
        return rows

    def _append(self, digests: Sequence[str], grids: NDArray[np.float16]) -> None:
        """Writes rows behind the last one: first the data, then the index that makes them count."""
        first = len(self)
        try:
            for shard in range(first // self.shard_rows, (first + len(digests) - 1) // self.shard_rows + 1):
                start = max(first, shard * self.shard_rows)
                stop = min(first + len(digests), (shard + 1) * self.shard_rows)
                offset = (start - shard * self.shard_rows) * self._row_bytes
                _write_at(self._shard_path(shard), offset, grids[start - first : stop - first].tobytes())
            lines = "".join(f'{{"row": {first + i}, "sha256": "{digest}"}}\n' for i, digest in enumerate(digests))
            _write_at(self._index_path, self._index_bytes, lines.encode())
        except OSError as exc:
            raise TrainingError(f"the cache {self.folder} cannot be written: {exc.strerror or exc}") from exc
        self._index_bytes += len(lines)
        self._rows.update((digest, first + i) for i, digest in enumerate(digests))

    def _read_index(self) -> None:
        """Reads the rows that count: whole lines in order whose data is there, up to the first that is not so."""
        content = self._index_path.read_bytes() if self._index_path.exists() else b""
        capacity = self._rows_on_disk()
        rows: dict[str, int] = {}
        length = 0
        for line in content.splitlines(keepends=True):
            digest = _digest_of(line, len(rows))
            if digest is None or digest in rows or len(rows) >= capacity:
                logger.warning("%s: from row %d on it was not finished; that is computed again", self.folder, len(rows))
                break
            rows[digest] = len(rows)
            length += len(line)
        self._rows, self._index_bytes = rows, length

    def _rows_on_disk(self) -> int:
        """How many rows the shards hold from the first on without a gap."""
        rows = shard = 0
        while (path := self._shard_path(shard)).exists():
            held = min(path.stat().st_size // self._row_bytes, self.shard_rows)
            rows += held
            if held < self.shard_rows:
                break
            shard += 1
        return rows

    @contextlib.contextmanager
    def _only_writer(self) -> Iterator[None]:
        """Holds the right to write, which ends with the process, and sees what others wrote before."""
        busy = TrainingError(f"another process is filling the cache {self.folder}; wait for it")
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(one_process(self.folder / "lock", busy))
                self._read_index()
            except OSError as exc:
                raise TrainingError(f"the cache {self.folder} cannot be written: {exc.strerror or exc}") from exc
            yield

    def _check_free_space(self, rows: int) -> None:
        needed, free = rows * self._row_bytes, shutil.disk_usage(self.folder).free
        if needed > free:
            raise TrainingError(
                f"the features of {rows:,} photos take {needed / 1e9:,.1f} GB and {self.folder} has "
                f"{free / 1e9:,.1f} GB free; make room, choose another cache folder or take fewer photos"
            )

    def _shard(self, shard: int, rows: int) -> NDArray[np.float16]:
        """A shard's rows as a map of its file, at least `rows` of them."""
        with self._lock:
            known = self._shards.get(shard)
            if known is None or len(known) < rows:
                held = min(self.shard_rows, len(self) - shard * self.shard_rows)
                known = np.memmap(self._shard_path(shard), ROW_DTYPE, "r", shape=(held, *self.grid_shape))
                self._shards[shard] = known
            return known

    def _shard_path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.f16"

    @property
    def _index_path(self) -> Path:
        return self.folder / "index.jsonl"

    @property
    def _row_bytes(self) -> int:
        return self.grid_shape[0] * self.grid_shape[1] * ROW_DTYPE.itemsize


def _write_at(path: Path, offset: int, data: bytes) -> None:
    """Puts data at an offset, cuts off what was behind it, and waits until the disk has it.

    Written as a file and not through a memory map: a full disk is an OSError here and a bus error there.
    """
    with path.open("r+b" if path.exists() else "wb") as file:
        file.truncate(offset)
        file.seek(offset)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _digest_of(line: bytes, row: int) -> str | None:
    """The content hash that an index line gives for a row; None where it is not that row's whole line."""
    try:
        record: Any = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    if not isinstance(record, dict) or record.get("row") != row:
        return None
    digest = record.get("sha256")
    return digest if isinstance(digest, str) else None


def _hash_files(paths: Sequence[Path]) -> list[str | None]:
    """SHA-256 of each file's bytes, hexadecimal; None, and a warning, where a file cannot be read."""

    def hash_file(path: Path) -> str | None:
        try:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as exc:
            logger.warning("%s cannot be read: %s", path, exc.strerror or exc)
            return None

    with ThreadPoolExecutor(_reader_threads()) as pool:
        return list(pool.map(hash_file, paths))


def _read_ahead(
    wanted: dict[str, Path], read: ReadPhoto, *, window: int
) -> Generator[tuple[str, NDArray[np.uint8] | None]]:
    """Photos in order, of which up to `window` are decoded ahead of the caller; None for an unreadable one."""
    waiting: deque[tuple[str, Future[NDArray[np.uint8]]]] = deque()
    todo = iter(wanted.items())
    pool = ThreadPoolExecutor(_reader_threads())
    try:
        while True:
            while len(waiting) < window and (item := next(todo, None)) is not None:
                waiting.append((item[0], pool.submit(read, item[1])))
            if not waiting:
                return
            digest, future = waiting.popleft()
            try:
                photo = future.result()
            except ImageError as exc:
                logger.warning("%s", exc)
                yield digest, None
            else:
                yield digest, photo
    finally:
        pool.shutdown(cancel_futures=True)


def _reader_threads() -> int:
    return min(32, usable_cpus())


@contextlib.contextmanager
def _progress_bar(length: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, where that is a terminal; yields what moves it on by a number of photos."""
    if not (shown and sys.stderr.isatty()):
        yield lambda count: None
        return
    with click.progressbar(length=length, label="features", show_pos=True, file=sys.stderr) as bar:
        yield bar.update

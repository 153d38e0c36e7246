"""A run over many photos: read ahead in threads, captioned in batches, written in order."""

import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import PIL

from caption_rt.errors import OptionsError, Parameter
from caption_rt.image import FORMATS, PhotoLimits
from caption_rt.options import DecodeOptions
from caption_rt.outputs import Entry, Output, RunKey
from caption_rt.pipeline import Feed, Stage
from caption_rt.reading import Done, Job, Photo, PhotoReader, Read
from caption_rt.records import Record
from caption_rt.sources import Source
from caption_rt.threads import usable_cpus

if TYPE_CHECKING:
    from caption_rt.captioner import Captioner

__all__ = ["BatchSettings", "Finished", "caption_sources", "run_key"]

# A record's format: a change makes all photos new.
_RECORD_VERSION = 2
# A batch that consists of bad photos is written once there are so many times as many as it would have good ones.
_MOST_ENTRIES = 4
# How often it is asked whether the run is to be stopped.
_PATIENCE_S = 0.1


@dataclass(frozen=True)
class BatchSettings:
    """How a run goes about its work. It changes speed and memory, and no caption.

    Raises:
        OptionsError: a value below 1.
    """

    batch_size: int = 16
    """Photos that go through the network together."""
    workers: int = 1
    """Batches that are in the network at once."""
    readers: int = 0
    """Threads that read photos; 0 for as many as the process may use processors, and one more."""
    thumbnails: bool = False
    """Make thumbnails."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, least in (("batch_size", 1), ("workers", 1), ("readers", 0)):
            if getattr(self, name) < least:
                raise OptionsError(Parameter(name), f" must be at least {least}, not {getattr(self, name)}")


Finished = Done | Entry
"""A photo that is through: written by this run, or done before."""


def run_key(bundle_key: str, precision: str, options: DecodeOptions, limits: PhotoLimits) -> RunKey:
    """What the records of a run depend on beyond the photos' content.

    Args:
        bundle_key: `Captioner.key`.
        precision: `Captioner.precision`.
        options: how captions are decoded.
        limits: the largest photos that are read.
    """
    caption = {
        "records": _RECORD_VERSION,
        "bundle": bundle_key,
        "precision": precision,
        "options": dataclasses.asdict(options),
    }
    readable = [PIL.__version__, *FORMATS, _has_heif()]
    return RunKey(_hash(caption), _hash({**caption, "limits": dataclasses.asdict(limits), "readable": readable}))


def caption_sources(
    sources: Iterable[Source],
    captioner: "Captioner",
    options: DecodeOptions,
    output: Output,
    settings: BatchSettings,
    *,
    names: Mapping[str, str] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Finished]:
    """Caption photos, and write what comes of them to an output.

    Photos are found in a thread of their own. Records are written in order, in the caller's thread, as soon as their
    batch is captioned, whatever the next photos take to be found and read; a bad one costs its own record. Batches
    are formed of the photos that are to be captioned, one after the other, and written whole: a run that is taken up
    has the same batches as one that was never ended, and therefore the same log-probabilities to the last digit.

    Args:
        sources: what to caption; there may be any number.
        captioner: the model.
        options: how to decode.
        output: where records go. It is not finished here, because more may follow.
        settings: batch size and threads.
        names: what errors call our parameters; see `CaptionError.renamed`.
        stopped: asked between steps; once it says so, the batches in the network are written, and that is all.

    Yields:
        Every photo as it is through; those of a batch when they are on the disk.

    Raises:
        EngineError: ONNX Runtime fails; all batches before are written.
        CaptionError: the output cannot be written.
    """
    run = _Run(captioner, options, output, settings, names or {}, stopped)
    yield from run.go_through(sources)


class _Run:
    """One run: what is read, what waits for the network, and what is in it.

    The caller's thread goes round: it writes what is captioned, puts together what is read, has read what is found.
    None of these waits for the others, so that a photo that is slow to come (from the web, or because a list on
    standard input is just being made) delays nothing that is finished. Where nothing moves it waits for the bell.
    """

    def __init__(
        self,
        captioner: "Captioner",
        options: DecodeOptions,
        output: Output,
        settings: BatchSettings,
        names: Mapping[str, str],
        stopped: Callable[[], bool],
    ) -> None:
        self._output = output
        self._size = settings.batch_size
        self._stopped = stopped
        self._bell = threading.Event()
        readers = settings.readers or usable_cpus() + 1
        self._window = settings.batch_size + 2 * readers
        reader = PhotoReader(
            captioner.bundle.manifest.image.size, captioner.limits, thumbnails=settings.thumbnails, names=names
        )
        self._reading = Stage[Job, Read](reader, self._bell, threads=readers, window=self._window)
        self._captioning = Stage[list[Entry | Photo], list[Entry]](
            lambda batch: _captioned(batch, captioner, options),
            self._bell,
            threads=settings.workers,
            window=settings.workers + 1,
        )
        self._batch: list[Entry | Photo] = []
        self._photos = 0
        self._moved = False

    def go_through(self, sources: Iterable[Source]) -> Iterator[Finished]:
        with self._captioning, self._reading, Feed(sources, self._bell, room=self._window) as feed:
            while not (feed.ended and self._reading.is_empty and not self._batch):
                self._bell.clear()
                self._moved = False
                self._find(feed)
                yield from self._put_together(feed)
                if self._captioning.is_ready:
                    self._moved = True
                    yield from self._output.write(self._captioning.take())
                if self._stopped():
                    break
                if not self._moved:
                    self._bell.wait(_PATIENCE_S)
            while not self._captioning.is_empty:
                yield from self._output.write(self._captioning.take())
            if feed.error is not None and not self._stopped():
                raise feed.error

    def _find(self, feed: Feed[Source]) -> None:
        """Have photos read as far as there is room."""
        while self._reading.has_room and not self._stopped() and (source := feed.take()) is not None:
            self._reading.put(Job(source, self._output.known(source)))
            self._moved = True

    def _put_together(self, feed: Feed[Source]) -> list[Done]:
        """Make batches of what is read, as far as the network has room; the photos with which nothing is to be done."""
        done: list[Done] = []
        while self._captioning.has_room:
            if self._is_full or (self._batch and feed.ended and self._reading.is_empty and not self._stopped()):
                self._captioning.put(self._batch)
                self._moved = True
                self._batch, self._photos = [], 0
            elif self._reading.is_ready and not self._stopped():
                result = self._reading.take()
                self._moved = True
                if isinstance(result, Done):
                    done.append(result)
                    if len(done) >= self._size:
                        break
                else:
                    self._batch.append(result)
                    self._photos += isinstance(result, Photo)
            else:
                break
        return done

    @property
    def _is_full(self) -> bool:
        return self._photos == self._size or len(self._batch) == _MOST_ENTRIES * self._size


def _captioned(batch: list[Entry | Photo], captioner: "Captioner", options: DecodeOptions) -> list[Entry]:
    photos = [item for item in batch if isinstance(item, Photo)]
    captions = iter(
        captioner.caption_pixels([photo.pixels for photo in photos], options, read_s=[photo.read_s for photo in photos])
    )
    return [
        Entry(item.source, item.digest, Record(item.source.path, next(captions), item.thumbnail))
        if isinstance(item, Photo)
        else item
        for item in batch
    ]


def _hash(values: dict[str, object]) -> bytes:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).digest()


def _has_heif() -> str:
    from importlib import metadata  # only runs with a ledger ask

    try:
        return metadata.version("pillow-heif")
    except metadata.PackageNotFoundError:
        return ""

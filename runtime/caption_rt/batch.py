"""A run over many photos: read ahead in threads, captioned in batches, written in order."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import PIL

from caption_rt.errors import OptionsError
from caption_rt.image import FORMATS, PhotoLimits
from caption_rt.options import DecodeOptions
from caption_rt.outputs import Entry, Output, RunKey
from caption_rt.pipeline import ahead
from caption_rt.reading import Done, Job, Photo, PhotoReader, Read
from caption_rt.records import Record
from caption_rt.sources import Source
from caption_rt.threads import usable_cpus

if TYPE_CHECKING:
    from caption_rt.captioner import Captioner

__all__ = ["BatchSettings", "Finished", "caption_sources", "run_key"]

# A record's format: a change makes all photos new.
_RECORD_VERSION = 1
# A batch that consists of bad photos is written once there are so many times as many as it would have good ones.
_MOST_ENTRIES = 4


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
                raise OptionsError(f"{name} must be at least {least}, not {getattr(self, name)}")


Finished = Done | Entry
"""A photo that is through: written by this run, or done before."""


def run_key(bundle_key: str, options: DecodeOptions, limits: PhotoLimits) -> RunKey:
    """What the records of a run depend on beyond the photos' content.

    Args:
        bundle_key: `Captioner.key`.
        options: how captions are decoded.
        limits: the largest photos that are read.
    """
    caption = {"records": _RECORD_VERSION, "bundle": bundle_key, "options": dataclasses.asdict(options)}
    readable = [PIL.__version__, *FORMATS, _has_heif()]
    return RunKey(_hash(caption), _hash({**caption, "limits": dataclasses.asdict(limits), "readable": readable}))


def caption_sources(
    sources: Iterable[Source],
    captioner: "Captioner",
    options: DecodeOptions,
    output: Output,
    settings: BatchSettings,
    *,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Finished]:
    """Caption photos, and write what comes of them to an output.

    Photos are taken, and records written, in order, in the caller's thread; a bad one costs its own record. Batches
    are formed of the photos that are to be captioned, one after the other, and written whole: a run that is taken up
    has the same batches as one that was never ended, and therefore the same log-probabilities to the last digit.

    Args:
        sources: what to caption; there may be any number.
        captioner: the model.
        options: how to decode.
        output: where records go. It is not finished here, because more may follow.
        settings: batch size and threads.
        stopped: asked between steps; once it says so, the batches in the network are written, and that is all.

    Yields:
        Every photo as it is through; those of a batch when they are on the disk.

    Raises:
        EngineError: ONNX Runtime fails; all batches before are written.
        CaptionError: the output cannot be written.
    """
    done: list[Done] = []

    def jobs() -> Iterator[Job]:
        for source in sources:
            if stopped():
                return
            yield Job(source, output.known(source))

    def caption(batch: list[Entry | Photo]) -> list[Entry]:
        return _captioned(batch, captioner, options)

    reader = PhotoReader(captioner.bundle.manifest.image.size, captioner.limits, settings.thumbnails)
    readers = settings.readers or usable_cpus() + 1
    results = ahead(reader, jobs(), threads=readers, window=settings.batch_size + 2 * readers)
    assert isinstance(results, Generator)  # and can be closed
    batches = _batches(results, settings.batch_size, done, stopped)
    for entries in ahead(caption, batches, threads=settings.workers, window=settings.workers + 1):
        yield from output.write(entries)
        yield from done
        done.clear()
    yield from done


def _batches(
    results: Generator[Read], batch_size: int, done: list[Done], stopped: Callable[[], bool]
) -> Iterator[list[Entry | Photo]]:
    """What is read, in batches for the network; photos that are done go into `done`."""
    batch: list[Entry | Photo] = []
    photos = 0
    with contextlib.closing(results):
        for result in results:
            if stopped():
                return
            if isinstance(result, Done):
                done.append(result)
                # An empty batch brings them to the caller.
                if len(done) >= batch_size:
                    yield []
                continue
            batch.append(result)
            photos += isinstance(result, Photo)
            if photos == batch_size or len(batch) == _MOST_ENTRIES * batch_size:
                yield batch
                batch, photos = [], 0
    if batch and not stopped():
        yield batch


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

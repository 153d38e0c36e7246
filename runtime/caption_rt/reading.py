"""Reading photos ahead, in threads: bytes, their hash, and pixels where the network is to have them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from caption_rt.errors import ImageError, Parameter
from caption_rt.image import PhotoLimits, open_photo, read_file, to_pixels
from caption_rt.outputs import Entry, Known, digest_of
from caption_rt.records import Record
from caption_rt.sources import Source

__all__ = ["Done", "Job", "Photo", "PhotoReader", "Read", "read_bytes"]


@dataclass(frozen=True)
class Job:
    """A photo to read, and what its output has of it."""

    source: Source
    known: Known | None


@dataclass(frozen=True)
class Done:
    """A photo for which nothing is left to do."""

    source: Source
    error: str | None
    """The error that stands in its record; see `caption_rt.outputs.Entry.error`."""
    left: bool
    """What is there is not ours and was left alone."""


@dataclass(frozen=True)
class Photo:
    """A photo for the network."""

    source: Source
    digest: bytes
    """The hash of its bytes."""
    pixels: NDArray[np.uint8]
    """uint8 [S, S, 3]."""
    read_s: float
    """How long reading took, in seconds."""
    thumbnail: bytes | None
    """A small copy as a JPEG file, where it was asked for."""


Read: TypeAlias = Done | Photo | Entry
"""What comes of a job; an entry where the photo cannot be read."""


@dataclass(frozen=True)
class PhotoReader:
    """Reads photos; may be called in several threads at once."""

    size: int
    """Pixels on each side of what the network takes."""
    limits: PhotoLimits
    """The largest photos that are read."""
    thumbnails: bool = False
    """Make a thumbnail of each."""
    names: Mapping[str, str] = field(default_factory=dict)
    """What errors call our parameters; see `CaptionError.renamed`."""

    def __call__(self, job: Job) -> Read:
        """Read a photo; whatever is wrong with it becomes an entry."""
        source, known = job.source, job.known
        if known is not None and known.unread:
            return Done(source, known.error, known.left)
        start = perf_counter()
        digest = None
        try:
            data = read_bytes(source, self.limits)
            digest = digest_of(data)
            if known is not None and digest == known.digest:
                return self._done(source, known, digest)
            if known is not None and known.left:
                return Done(source, None, left=True)
            return self._photo(source, data, digest, start)
        except ImageError as exc:
            entry = Entry(source, digest, Record(source.path, exc.renamed(self.names)))
            if digest is None and known is not None and known.digest is None and known.error == entry.error:
                return Done(source, known.error, left=False)
            return entry

    def _done(self, source: Source, known: Known, digest: bytes) -> Read:
        error = known.restore() if known.restore is not None else None
        if error is not None:
            return Entry(source, digest, Record(source.path, error))
        return Done(source, known.error, left=False)

    def _photo(self, source: Source, data: bytes, digest: bytes, start: float) -> Photo:
        image = open_photo(data, limits=self.limits, name=source.name)
        pixels = to_pixels(image, self.size)
        read_s = perf_counter() - start
        thumbnail = None
        if self.thumbnails:
            from caption_rt.gallery import thumbnail_of  # with the gallery's page

            thumbnail = thumbnail_of(image)
        return Photo(source, digest, pixels, read_s, thumbnail)


def read_bytes(source: Source, limits: PhotoLimits) -> bytes:
    """The bytes of a photo: from its file, the web, or standard input.

    Raises:
        ImageError: they cannot be had.
    """
    if source.error is not None:
        raise source.error
    if source.data is not None:
        return source.data
    if source.is_address:
        from caption_rt.fetch import fetch_photo  # with the standard library's network

        return fetch_photo(source.path, max_bytes=limits.max_bytes)
    try:
        return read_file(source.path, limits)
    except MemoryError as exc:
        raise ImageError(
            f"{source.name} needs more memory than there is: lower ",
            Parameter("max_bytes"),
            reason="needs more memory than there is",
        ) from exc

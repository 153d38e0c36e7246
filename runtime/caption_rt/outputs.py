"""Where records go: what every kind of output has in common, and the one that only passes them on."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from caption_rt.errors import CaptionError
from caption_rt.records import Record, error_fields
from caption_rt.sources import Source

__all__ = ["EXISTING", "Entry", "Known", "Output", "RunKey", "StreamOutput", "digest_of"]

EXISTING = ("resume", "skip", "append", "overwrite")
"""What happens where there is an output already; see `FileOutput` and `SidecarOutput`."""


@dataclass(frozen=True)
class RunKey:
    """What records depend on beyond the photo's content, as hashes."""

    caption: bytes
    """Of captions: the bundle, the options of decoding, and the format of records."""
    error: bytes
    """Of errors: these, the limits, and what photos this installation can read."""


@dataclass(frozen=True)
class Entry:
    """One record on its way to the output."""

    source: Source
    """The photo."""
    digest: bytes | None
    """The hash of its bytes; None where there were none to read."""
    record: Record
    """Its record."""

    @property
    def error(self) -> str | None:
        """The record's error as JSON, as `error_fields` gives it; None for a caption."""
        result = self.record.result
        return json.dumps(error_fields(result)) if isinstance(result, CaptionError) else None

    def failed(self, error: CaptionError) -> "Entry":
        """The entry with an error in the caption's place."""
        return replace(self, record=replace(self.record, result=error))


@dataclass(frozen=True)
class Known:
    """What an output has of a photo already."""

    digest: bytes | None = None
    """The hash of the photo's bytes that the record is of; None where it could not be read."""
    error: str | None = None
    """The record's error, as `Entry.error`."""
    unread: bool = False
    """Nothing is to be done, whatever the photo holds now."""
    left: bool = False
    """What is there is not ours to change: if the photo changed, it is left alone all the same."""
    restore: Callable[[], CaptionError | None] | None = None
    """What is to be done if the photo is as it was: it writes again what was lost, or tells why it cannot."""


class Output(Protocol):
    """Where records go. All methods are called in one thread."""

    def known(self, source: Source) -> Known | None:
        """What is there of a photo; None where it is to be captioned.

        Raises:
            CaptionError: the output or its ledger cannot be read.
        """

    def write(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        """Write records: all of them are on the disk afterwards.

        Returns:
            The entries, with an error in place of each caption that has no place to be written to.

        Raises:
            CaptionError: they cannot be written. Those of earlier calls are not concerned.
        """

    def finish(self) -> None:
        """State that all photos are done.

        Raises:
            CaptionError: the output cannot be written.
        """

    def close(self) -> None:
        """Give the output back, finished or not."""


class StreamOutput:
    """Passes lines on: to standard output, a pipe or a device. It knows nothing of earlier runs."""

    def __init__(
        self,
        header: bytes,
        line: Callable[[Entry], bytes],
        put: Callable[[bytes], object],
        close: Callable[[], object] = lambda: None,
    ) -> None:
        """Begin with the header.

        Args:
            header: what stands before the first record.
            line: the line of an entry; empty for none.
            put: takes whole lines.
            close: called at the end.
        """
        self._line = line
        self._put = put
        self._close = close
        if header:
            put(header)

    def known(self, source: Source) -> Known | None:
        """Nothing is known."""
        return None

    def write(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        """Pass records on, a line each."""
        for entry in entries:
            line = self._line(entry)
            if line:
                self._put(line)
        return entries

    def finish(self) -> None:
        """Nothing is left to do."""

    def close(self) -> None:
        """Close what the lines went to."""
        self._close()


def digest_of(data: bytes) -> bytes:
    """The hash by which a photo's content, or a sidecar's, is known again: BLAKE2b (RFC 7693), 32 bytes."""
    return hashlib.blake2b(data, digest_size=32).digest()

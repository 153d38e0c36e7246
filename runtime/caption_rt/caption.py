"""Caption: what a photo got, and all that is known about how it came about."""

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from caption_rt.guard import Fault
from caption_rt.image import ImageSource, PhotoLimits
from caption_rt.options import Strategy
from caption_rt.strategies import Ended

__all__ = ["Caption", "Timing", "Word"]


@dataclass(frozen=True)
class Timing:
    """Where the time of a caption went, in seconds.

    Photos that went through the network together share its time evenly, so that sums over captions are true.
    """

    read_s: float
    """Reading the photo: file to pixels. 0 where pixels were given."""
    extract_s: float
    """The extractor."""
    encode_s: float
    """The encoder."""
    decode_s: float
    """The decoder, word by word, with the search and the guard around it."""


@dataclass(frozen=True)
class Word:
    """A word of a caption, as `Captioner.stream` gives it."""

    text: str
    """The word."""
    token: int
    """Its token id."""
    log_prob: float
    """Natural logarithm of its probability, given the photo and the words before it."""
    attention: NDArray[np.float32] = field(repr=False, compare=False)
    """float32 [grid rows, grid columns], read-only: where in the photo the model looked for it; sums to 1."""


@dataclass(frozen=True)
class Caption:
    """A caption, and how sure the model was of it."""

    text: str
    """The words, joined by spaces, as the model says them: lower case, no punctuation."""
    tokens: tuple[int, ...]
    """The token id of each word."""
    words: tuple[str, ...]
    """The words."""
    log_prob: float
    """Natural logarithm of the sentence's probability, its end included where the model ended it."""
    word_log_probs: tuple[float, ...]
    """Natural logarithm of each word's probability, given the photo and the words before it."""
    attention: NDArray[np.float32] = field(repr=False, compare=False)
    """float32 [words, grid rows, grid columns], read-only: where in the photo the model looked for each word. The grid
    lies over the whole photo, upright and stretched to it; each word's numbers sum to 1."""
    ended: Ended
    """"end": the model ended it; "max_words": it was cut; "no_word": the options left it no further word."""
    strategy: Strategy
    """How the words were chosen: "greedy", "beam" or "sample"."""
    retried_for: tuple[Fault, ...]
    """Why the guard decoded the photo again: what was wrong with the caption that was found as asked; empty if nothing
    was, or without the guard. See `caption_rt.guard`."""
    faults: tuple[Fault, ...]
    """What is wrong with this caption; with the guard, only where no strategy found a better one."""
    provider: str
    """The execution provider of ONNX Runtime that was used, such as "CPUExecutionProvider"."""
    precision: str
    """What the networks were computed in: "fp32", "fp16" or "int8"."""
    timing: Timing = field(repr=False, compare=False)
    """Where the time went."""
    alternatives: tuple["Caption", ...] = field(default=(), repr=False)
    """The next best captions, best first, where `DecodeOptions.n_best` asked for several."""

    def to_dict(self, *, attention: bool = False, timing: bool = False) -> dict[str, Any]:
        """The caption as values that `json.dumps` takes.

        Args:
            attention: put the attention in as nested lists.
            timing: put the timing in; it differs from run to run.
        """
        values: dict[str, Any] = {
            "caption": self.text,
            "log_prob": self.log_prob,
            "words": list(self.words),
            "word_log_probs": list(self.word_log_probs),
            "tokens": list(self.tokens),
            "ended": self.ended,
            "strategy": self.strategy,
            "retried_for": list(self.retried_for),
            "faults": list(self.faults),
            "provider": self.provider,
            "precision": self.precision,
        }
        if attention:
            values["attention"] = self.attention.tolist()
        if timing:
            values["timing"] = vars(self.timing).copy()
        if self.alternatives:
            shared = {"strategy", "retried_for", "provider", "precision", "timing"}
            values["alternatives"] = [
                {key: value for key, value in other.to_dict(attention=attention).items() if key not in shared}
                for other in self.alternatives
            ]
        return values

    def plot(
        self,
        image: ImageSource,
        path: str | os.PathLike[str],
        *,
        limits: PhotoLimits | None = None,
        name: str | None = None,
    ) -> None:
        """Write a picture of the photo, once a word, with that word's attention over it.

        Args:
            image: the photo that was captioned.
            path: where to write; PNG, SVG or PDF by its ending. A file that is there is replaced.
            limits: the largest photo that is read, as the captioner had it (`Captioner.limits`); None for the defaults
                of `PhotoLimits`.
            name: how errors call a photo that is given as bytes, such as the path that they came from.

        Raises:
            OptionsError: another ending, or matplotlib (the extra `plot`) is not installed.
            ImageError: the photo cannot be read.
            CaptionError: the file cannot be written.
        """
        from caption_rt.attention import save_plot  # matplotlib is an extra

        save_plot(image, self, path, limits=limits, name=name)

"""DecodeOptions: how one call turns log-probabilities into words."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Literal, TypeAlias

from caption_rt._arguments import whole_number
from caption_rt.errors import OptionsError, Parameter, printable
from caption_rt.vocabulary import normalize_caption

__all__ = ["DecodeOptions", "Strategy"]

Strategy: TypeAlias = Literal["greedy", "beam", "sample"]
"""How words are chosen: the most likely one each time, the most likely sentence of a beam, or by lot."""

# More is a slip of the finger: the memory for it would be gone before the first word.
_MOST = 1000
_LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """How one call decodes.

    The default is greedy search. TensorFlow's image-captioning tutorial draws each word from the model's whole
    distribution, which is ``DecodeOptions(sample=True, guard=False)``.

    Raises:
        OptionsError: a value is out of its range, or two contradict each other.
    """

    beam_size: int = 1
    """Hypotheses kept a photo, 1 to 1000. 1 is greedy: the most likely word each time, until the end token. More than
    ten or so rarely give better captions: every word makes a sentence less likely, so the wider a beam looks, the
    shorter the sentences it finds (Stahlberg and Byrne 2019, https://arxiv.org/abs/1908.10090), down to "two women"
    with 1000; a `length_penalty` or `min_words` is against that."""
    length_penalty: float = 0.0
    """The exponent alpha, at least 0, of the length penalty of Wu et al. 2016 (https://arxiv.org/abs/1609.08144),
    equation 14: hypotheses are ranked by log P / ((5 + length) / 6) ** alpha. 0 ranks by log P itself; more favours
    longer captions. Greedy search does not rank and is not changed by it."""
    n_best: int = 1
    """Captions given a photo, the best first, 1 to 1000; of a beam, at most its size. When sampling, so many are drawn,
    and equal ones are given once."""
    sample: bool = False
    """Draw each word by its probability rather than search for the most likely words; needs a `beam_size` of 1."""
    temperature: float = 1.0
    """When sampling: log-probabilities are divided by it before a word is drawn. Below 1 keeps to likely words, above 1
    strays from them; above 0."""
    top_k: int = 0
    """When sampling: only the so many likeliest words are drawn (Fan et al. 2018, https://arxiv.org/abs/1805.04833);
    0 is all of them."""
    top_p: float = 1.0
    """When sampling: only the likeliest words that together reach this probability are drawn (Holtzman et al. 2020,
    https://arxiv.org/abs/1904.09751); above 0, and 1 is all of them."""
    seed: int = 0
    """When sampling: the same seed gives the same caption of the same photo, on every run, whatever photos share its
    batch; 0 to 2**63 - 1."""
    min_words: int = 0
    """The end token is not chosen before so many words, 0 to `max_words`."""
    max_words: int = 20
    """A caption is cut after this many words, 1 to 1000."""
    no_repeat_ngram: int = 0
    """No sequence of so many words comes twice in a caption (Paulus et al. 2017, https://arxiv.org/abs/1705.04304,
    section 2.5, has 3); 0 allows repetition."""
    banned_words: tuple[str, ...] = ()
    """Words that are never said, upper or lower case. One that the model does not know changes nothing."""
    allow_unk: bool = False
    """Whether ``<unk>``, which stands for every word that the model does not know, may be said."""
    guard: bool = True
    """Whether a degenerate caption is decoded again with another strategy; see `caption_rt.guard`."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        # What a command line derives the others from comes first.
        self._check_integer("n_best", 1, _MOST)
        self._check_integer("beam_size", 1, _MOST)
        self._check_integer("min_words", 0, _MOST)
        self._check_integer("max_words", 1, _MOST)
        self._check_integer("no_repeat_ngram", 0, _MOST)
        self._check_integer("top_k", 0, 2**31)
        self._check_integer("seed", 0, _LARGEST_SEED)
        self._check_number("length_penalty", "of at least 0", lambda value: 0 <= value < math.inf)
        self._check_number("temperature", "above 0", lambda value: 0 < value < math.inf)
        self._check_number("top_p", "above 0 and at most 1", lambda value: 0 < value <= 1)
        for name in ("sample", "allow_unk", "guard"):
            if not isinstance(getattr(self, name), bool):
                raise OptionsError(Parameter(name), f" must be True or False, not {getattr(self, name)!r}")
        if self.sample and self.beam_size != 1:
            raise OptionsError("sampling keeps no beam: ", Parameter("beam_size"), f" must be 1, not {self.beam_size}")
        if not self.sample and self.n_best > self.beam_size:
            raise OptionsError(
                f"a beam of {self.beam_size} has no {self.n_best} best captions: raise ", Parameter("beam_size")
            )
        if self.min_words > self.max_words:
            raise OptionsError(
                f"a caption of at least {self.min_words} words cannot have at most {self.max_words}: lower ",
                *(Parameter("min_words"), " or raise ", Parameter("max_words")),
            )
        object.__setattr__(self, "banned_words", _single_words(self.banned_words))

    @property
    def strategy(self) -> Strategy:
        """How words are chosen."""
        if self.sample:
            return "sample"
        return "greedy" if self.beam_size == 1 else "beam"

    def _check_integer(self, name: str, least: int, most: int) -> None:
        object.__setattr__(self, name, whole_number(name, getattr(self, name), least, most))

    def _check_number(self, name: str, range_: str, fits: Callable[[float], bool]) -> None:
        value = getattr(self, name)
        # NumPy's numbers are among them.
        if not isinstance(value, Real) or isinstance(value, bool) or not fits(float(value)):
            raise OptionsError(Parameter(name), f" must be a number {range_}, not {value!r}")
        object.__setattr__(self, name, float(value))


def _single_words(words: Iterable[str]) -> tuple[str, ...]:
    """The words as the vocabulary has them, each once, in alphabetical order: equal options are equal values."""
    # The letters of a string would be taken as words.
    if isinstance(words, str) or not isinstance(words, Iterable):
        raise OptionsError(
            Parameter("banned_words"), f" takes several words: give a list, not {printable(repr(words)[:100])}"
        )
    found = set()
    for word in words:
        normal = normalize_caption(word) if isinstance(word, str) else []
        if len(normal) != 1:
            raise OptionsError(Parameter("banned_words"), f" takes words, and {printable(repr(word))} is not one word")
        found.update(normal)
    return tuple(sorted(found))

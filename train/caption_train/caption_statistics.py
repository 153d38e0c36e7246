"""What captions are like as a whole: how long, how varied, how new."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from caption_rt.errors import OptionsError
from caption_rt.vocabulary import Vocabulary, normalize_caption

__all__ = ["CaptionStatistics", "describe_captions"]


@dataclass(frozen=True)
class CaptionStatistics:
    """What scores do not tell: a model that says one sentence of every photo has a fair BLEU-1."""

    mean_words: float
    """Words a caption."""
    fewest_words: int
    """Words of the shortest caption."""
    most_words: int
    """Words of the longest."""
    words_used: int
    """Different words in all captions together."""
    words_known: int
    """Words of the model's vocabulary, special ones not counted."""
    unique: float
    """Share of the captions, 0 to 1, that no other photo has got."""
    novel: float
    """Share of the captions, 0 to 1, that are not among the training captions word for word."""

    def to_dict(self) -> dict[str, float]:
        """The values by name."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The same to read."""
        return [
            f"words a caption: {self.mean_words:.1f} on average, {self.fewest_words} to {self.most_words}",
            f"vocabulary used: {self.words_used} of {self.words_known} words",
            f"captions that no other photo got: {100 * self.unique:.1f} %",
            f"captions that are not in the training set: {100 * self.novel:.1f} %",
        ]


def describe_captions(
    captions: Sequence[str], vocabulary: Vocabulary, training_captions: Iterable[str]
) -> CaptionStatistics:
    """Describe generated captions.

    Args:
        captions: One a photo, in the words of the vocabulary.
        vocabulary: The model's.
        training_captions: As people wrote them. Two captions are the same if their words are
            (`caption_rt.vocabulary.normalize_caption`).

    Raises:
        OptionsError: There is no caption.
    """
    if not captions:
        raise OptionsError("there are no captions to describe")
    said = [tuple(normalize_caption(caption)) for caption in captions]
    counts = Counter(said)
    trained = {tuple(normalize_caption(caption)) for caption in training_captions}
    lengths = [len(words) for words in said]
    return CaptionStatistics(
        mean_words=sum(lengths) / len(said),
        fewest_words=min(lengths),
        most_words=max(lengths),
        words_used=len({word for words in said for word in words}),
        words_known=len(vocabulary) - len(vocabulary.special_ids),
        unique=sum(counts[words] == 1 for words in said) / len(said),
        novel=sum(words not in trained for words in said) / len(said),
    )

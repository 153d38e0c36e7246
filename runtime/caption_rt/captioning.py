"""What a captioner does around its networks, whichever they are: the runtime's, and TensorFlow's in training."""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from caption_rt.caption import Caption, Timing
from caption_rt.guard import Guarded, faults_of
from caption_rt.options import DecodeOptions
from caption_rt.search import SpecialTokens
from caption_rt.strategies import Hypothesis
from caption_rt.vocabulary import Vocabulary

__all__ = ["caption_of", "frozen", "photo_seeds", "special_tokens"]


def special_tokens(vocabulary: Vocabulary, options: DecodeOptions) -> SpecialTokens:
    """What a search must know of a vocabulary.

    Args:
        vocabulary: the model's words.
        options: how to decode; `allow_unk` and `banned_words` tell what may be said.
    """
    banned = set(vocabulary.unspoken_ids) - ({vocabulary.unk_id} if options.allow_unk else set())
    for word in options.banned_words:
        banned |= set(vocabulary.encode(word)) - {vocabulary.unk_id}
    return SpecialTokens(vocabulary.start_id, vocabulary.end_id, frozenset(banned))


def photo_seeds(pixels: Sequence[NDArray[np.uint8]]) -> Callable[[int], int]:
    """The number on which samples of a photo depend, by its place in the batch; see `caption_rt.search.Search`.

    Args:
        pixels: uint8 [S, S, 3] each: the photos, in the order of the batch.
    """

    def photo_seed(photo: int) -> int:
        # The photo's content rather than its place: it gets the same caption whatever photos come before it.
        return int.from_bytes(hashlib.blake2b(pixels[photo].tobytes(), digest_size=8).digest(), "little")

    return photo_seed


def caption_of(
    found: Guarded, vocabulary: Vocabulary, grid: tuple[int, int], provider: str, precision: str, timing: Timing
) -> Caption:
    """The caption that a search found.

    Args:
        found: the hypotheses, best first.
        vocabulary: the model's words.
        grid: rows and columns of the attention.
        provider: what ran the networks.
        precision: what they were computed in.
        timing: where the time went.
    """

    def caption(hypothesis: Hypothesis, alternatives: tuple[Caption, ...] = ()) -> Caption:
        words = tuple(vocabulary.words[token] for token in hypothesis.tokens)
        return Caption(
            text=" ".join(words),
            tokens=hypothesis.tokens,
            words=words,
            log_prob=hypothesis.log_prob,
            word_log_probs=hypothesis.log_probs,
            attention=frozen(hypothesis.attention, len(words), *grid),
            ended=hypothesis.ended,
            strategy=found.strategy,
            retried_for=found.retried_for,
            faults=faults_of(hypothesis),
            provider=provider,
            precision=precision,
            timing=timing,
            alternatives=alternatives,
        )

    best, *others = found.hypotheses
    return caption(best, tuple(caption(other) for other in others))


def frozen(attention: NDArray[np.float32], *shape: int) -> NDArray[np.float32]:
    """A view of that shape that nobody can write to.

    Args:
        attention: float32, with as many numbers as the shape has.
        shape: of the view.
    """
    view = attention.reshape(shape)
    view.setflags(write=False)
    return view

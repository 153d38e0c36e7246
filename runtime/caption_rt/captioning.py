"""What a captioner does around its networks, whichever they are: the runtime's, and TensorFlow's in training."""

import hashlib
from collections.abc import Callable, Collection, Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from caption_rt.caption import Caption, Timing
from caption_rt.guard import Guarded, faults_of
from caption_rt.options import DecodeOptions
from caption_rt.strategies import Hypothesis
from caption_rt.vocabulary import Vocabulary

__all__ = ["SearchArguments", "caption_of", "frozen", "search_arguments"]


class SearchArguments(TypedDict):
    """Arguments of `caption_rt.search.Search`."""

    start_id: int
    end_id: int
    banned: Collection[int]
    photo_seed: Callable[[int], int]


def search_arguments(
    vocabulary: Vocabulary, pixels: Sequence[NDArray[np.uint8]], options: DecodeOptions
) -> SearchArguments:
    """What a search must know of the vocabulary and the photos.

    Args:
        vocabulary: the model's words.
        pixels: uint8 [S, S, 3] each: the photos, in the order of the batch.
        options: how to decode.
    """
    banned = set(vocabulary.unspoken_ids) - ({vocabulary.unk_id} if options.allow_unk else set())
    for word in options.banned_words:
        banned |= set(vocabulary.encode(word)) - {vocabulary.unk_id}

    def photo_seed(photo: int) -> int:
        # The photo's content rather than its place: it gets the same caption whatever photos come before it.
        return int.from_bytes(hashlib.blake2b(pixels[photo].tobytes(), digest_size=8).digest(), "little")

    return {
        "start_id": vocabulary.start_id,
        "end_id": vocabulary.end_id,
        "banned": banned,
        "photo_seed": photo_seed,
    }


def caption_of(found: Guarded, vocabulary: Vocabulary, grid: tuple[int, int], provider: str, timing: Timing) -> Caption:
    """The caption that a search found.

    Args:
        found: the hypotheses, best first.
        vocabulary: the model's words.
        grid: rows and columns of the attention.
        provider: what ran the networks.
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

"""Captions made by hand, for tests of what is done with a caption."""

import numpy as np

from caption_rt.caption import Caption, Timing


def caption_of(text, *, word_log_probs=None, attention=None, **fields):
    """A caption of these words, each looked for everywhere in a grid of 2 x 3 unless `attention` says where."""
    words = tuple(text.split())
    count = len(words)
    log_probs = (-1.0,) * count if word_log_probs is None else tuple(word_log_probs)
    known = {
        "tokens": tuple(range(4, 4 + count)),
        "log_prob": sum(log_probs) - 0.5,
        "ended": "end",
        "strategy": "greedy",
        "retried_for": (),
        "faults": (),
        "provider": "CPUExecutionProvider",
        "precision": "fp32",
        "timing": Timing(0.0, 0.0, 0.0, 0.0),
    }
    return Caption(
        text=text,
        words=words,
        word_log_probs=log_probs,
        attention=np.full((count, 2, 3), 1 / 6, np.float32) if attention is None else attention,
        **known | fields,
    )

"""A decoder for tests of the search: log-probabilities that depend on the photo and on every word before."""

from dataclasses import dataclass, field

import numpy as np

from caption_rt.search import SpecialTokens, Step

PAD, UNK, START, END, A, B, C = range(7)
BANNED = (PAD, UNK, START)
SPECIAL = SpecialTokens(START, END, frozenset(BANNED))


@dataclass
class RandomStepper:
    """Log-probabilities that depend on the photo and on every word before: the state is a hash of both.

    With `levels` they are rounded to so few values that ties are everywhere.
    """

    seeds: list[int]
    vocabulary: int = 7
    levels: int | None = None
    sizes: list[int] = field(default_factory=list)

    @property
    def batch_size(self):
        return len(self.seeds)

    def initial_state(self):
        return np.array([[seed] for seed in self.seeds], np.float32)

    def log_probs(self, token, state):
        random = np.random.default_rng([int(token), int(state)])
        if self.levels:
            return -np.log(2) * random.integers(1, self.levels + 1, self.vocabulary)
        logits = random.normal(0, 1.5, self.vocabulary)
        return logits - np.log(np.exp(logits).sum())

    def step(self, tokens, state, images):
        assert tokens.dtype == images.dtype == np.int64
        assert (np.diff(images) >= 0).all()
        self.sizes.append(len(tokens))
        rows = [self.log_probs(token, value) for token, value in zip(tokens, state[:, 0], strict=True)]
        following = (state * 31 + tokens[:, None] * 7 + 1) % 9973
        # The attention tells which photo and which token it was given for.
        attention = np.stack([images, tokens], axis=1)
        return Step(np.array(rows, np.float32), following.astype(np.float32), attention.astype(np.float32))

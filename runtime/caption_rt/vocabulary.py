"""Words and their token ids: how captions become numbers in training, and numbers words on the device."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from caption_rt._fields import Fields
from caption_rt.errors import BundleError, OptionsError

__all__ = ["END", "PAD", "START", "UNK", "Vocabulary", "normalize_caption"]

PAD, UNK, START, END = "<pad>", "<unk>", "<start>", "<end>"
SPECIALS = (PAD, UNK, START, END)

# The filter of TensorFlow's image-captioning tutorial. It leaves the apostrophe ("don't") and < > alone.
_FILTERED = str.maketrans(dict.fromkeys(r"""!"#$%&()*+.,-/:;=?@[\]^_`{|}~""", " "))


def normalize_caption(text: str) -> list[str]:
    """The words of a caption: lower case, punctuation of the tutorial's filter taken as spaces.

    Words that look like a special token ("<end>") stay in the list; `Vocabulary.encode` takes them as unknown.
    """
    return text.lower().translate(_FILTERED).split()


@dataclass(frozen=True)
class Vocabulary:
    """The words a model knows; a word's token id is its index.

    Raises:
        BundleError: a special token is missing, or a word is doubled, empty, or holds white space or control
            characters.
    """

    words: tuple[str, ...]
    """All words, the four special ones included."""
    _ids: Mapping[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Index the words and check them."""
        ids: dict[str, int] = {}
        for token_id, word in enumerate(self.words):
            # Words are printed as they are, so one with a line break or an escape sequence in it is refused here.
            if not word or not word.isprintable() or " " in word:
                raise BundleError(f"the vocabulary's word {token_id} ({word!a}) is not a printable word")
            if ids.setdefault(word, token_id) != token_id:
                raise BundleError(f"the vocabulary has the word {word!r} twice, as {ids[word]} and {token_id}")
        for special in SPECIALS:
            if special not in ids:
                raise BundleError(f"the vocabulary has no {special}")
        object.__setattr__(self, "_ids", ids)

    @property
    def pad_id(self) -> int:
        """Token id that fills short captions in training; never part of a caption."""
        return self._ids[PAD]

    @property
    def unk_id(self) -> int:
        """Token id of every word that is not in the vocabulary."""
        return self._ids[UNK]

    @property
    def start_id(self) -> int:
        """Token id that the decoder is given before the first word."""
        return self._ids[START]

    @property
    def end_id(self) -> int:
        """Token id with which the decoder ends a caption."""
        return self._ids[END]

    @property
    def special_ids(self) -> dict[str, int]:
        """The four special ids by name: pad, unk, start, end."""
        return {"pad": self.pad_id, "unk": self.unk_id, "start": self.start_id, "end": self.end_id}

    @property
    def unspoken_ids(self) -> frozenset[int]:
        """The ids that no caption may hold, and no search may choose: pad, unk and start."""
        return frozenset((self.pad_id, self.unk_id, self.start_id))

    def __len__(self) -> int:
        """Number of token ids, special ones included: the V of the decoder's log-probabilities."""
        return len(self.words)

    @classmethod
    def build(cls, captions: Iterable[str], max_words: int = 5000, *, min_count: int = 1) -> "Vocabulary":
        """The vocabulary of a set of captions.

        Args:
            captions: as people wrote them; `normalize_caption` is applied.
            max_words: how many words to keep beside the four special tokens.
            min_count: words that come less often are left out.

        Returns:
            <pad>, <unk>, <start>, <end> with ids 0 to 3, then the most frequent words; equally frequent ones in
            alphabetical order, so that the same captions in another order give the same ids.

        Raises:
            OptionsError: `max_words` is below 1.
        """
        if max_words < 1:
            raise OptionsError(f"a vocabulary has at least 1 word, not {max_words}")
        counts = Counter(word for caption in captions for word in normalize_caption(caption) if word.isprintable())
        for special in SPECIALS:
            counts.pop(special, None)
        ranked = sorted(
            ((word, count) for word, count in counts.items() if count >= min_count),
            key=lambda item: (-item[1], item[0]),
        )
        return cls((*SPECIALS, *(word for word, _ in ranked[:max_words])))

    def encode(self, text: str) -> list[int]:
        """The token ids of a caption's words, without start and end; words not in the vocabulary become `unk_id`."""
        return [
            self.unk_id if word in SPECIALS else self._ids.get(word, self.unk_id) for word in normalize_caption(text)
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """The words of token ids, joined by spaces; special tokens are left out."""
        specials = set(self.special_ids.values())
        return " ".join(self.words[token_id] for token_id in ids if token_id not in specials)

    def to_json(self) -> dict[str, Any]:
        """The JSON object of ``vocabulary.json``: the words in the order of their ids, and the special ids."""
        return {"words": list(self.words), **self.special_ids}

    @classmethod
    def from_json(cls, data: object) -> "Vocabulary":
        """The vocabulary of a ``vocabulary.json`` object.

        Raises:
            BundleError: a key is missing or has the wrong type, or the special ids are not those of the words.
        """
        fields = Fields(data, "vocabulary.json")
        vocabulary = cls(tuple(fields.texts("words")))
        for name, token_id in vocabulary.special_ids.items():
            if fields.integer(name) != token_id:
                raise fields.error(name, f"is not {token_id}, where its word stands")
        return vocabulary

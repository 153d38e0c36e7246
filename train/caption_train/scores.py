"""How close generated captions come to what people wrote: BLEU, ROUGE-L and CIDEr, by COCO's evaluation code."""

from collections.abc import Mapping, Sequence

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from caption_rt.vocabulary import normalize_caption
from caption_train.errors import DatasetError


def score_captions(candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Scores one generated caption for each photo against that photo's real ones.

    The scorers are those of the COCO caption evaluation (Chen et al. 2015, package pycocoevalcap). In place of its PTB
    tokenizer, which needs Java, both sides go through `caption_rt.vocabulary.normalize_caption`, which made the words
    that the model learned. Both lower-case and drop punctuation; this one parts words at an inner hyphen or full stop
    and keeps "it's" whole, where PTB does the opposite. So scores differ a little from those of published tables.

    Args:
        candidates: Photo's name -> generated caption; it may be empty.
        references: Photo's name -> its real captions, for the same photos; those without a word are left out.

    Returns:
        In this order:

        - "BLEU-1" to "BLEU-4", in percent, 0 to 100: over all photos together, geometric mean of the n-gram precisions
          up to n, times the brevity penalty to the closest reference length (Papineni et al. 2002);
        - "ROUGE-L", in percent, 0 to 100: mean over photos of the F measure of the longest common subsequence with
          beta = 1.2, from the best precision and the best recall among the references (Lin 2004);
        - "CIDEr", 0 to 10: CIDEr-D (Vedantam et al. 2015), whose word weights come from these very references, so it
          compares between runs on the same photos only and is 0 for a single photo. 0.48 here is what papers that
          multiply by a hundred print as 48.

    Raises:
        DatasetError: There is nothing to score, the two sides are not of the same photos, or a photo has no reference.
    """
    if not candidates:
        raise DatasetError("there are no captions to score")
    unmatched = sorted(candidates.keys() ^ references.keys())
    if unmatched:
        raise DatasetError(
            f"{len(unmatched)} photos, such as {unmatched[0]}, have only a generated caption or only real ones"
        )
    generated = {name: [_words(text)] for name, text in candidates.items()}
    real = {name: [words for text in references[name] if (words := _words(text))] for name in candidates}
    for name, texts in real.items():
        if not texts:
            raise DatasetError(f"{name} has no real caption to score against")
    bleu, _ = Bleu(4).compute_score(real, generated, verbose=0)
    rouge, _ = Rouge().compute_score(real, generated)
    cider, _ = Cider().compute_score(real, generated)
    scores = {f"BLEU-{n}": 100 * float(value) for n, value in enumerate(bleu, 1)}
    return scores | {"ROUGE-L": 100 * float(rouge), "CIDEr": float(cider)}


def _words(caption: str) -> str:
    return " ".join(normalize_caption(caption))

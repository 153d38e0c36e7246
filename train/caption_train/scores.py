"""How close generated captions come to what people wrote, by COCO's evaluation code on COCO's tokens.

BLEU, ROUGE-L and CIDEr are Python; METEOR and SPICE are Java programs (`java_scores`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pycocoevalcap.meteor.meteor as meteor_module
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import METEOR_JAR, Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.spice.get_stanford_models import JAR as STANFORD_JAR
from pycocoevalcap.spice.spice import SPICE_JAR, Spice

from caption_train.errors import DatasetError
from caption_train.ptb import ptb_tokens

__all__ = ["cider_of_each", "java_scores", "score_captions"]

_Tokens = dict[str, list[str]]
"""Photo's name -> captions, as tokens joined by spaces."""


def score_captions(candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Scores one generated caption for each photo against that photo's real ones.

    The scorers are those of the COCO caption evaluation (Chen et al. 2015, package pycocoevalcap), and so are the
    tokens (`caption_train.ptb`): scores are those of its own pipeline, without Java.

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
    generated, real = _tokens(candidates, references)
    bleu, _ = Bleu(4).compute_score(real, generated, verbose=0)
    rouge, _ = Rouge().compute_score(real, generated)
    cider, _ = Cider().compute_score(real, generated)
    scores = {f"BLEU-{n}": 100 * float(value) for n, value in enumerate(bleu, 1)}
    return scores | {"ROUGE-L": 100 * float(rouge), "CIDEr": float(cider)}


def cider_of_each(candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """CIDEr-D of each photo, 0 to 10, of which `score_captions` gives the mean.

    Args:
        candidates: As for `score_captions`.
        references: As for `score_captions`.

    Raises:
        DatasetError: As `score_captions`.
    """
    generated, real = _tokens(candidates, references)
    _, each = Cider().compute_score(real, generated)
    return {name: float(value) for name, value in zip(real, each, strict=True)}


def java_scores(
    candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> tuple[dict[str, float], list[str]]:
    """Scores by COCO's two Java programs, where they can run.

    Args:
        candidates: As for `score_captions`.
        references: As for `score_captions`.

    Returns:
        "METEOR" (Denkowski & Lavie 2014, version 1.5) and "SPICE" (Anderson et al. 2016), in percent, 0 to 100, as far
        as they were computed; and for each of the others a sentence that says why not.

    Raises:
        DatasetError: As `score_captions`.
    """
    generated, real = _tokens(candidates, references)
    scores, missing = {}, []
    package = Path(meteor_module.__file__).parent.parent
    # SPICE's parser does not come with the package, whose own way is to download it in the middle of an evaluation.
    parser = package / "spice" / "lib" / f"{STANFORD_JAR}-models.jar"
    programs: tuple[tuple[str, list[Path], Callable[[_Tokens, _Tokens], float]], ...] = (
        ("METEOR", [package / "meteor" / METEOR_JAR], _meteor),
        ("SPICE", [package / "spice" / SPICE_JAR, parser.with_name(f"{STANFORD_JAR}.jar"), parser], _spice),
    )
    for name, files, score in programs:
        lacking = [file for file in files if not file.is_file()]
        if shutil.which("java") is None:
            missing.append(f"no {name}: there is no java on the PATH")
        elif lacking:
            missing.append(f"no {name}: pycocoevalcap has no {lacking[0].relative_to(package)}")
        else:
            try:
                scores[name] = 100 * score(real, generated)
            except (OSError, ValueError, subprocess.SubprocessError) as exc:
                missing.append(f"no {name}: its Java program failed ({exc})")
    return scores, missing


def _meteor(real: _Tokens, generated: _Tokens) -> float:
    scorer = Meteor()
    process = scorer.meteor_p
    try:
        score, _ = scorer.compute_score(real, generated)
    finally:
        if scorer.lock.locked():  # it failed in the middle, and would wait for ever when it is thrown away
            scorer.lock.release()
        process.kill()
        process.communicate()
    return float(score)


def _spice(real: _Tokens, generated: _Tokens) -> float:
    with _stdout_to_stderr():
        score, _ = Spice().compute_score(real, generated)
    return float(score)


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """What a child process prints is not a result of this command."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _tokens(candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> tuple[_Tokens, _Tokens]:
    """Generated and real captions as the scorers take them."""
    if not candidates:
        raise DatasetError("there are no captions to score")
    unmatched = sorted(candidates.keys() ^ references.keys())
    if unmatched:
        raise DatasetError(
            f"{len(unmatched)} photos, such as {unmatched[0]}, have only a generated caption or only real ones"
        )
    generated = {name: [_joined(text)] for name, text in candidates.items()}
    real = {name: [words for text in references[name] if (words := _joined(text))] for name in candidates}
    for name, texts in real.items():
        if not texts:
            raise DatasetError(f"{name} has no real caption to score against")
    return generated, real


def _joined(caption: str) -> str:
    return " ".join(ptb_tokens(caption))

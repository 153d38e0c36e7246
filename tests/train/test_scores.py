import json
import math
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest

from caption_train.errors import DatasetError

pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed (extra train)")

from caption_train.scores import cider_of_each, java_scores, score_captions

COCO = "captions_val2017.json"


@pytest.fixture(scope="module")
def people(shared: Path) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Of 2,000 photos of MS-COCO, one caption for a candidate and the others as references."""
    captions = defaultdict(list)
    for annotation in json.loads((shared / "coco" / COCO).read_text())["annotations"]:
        captions[str(annotation["image_id"])].append(annotation["caption"])
    chosen = sorted(captions)[:2000]
    return {name: captions[name][0] for name in chosen}, {name: captions[name][1:] for name in chosen}


def test_names_and_their_order() -> None:
    scores = score_captions({"1": "a dog runs"}, {"1": ["a dog runs"]})
    assert list(scores) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"]


def test_identical_captions(capfd: pytest.CaptureFixture[str]) -> None:
    captions = {"1": "a brown dog runs across the grass", "2": "two people sit near some water"}
    scores = score_captions(captions, {name: [text] for name, text in captions.items()})
    assert scores == pytest.approx(
        {"BLEU-1": 100, "BLEU-2": 100, "BLEU-3": 100, "BLEU-4": 100, "ROUGE-L": 100, "CIDEr": 10}
    )
    assert capfd.readouterr() == ("", "")


def test_bleu_of_a_short_candidate_has_the_brevity_penalty() -> None:
    scores = score_captions({"1": "a cat sat"}, {"1": ["a cat sat down here"]})
    penalty = 100 * math.exp(1 - 5 / 3)  # all its n-grams are in the reference, three words against five
    assert [scores["BLEU-1"], scores["BLEU-2"], scores["BLEU-3"]] == pytest.approx([penalty] * 3)


def test_bleu_takes_the_closest_reference_length() -> None:
    references = {"1": ["a cat sat", "a cat sat down on the mat"]}
    assert score_captions({"1": "a cat sat"}, references)["BLEU-1"] == pytest.approx(100)


def test_bleu_clips_repeated_words_and_multiplies_precisions() -> None:
    assert score_captions({"1": "the the the the"}, {"1": ["the cat is here"]})["BLEU-1"] == pytest.approx(25)
    scores = score_captions({"1": "a dog runs fast"}, {"1": ["a dog sits fast"]})
    assert scores["BLEU-1"] == pytest.approx(75)
    assert scores["BLEU-2"] == pytest.approx(100 * math.sqrt(3 / 4 * 1 / 3))


def test_bleu_is_of_the_corpus_not_the_mean_of_photos() -> None:
    scores = score_captions({"1": "a b c d e f", "2": "x y"}, {"1": ["a b c d e f"], "2": ["p q"]})
    assert scores["BLEU-1"] == pytest.approx(100 * 6 / 8)
    assert scores["BLEU-2"] == pytest.approx(100 * math.sqrt(6 / 8 * 5 / 6))


def test_rouge_l() -> None:
    scores = score_captions({"1": "a dog runs fast"}, {"1": ["a quick dog runs", "no match"]})
    precision = recall = 3 / 4  # a dog runs
    assert scores["ROUGE-L"] == pytest.approx(100 * 2.44 * precision * recall / (recall + 1.44 * precision))
    scores = score_captions({"1": "a dog runs fast"}, {"1": ["a dog runs"]})
    assert scores["ROUGE-L"] == pytest.approx(100 * 2.44 * 0.75 / (1 + 1.44 * 0.75))


def test_cider() -> None:
    # No word is shared between photos, so all n-grams weigh alike: a short caption has n-grams of two of four lengths.
    references = {"1": ["a brown dog runs"], "2": ["red boat", "seven tall green trees"]}
    scores = score_captions({"1": "a brown dog runs", "2": "red boat"}, references)
    assert scores["CIDEr"] == pytest.approx((10 + 10 * (2 / 4) / 2) / 2)
    # A word of every photo weighs nothing.
    scores = score_captions({"1": "a", "2": "a"}, {"1": ["a"], "2": ["a"]})
    assert scores["CIDEr"] == 0


def test_case_and_punctuation_do_not_count() -> None:
    references = {"1": ["A DOG, runs fast..."], "2": ["Two cats sleep on it."]}
    tidy = score_captions({"1": "a dog runs fast", "2": "two cats sleep on it"}, references)
    assert tidy["BLEU-4"] == pytest.approx(100)
    assert score_captions({"2": "Two Cats sleep on it .", "1": "A dog runs - fast."}, references) == pytest.approx(tidy)


def test_an_empty_caption_scores_nothing_and_better_captions_score_more() -> None:
    references = {"1": ["a brown dog runs across grass"], "2": ["two people sit near water"]}
    other = "two people sit near water"
    by_quality = [
        score_captions({"1": text, "2": other}, references) for text in ("", "a dog", "a dog runs", references["1"][0])
    ]
    for worse, better in pairwise(by_quality):
        assert all(worse[name] < better[name] for name in ("BLEU-1", "ROUGE-L", "CIDEr"))
    assert score_captions({"1": ""}, {"1": ["a dog"]}) == pytest.approx(
        {"BLEU-1": 0, "BLEU-2": 0, "BLEU-3": 0, "BLEU-4": 0, "ROUGE-L": 0, "CIDEr": 0}
    )


def test_references_without_a_word_are_left_out() -> None:
    with_blank = score_captions({"1": "a dog"}, {"1": ["...", "a dog runs"]})
    assert with_blank == score_captions({"1": "a dog"}, {"1": ["a dog runs"]})


def test_what_cannot_be_scored() -> None:
    with pytest.raises(DatasetError, match="no captions to score"):
        score_captions({}, {})
    with pytest.raises(DatasetError, match="2 photos, such as 2, have only"):
        score_captions({"1": "a", "2": "b"}, {"1": ["a"], "3": ["c"]})
    with pytest.raises(DatasetError, match="1 has no real caption"):
        score_captions({"1": "a"}, {"1": ["..."]})


@pytest.mark.data
@pytest.mark.program("java")
def test_scores_are_those_of_the_original_pipeline(people: tuple[dict[str, str], dict[str, list[str]]]) -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    candidates, references = people
    tokenizer = PTBTokenizer()
    real = tokenizer.tokenize({name: [{"caption": text} for text in texts] for name, texts in references.items()})
    said = tokenizer.tokenize({name: [{"caption": text}] for name, text in candidates.items()})
    bleu = Bleu(4).compute_score(real, said, verbose=0)[0]
    expected = {f"BLEU-{n}": 100 * value for n, value in enumerate(bleu, 1)}
    expected["ROUGE-L"] = 100 * Rouge().compute_score(real, said)[0]
    expected["CIDEr"] = Cider().compute_score(real, said)[0]
    assert score_captions(candidates, references) == expected
    assert expected["CIDEr"] == pytest.approx(0.9030, abs=1e-4)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.program("java")
def test_meteor_is_that_of_the_original_pipeline(people: tuple[dict[str, str], dict[str, list[str]]]) -> None:
    scores, missing = java_scores(*people)
    assert scores["METEOR"] == pytest.approx(24.1927, abs=1e-4)
    assert all(line.startswith("no SPICE: ") for line in missing)


def test_without_java_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert java_scores({"1": "a dog"}, {"1": ["a dog"]}) == (
        {},
        ["no METEOR: there is no java on the PATH", "no SPICE: there is no java on the PATH"],
    )


def test_a_java_that_fails_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    scores, missing = java_scores({"1": "a dog"}, {"1": ["a dog"]})
    assert scores == {}
    assert missing[0].startswith("no METEOR: its Java program failed (")
    assert missing[1].startswith("no SPICE: ")


def test_cider_of_each_photo() -> None:
    references = {"1": ["a brown dog runs"], "2": ["red boat", "seven tall green trees"]}
    candidates = {"2": "red boat", "1": "a brown dog runs"}
    each = cider_of_each(candidates, references)
    assert each == {"2": pytest.approx(10 * (2 / 4) / 2), "1": pytest.approx(10)}
    assert sum(each.values()) / 2 == pytest.approx(score_captions(candidates, references)["CIDEr"])

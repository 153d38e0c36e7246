import re
from pathlib import Path

import pytest

from caption_rt.errors import OptionsError
from caption_rt.vocabulary import Vocabulary
from caption_train.caption_statistics import describe_captions
from caption_train.evaluation_page import Judged, write_worst_page


def test_the_page_has_the_worst_first_and_needs_nothing_else(photos: list[Path], tmp_path: Path) -> None:
    judged = [Judged(photos[0], f"caption {n}", ("real <b>one</b>", "real & two"), n / 10) for n in range(25)][::-1]
    page = tmp_path / "worst.html"
    page.write_text("older")
    write_worst_page(page, judged, "run <1>, validation photos", {"BLEU-1": 61.5, "CIDEr": 0.25})
    text = page.read_text("utf-8")
    assert re.findall(r"<p class=\"words\" dir=\"auto\">([^<]+)</p>", text) == [f"caption {n}" for n in range(20)]
    assert re.findall(r"CIDEr (\d\.\d{3})</span>", text)[:2] == ["0.000", "0.100"]
    assert text.count('<img src="data:image/jpeg;base64,/9j/') == 20
    assert "<li>real &lt;b&gt;one&lt;/b&gt;</li><li>real &amp; two</li>" in text
    assert "<h1>run &lt;1&gt;, validation photos</h1>" in text
    assert "the 20 worst of 25 photos by CIDEr · all: BLEU-1 61.500 · CIDEr 0.250" in text
    assert "default-src 'none'" in text
    assert not re.search(r"<script|https?://|url\(", text)
    assert [path.name for path in tmp_path.iterdir()] == ["worst.html"]


def test_a_photo_that_is_gone_has_an_empty_frame(tmp_path: Path) -> None:
    write_worst_page(tmp_path / "p.html", [Judged(tmp_path / "gone.jpg", "", ("a dog",), 0.0)], "run", {})
    text = (tmp_path / "p.html").read_text("utf-8")
    assert '<div class="photo"></div>' in text
    assert ">(no words)</p>" in text


def test_statistics() -> None:
    vocabulary = Vocabulary.build(["a dog runs", "a cat sits down"])
    statistics = describe_captions(
        ["a dog runs", "a dog runs", "a cat", ""], vocabulary, ["A dog runs.", "a cat sits down"]
    )
    assert statistics.to_dict() == {
        **{"mean_words": 2.0, "fewest_words": 0, "most_words": 3, "words_used": 4, "words_known": 6},
        **{"unique": 0.5, "novel": 0.5},
    }
    assert statistics.lines() == [
        "words a caption: 2.0 on average, 0 to 3",
        "vocabulary used: 4 of 6 words",
        "captions that no other photo got: 50.0 %",
        "captions that are not in the training set: 50.0 %",
    ]
    with pytest.raises(OptionsError, match="no captions to describe"):
        describe_captions([], vocabulary, [])

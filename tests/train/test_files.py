from pathlib import Path

import pytest

from caption_train.errors import TrainingError
from caption_train.files import (
    append_json_line,
    read_json,
    read_json_lines,
    refuse_other_options,
    rewrite_json_lines,
    write_json,
)


def test_lines_are_appended_and_a_torn_one_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "made" / "log.jsonl"
    assert read_json_lines(path) == []
    append_json_line(path, {"step": 1})
    append_json_line(path, {"step": 2, "name": "ü\u2028"})
    with path.open("a") as file:
        file.write('{"step": 3')
    assert read_json_lines(path) == [{"step": 1}, {"step": 2, "name": "ü\u2028"}]
    rewrite_json_lines(path, [{"step": 1}])
    assert path.read_text() == '{"step": 1}\n'
    assert [file.name for file in path.parent.iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"step": 1}\n{"st\n{"step": 3}\n', "log.jsonl, line 2: this is not JSON: "),
        (b'{"step": 1}\n\xff\xfe\n', "log.jsonl, line 2: this is not JSON: "),
        (b"[1]\n", "log.jsonl, line 1: this is not a JSON object"),
    ],
)
def test_a_damaged_log_is_one_sentence(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "log.jsonl").write_bytes(content)
    with pytest.raises(TrainingError) as caught:
        read_json_lines(tmp_path / "log.jsonl")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_in_place_of_a_log(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="cannot be read: Is a directory"):
        read_json_lines(tmp_path)


def test_json_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "made" / "facts.json"
    write_json(path, {"b": 1, "a": [None, 0.5]})
    assert path.read_text() == '{\n  "a": [\n    null,\n    0.5\n  ],\n  "b": 1\n}\n'
    assert read_json(path) == {"a": [None, 0.5], "b": 1}
    assert [file.name for file in path.parent.iterdir()] == ["facts.json"]


def test_what_cannot_be_put_in_place_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "facts.json").mkdir()
    with pytest.raises(OSError, match="facts"):
        write_json(tmp_path / "facts.json", {})
    assert [file.name for file in tmp_path.iterdir()] == ["facts.json"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "is no run folder: it has no facts.json"), ("{", "cannot be read"), ("[]", "it is not a JSON object")],
)
def test_json_that_cannot_be_read(tmp_path: Path, content: str | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / "facts.json").write_text(content)
    with pytest.raises(TrainingError, match=sentence):
        read_json(tmp_path / "facts.json")


def test_a_run_goes_on_with_the_options_it_was_begun_with(tmp_path: Path) -> None:
    before = {"training": {"epochs": 3, "units": 8}, "extractor": {"width": 0.5}}
    refuse_other_options(tmp_path, before, {"training": {"units": 8}})
    for now, sentence in (
        ({"training": {"epochs": 4}}, "another training: epochs was 3 and is now 4; give the same options to go on"),
        ({"extractor": {"width": None}}, "another extractor: width was 0.5 and is now None"),
        ({"dataset": {"name": "coco"}}, "another dataset: name was None and is now 'coco'"),
    ):
        with pytest.raises(TrainingError) as caught:
            refuse_other_options(tmp_path, before, now)
        assert sentence in str(caught.value)

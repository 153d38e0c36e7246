"""An output file that is there already: whose it is, what an edit of it means, and what --existing makes of it."""

import json
import os

import pytest

from caption_rt.errors import CaptionError, OptionsError
from caption_rt.output_place import check_output
from caption_rt.outputs import Entry, RunKey, digest_of
from caption_rt.records import Record
from caption_rt.sources import Source
from outputs import Said, bad, entry, names, opened, written


@pytest.fixture
def out(tmp_path, monkeypatch):
    """An output in the current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "out.jsonl"


EDITS = {
    "appended": lambda data: data + b"mine\n",
    "appended without a line's end": lambda data: data + b"mine",
    "another first line": lambda data: b"X" + data[1:],
    "another last line": lambda data: data[:-3] + b"XX\n",
    "a line less": lambda data: data[: data.rindex(b"\n", 0, -1) + 1],
    "a line less at the beginning": lambda data: data[data.index(b"\n") + 1 :],
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_output_that_somebody_edited_is_refused_and_stays(out, edit):
    written(out, entry("a"), entry("b"), entry("c"))
    out.write_bytes(edit(out.read_bytes()))
    before = out.read_bytes()
    for existing in ("resume", "skip"):
        with pytest.raises(OptionsError, match="was changed since caption-rt wrote it: choose another, or --existing"):
            opened(out, existing)
    assert out.read_bytes() == before


@pytest.mark.parametrize("edit", [EDITS["appended"], EDITS["another first line"]])
def test_an_unfinished_output_that_somebody_edited_is_refused_too(out, edit):
    written(out, entry("a"), entry("b"), finish=False)
    out.write_bytes(edit(out.read_bytes()))
    before = out.read_bytes()
    with pytest.raises(OptionsError, match="was changed since caption-rt wrote it"):
        opened(out)
    assert out.read_bytes() == before


def test_an_output_of_somebody_else(out):
    out.write_bytes(b"# header\nmine")
    for existing in ("resume", "skip"):
        with pytest.raises(OptionsError, match="exists and was not written by caption-rt, or its ledger is gone"):
            opened(out, existing)
        with pytest.raises(OptionsError, match="exists and was not written by caption-rt"):
            check_output(out, existing)
    assert os.listdir(out.parent) == ["out.jsonl"]
    written(out, entry("a"), existing="append")
    assert out.read_bytes() == b'# header\nmine\n["a", "a dog"]\n'
    written(out, entry("a", b"other", "a cat"), entry("b"))  # goes on, and lets the beginning be
    assert out.read_bytes() == b'# header\nmine\n["a", "a cat"]\n["b", "a dog"]\n'
    written(out, entry("b"), existing="overwrite")
    assert out.read_bytes() == b'# header\n["b", "a dog"]\n'


def test_an_empty_file_is_nobodys(out):
    out.touch()
    written(out, entry("a"))
    assert names(out) == ["a"]


def test_nothing_is_added_to_a_file_with_other_columns(out):
    out.write_bytes(b"name,text\na,b\n")
    with pytest.raises(OptionsError, match="does not begin as this version of caption-rt begins such a file"):
        opened(out, "append")
    assert out.read_bytes() == b"name,text\na,b\n"


def test_append_never_takes_anything_out(out):
    written(out, entry("a"), entry("b"))
    first = out.read_bytes()
    written(out, entry("a", b"other", "a cat"), existing="append")
    assert names(out) == ["a", "b", "a"]
    output = opened(out, "append")
    assert output.known(Source("b", "b")).digest == digest_of(b"photo")  # not captioned again
    assert output.known(Source("a", "a")).digest == digest_of(b"other")
    output.close()
    assert out.read_bytes().startswith(first)


def test_append_keeps_what_somebody_edited(out):
    written(out, entry("a"), entry("b"))
    out.write_bytes(b"# header\nall mine")
    written(out, entry("c"), existing="append")
    assert out.read_bytes() == b'# header\nall mine\n["c", "a dog"]\n'


def test_skip_does_not_look_at_photos_that_have_a_record(out):
    written(out, entry("a"), bad("b", b"noise"), bad("c"))
    output = opened(out, "skip", key=RunKey(b"other", b"other"))
    assert output.known(Source("a", "a")).unread
    assert output.known(Source("b", "b")).unread
    assert output.known(Source("c", "c")) is None
    assert output.known(Source("d", "d")) is None
    output.close()


def test_an_output_of_another_format(out):
    written(out, entry("a"))
    with pytest.raises(
        OptionsError, match="has the format lines, not columns: choose another, or --existing overwrite"
    ):
        opened(out, name="columns")
    written(out, entry("b"), existing="overwrite", name="columns")
    assert names(out) == ["b"]


def test_an_output_that_cannot_be(tmp_path):
    with pytest.raises(OptionsError, match="is a folder: name a file"):
        opened(tmp_path)
    with pytest.raises(OptionsError, match=r"the folder of the output .* does not exist: make it first"):
        opened(tmp_path / "none" / "out.jsonl")


def test_standard_input_is_known_by_its_content(out):
    def stdin(data):
        return Source("-", "-", True, data)

    written(
        out,
        *(Entry(stdin(data), digest_of(data), Record("-", Said(text))) for data, text in ((b"1", "x"), (b"2", "y"))),
    )
    assert out.read_text().splitlines()[1:] == ['["-", "x"]', '["-", "y"]']
    output = opened(out)
    assert output.known(stdin(b"1")).digest == digest_of(b"1")
    assert output.known(stdin(b"3")) is None
    output.close()


def test_a_write_that_fails_leaves_whole_lines(out, monkeypatch):
    written(out, entry("a"), finish=False)
    whole = out.read_bytes()
    output = opened(out)
    write = os.write

    def full(file, data):
        if len(data) > 4:
            return write(file, bytes(data[:4]))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(
        CaptionError, match=r"cannot be written \(No space left on device\): make room on the disk, and give the same"
    ):
        output.write([entry("b")])
    monkeypatch.undo()
    output.close()
    assert out.read_bytes() == whole
    written(out)
    assert [json.loads(text)[0] for text in out.read_text().splitlines()[1:]] == ["a", "b"]

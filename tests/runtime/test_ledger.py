"""The ledger, and the output file that it answers for: what is there after every kind of ending and editing."""

import json
import os
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from caption_rt.errors import CaptionError, ImageError, OptionsError
from caption_rt.ledger import DamagedLedger, Ledger, Row, key_of
from caption_rt.output_file import FileOutput, check_output
from caption_rt.outputs import Entry, RunKey, digest_of
from caption_rt.records import Record
from caption_rt.sources import Source
from caption_rt.writers import LineWriter
from running import ENVIRONMENT

KEY = RunKey(b"caption", b"error")


class Said(str):
    """A caption, as far as these tests need one."""

    text = property(str)


def entry(name, content=b"photo", text="a dog"):
    return Entry(Source(name, name), digest_of(content), Record(name, Said(text)))


def bad(name, content=None, message="it is bad", error=None):
    source = Source(name, name, error=error)
    return Entry(source, None if content is None else digest_of(content), Record(name, ImageError(message)))


def line(record):
    return json.dumps([record.path, str(record.result)]).encode() + b"\n"


WRITER = LineWriter(b"# header\n", line)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.jsonl"


def opened(out, existing="resume", key=KEY, name="lines", writer=WRITER):
    return FileOutput(out, name, writer, existing, key)


def written(out, *entries, finish=True, **keywords):
    output = opened(out, **keywords)
    try:
        for one in entries:
            output.write([one])
        if finish:
            output.finish()
    finally:
        output.close()


def names(out):
    return [json.loads(text)[0] for text in out.read_text().splitlines()[1:]]


def test_a_row_comes_back_as_it_went(tmp_path):
    rows = [
        Row(b"a\xff\n.jpg", b"d" * 32, b"o", None, b"line\n"),
        Row(b"b", None, b"o", '{"class": "ImageError"}', b""),
        Row(b"c", b"d", b"o", None, b"text", before=b"", own=False),
    ]
    ledger = Ledger(tmp_path / "l")
    with ledger.transaction():
        for row in rows:
            ledger.put(row)
        ledger.set_facts(size=7, format="csv")
    ledger.close()
    ledger = Ledger(tmp_path / "l")
    assert [ledger.find(row.key) for row in rows] == rows
    assert ledger.find(b"d") is None
    assert (ledger.fact("size"), ledger.fact("format"), ledger.fact("none", 3)) == (7, "csv", 3)
    assert [row.key for row in ledger.unsettled()] == [b"c"]
    ledger.close()
    assert os.listdir(tmp_path) == ["l"]


def test_a_transaction_that_fails_changes_nothing(tmp_path):
    ledger = Ledger(tmp_path / "l")

    def fail():
        with ledger.transaction():
            ledger.put(Row(b"a", None, b"", None, b""))
            1 / 0  # noqa: B018

    with pytest.raises(ZeroDivisionError):
        fail()
    assert ledger.find(b"a") is None
    ledger.close()


def test_the_newest_row_of_a_photo_counts_and_keeps_its_place(tmp_path):
    ledger = Ledger(tmp_path / "l")
    with ledger.transaction():
        for name, text in (("a", "1"), ("b", "2"), ("c", "3"), ("a", "4"), ("d", "5"), ("a", "6")):
            ledger.put(Row(name.encode(), None, b"", None, text.encode()))
    assert list(ledger.lines()) == [b"1", b"2", b"3", b"4", b"5", b"6"]
    assert list(ledger.lines(stale=False)) == [b"6", b"2", b"3", b"5"]
    assert ledger.has_stale()
    with ledger.transaction():
        ledger.forget_stale()
        ledger.put(Row(b"e", None, b"", None, b"7"))
    assert list(ledger.lines()) == [b"6", b"2", b"3", b"5", b"7"]
    assert not ledger.has_stale()
    ledger.close()


def test_keys_are_relative_to_the_ledger(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inside = tmp_path / "p" / "a.jpg"
    assert {key_of(path, tmp_path) for path in ("p/a.jpg", "./p//a.jpg", str(inside))} == {b"p/a.jpg"}
    assert key_of(str(inside), tmp_path / "p" / "sub") == b"../a.jpg"


OPEN = "import sys; from pathlib import Path; from caption_rt.ledger import Ledger; Ledger(Path(sys.argv[1]))"


def test_one_process_has_a_ledger_at_a_time(tmp_path):
    def others():
        done = subprocess.run(
            [sys.executable, "-c", OPEN, tmp_path / "l"], env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
        return done.stderr.strip().splitlines()[-1:]

    ledger = Ledger(tmp_path / "l")
    sentence = f"another caption-rt is at work with {tmp_path / 'l'}: wait until it is done, or choose another output"
    assert others() == [f"caption_rt.errors.CaptionError: {sentence}"]
    with ledger.transaction():
        ledger.put(Row(b"a", None, b"", None, b""))
    assert others() == [f"caption_rt.errors.CaptionError: {sentence}"]
    ledger.close()
    assert others() == []


def test_somebody_elses_file_is_no_ledger(tmp_path):
    (tmp_path / "text").write_text("accounts\n" * 50)
    sqlite3.connect(tmp_path / "database").execute("CREATE TABLE t (x)").connection.close()
    for name in ("text", "database"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(OptionsError, match="is not a ledger of caption-rt: move it away, or choose another"):
            Ledger(tmp_path / name)
        assert (tmp_path / name).read_bytes() == before


def test_a_ledger_of_zeros_is_a_new_one(tmp_path):
    """After a loss of power a file may have its length and nothing of its content."""
    for content in (b"", bytes(64)):
        (tmp_path / "l").write_bytes(content)
        Ledger(tmp_path / "l").close()
        (tmp_path / "l").unlink()


def test_a_ledger_of_a_newer_version(tmp_path):
    Ledger(tmp_path / "l").close()
    database = sqlite3.connect(tmp_path / "l")
    database.execute("PRAGMA user_version = 2")
    database.close()
    with pytest.raises(OptionsError, match="was made by another version of caption-rt"):
        Ledger(tmp_path / "l")


def damage(path):
    data = bytearray(path.read_bytes())
    for at in range(4096, len(data)):
        data[at] = 0x55
    path.write_bytes(data)


def test_a_damaged_ledger_says_what_can_be_done(out):
    written(out, *(entry(f"{number}.jpg") for number in range(100)))
    damage(out.with_name("out.jsonl.ledger"))
    before = out.read_bytes()
    with pytest.raises(DamagedLedger, match=r"is damaged .*: --existing append keeps the output and adds to it"):
        opened(out)
    assert out.read_bytes() == before
    written(out, entry("new.jpg"), existing="append")
    assert out.read_bytes() == before + line(Record("new.jpg", "a dog"))
    written(out, finish=True)  # in order again
    damage(out.with_name("out.jsonl.ledger"))
    written(out, entry("new.jpg"), existing="overwrite")
    assert names(out) == ["new.jpg"]


def test_a_run_that_is_taken_up_goes_on(out):
    written(out, entry("a"), entry("b"), finish=False)
    output = opened(out)
    known = output.known(Source("a", "a"))
    assert (known.digest, known.error, known.unread) == (digest_of(b"photo"), None, False)
    assert output.known(Source("c", "c")) is None
    output.write([entry("c")])
    output.finish()
    output.close()
    assert names(out) == ["a", "b", "c"]


def test_other_options_or_another_bundle_make_photos_new(out):
    written(out, entry("a"), bad("b", b"noise"))
    output = opened(out, key=RunKey(b"other", b"error"))
    assert output.known(Source("a", "a")) is None
    assert output.known(Source("b", "b")).error == '{"class": "ImageError", "message": "it is bad"}'
    output.close()
    output = opened(out, key=RunKey(b"caption", b"other"))
    assert output.known(Source("b", "b")) is None
    assert output.known(Source("a", "a")) is not None
    output.close()


def test_a_changed_photo_has_its_new_record_in_the_old_place(out):
    written(out, entry("a"), entry("b"), entry("c"))
    out.chmod(0o640)
    written(out, entry("b", b"other", "a cat"), entry("d"))
    assert [json.loads(text) for text in out.read_text().splitlines()[1:]] == [
        ["a", "a dog"],
        ["b", "a cat"],
        ["c", "a dog"],
        ["d", "a dog"],
    ]
    assert stat.S_IMODE(out.stat().st_mode) == 0o640
    assert sorted(os.listdir(out.parent)) == ["out.jsonl", "out.jsonl.ledger"]
    written(out)  # the file is as the ledger says


def test_an_output_that_is_a_link_stays_one(out, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    out.symlink_to(tmp_path / "elsewhere" / "real.jsonl")
    written(out, entry("a"), entry("b"))
    written(out, entry("a", b"other", "a cat"))
    assert out.is_symlink()
    assert names(out) == ["a", "b"]


def test_a_new_record_that_says_the_same_changes_no_byte(out):
    written(out, entry("a"), entry("b"))
    before = out.read_bytes()
    written(out, entry("a", b"saved anew, and the same picture"))
    assert out.read_bytes() == before
    output = opened(out)
    assert output.known(Source("a", "a")).digest == digest_of(b"saved anew, and the same picture")
    output.close()


def test_a_photo_that_is_named_twice_has_one_record(out):
    written(out, entry("a"), entry("./a"), entry("b"))
    assert names(out) == ["a", "b"]


def test_a_photo_that_cannot_be_read_any_more_keeps_its_caption(out):
    written(out, entry("a"), entry("b"))
    before = out.read_bytes()
    written(out, bad("a", None, "a does not exist"))
    assert out.read_bytes() == before
    # One that is damaged now is another photo.
    written(out, bad("a", b"noise", "a is damaged"))
    assert out.read_text().splitlines()[1:] == ['["a", "a is damaged"]', '["b", "a dog"]']
    written(out, entry("a"))
    assert out.read_bytes() == before


def test_a_folder_that_can_be_looked_into_again_loses_its_error(out, tmp_path):
    error = ImageError("the folder cannot be looked into")
    written(out, bad("gone", error=error), entry("a"), bad("missing.jpg"))
    assert names(out) == ["gone", "a", "missing.jpg"]
    written(out)
    assert names(out) == ["gone", "a", "missing.jpg"]
    (tmp_path / "gone").mkdir()
    os.chdir(tmp_path)
    written(out)
    assert names(out) == ["a", "missing.jpg"]


@pytest.fixture(autouse=True)
def _in_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("cut", [1, 5, 12, 25, 1000])
def test_a_shorter_output_is_completed_from_the_ledger(out, cut):
    written(out, entry("a"), entry("b"), finish=False)
    whole = out.read_bytes()
    os.truncate(out, max(0, len(whole) - cut))
    written(out, finish=False)
    assert out.read_bytes() == whole


def test_bytes_that_never_reached_the_disk_are_written_again(out):
    """After a loss of power the last piece may be zeros; what was flushed before it is not."""
    written(out, entry("a"), entry("b"), finish=False)
    whole = out.read_bytes()
    last = len(line(Record("b", "a dog")))
    out.write_bytes(whole[:-last] + bytes(last))
    written(out, finish=False)
    assert out.read_bytes() == whole


def test_an_output_that_is_gone_is_made_again(out):
    written(out, entry("a"), entry("b"))
    whole = out.read_bytes()
    out.unlink()
    written(out)
    assert out.read_bytes() == whole


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
        CaptionError, match=r"cannot be written \(No space left on device\): mend that, and give the same"
    ):
        output.write([entry("b")])
    monkeypatch.undo()
    output.close()
    assert out.read_bytes() == whole
    written(out)
    assert [json.loads(text)[0] for text in Path(out).read_text().splitlines()[1:]] == ["a", "b"]

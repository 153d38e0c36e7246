"""The ledger: rows, transactions, whose file it is, and one process at a time."""

import os
import sqlite3
import subprocess
import sys

import pytest

from caption_rt.errors import OptionsError
from caption_rt.ledger import Ledger, Row, key_of
from running import ENVIRONMENT


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
        with pytest.raises(OptionsError, match="is not a ledger of caption-rt: move it away, or name another"):
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

"""One output file: what a run that is taken up finds, changes and leaves, whatever became of photos and ledger."""

import json
import os
import stat

import pytest

from caption_rt.errors import ImageError
from caption_rt.ledger import DamagedLedger
from caption_rt.outputs import RunKey, digest_of
from caption_rt.records import Record
from caption_rt.sources import Source
from outputs import bad, entry, line, names, opened, written


@pytest.fixture
def out(tmp_path, monkeypatch):
    """An output in the current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "out.jsonl"


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
    assert output.known(Source("b", "b")).error == json.dumps(
        {"class": "ImageError", "reason": "is bad", "message": "it is bad"}
    )
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

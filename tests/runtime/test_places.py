"""Places where nothing can be written, and ledgers that are elsewhere: what is said, and that runs go on."""

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys

import pytest

from caption_rt import cli
from caption_rt.errors import OptionsError
from caption_rt.output_file import FileOutput
from caption_rt.output_sidecars import SidecarOutput
from caption_rt.outputs import RunKey
from outputs import KEY, WRITER, entry, names, written
from running import BUNDLE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="file systems of Linux")


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """The command in an empty folder; its exit code, what is printed, and the lines of standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        capfd.readouterr()
        code = cli.main(["--model", str(BUNDLE), "--device", "cpu", *map(str, arguments)])
        printed = capfd.readouterr()
        return code, printed.out, [line.removeprefix("caption-rt: ") for line in printed.err.splitlines()]

    return call


@pytest.fixture
def read_only(tmp_path, photos):
    """A folder with two photos on which nothing can be written, by root either."""
    folder = tmp_path / "locked"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", folder], capture_output=True, check=False).returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    try:
        for name, photo in zip("ab", photos, strict=False):
            shutil.copy(photo, folder / f"{name}.jpg")
        (folder / "old.csv").write_text("x")
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_each_place_is_named_with_what_to_do(run, read_only):
    """Before a model is loaded."""
    for arguments, sentence in {
        (
            "-o",
            "locked/out.csv",
        ): "the output locked/out.csv cannot be written, because its folder is read-only: change "
        "that, or write it elsewhere",
        (
            "-o",
            "locked/old.csv",
        ): "the output locked/old.csv cannot be written, because it is read-only: change that, or write it elsewhere",
        (
            "-o",
            "a.csv",
            "--ledger",
            "locked/l",
        ): "the ledger locked/l, by which a run goes on where it stopped, cannot be "
        "written there: name a place where it can be with --ledger",
        ("--format", "txt"): "the ledger locked/.caption-rt.ledger, by which a run goes on where it stopped, cannot be "
        "written there: name a place where it can be with --ledger",
        ("-o", "a.csv", "--errors", "locked/e"): "the folder of locked/e is read-only: write --errors elsewhere",
    }.items():
        assert run("locked", "--model", "none", *arguments) == (1, "", [f"error: {sentence}"])
    assert os.listdir() == ["locked"]


def test_photos_on_a_read_only_disk_are_captioned_to_an_output_elsewhere(run, read_only, tmp_path):
    for expected in ("captioned 2 photos in", "captioned 0 photos in"):
        code, _, said = run("locked", "-o", "out.csv")
        assert (code, said[0].startswith(expected)) == (0, True)


def test_sidecars_of_which_some_have_no_place(run, read_only, tmp_path, photos):
    (tmp_path / "open").mkdir()
    shutil.copy(photos[2], tmp_path / "open" / "c.jpg")
    for captioned in (1, 0):
        code, _, said = run("locked", "open", "--format", "txt", "--ledger", "kept")
        assert code == 6
        assert said[0].startswith(f"captioned {captioned} photo")
        assert said[1] == (
            "  2 x has a sidecar that cannot be written (Read-only file system): locked/a.jpg, locked/b.jpg"
        )
    assert (tmp_path / "open" / "c.txt").read_text() == "in dog cat ball cat\n"
    assert sorted(os.listdir(tmp_path)) == ["kept", "locked", "open"]
    _, _, said = run("locked/a.jpg", "--format", "txt", "--ledger", "kept", "--errors", "e.jsonl")
    assert "write one output elsewhere with -o" in (tmp_path / "e.jsonl").read_text()


def test_a_ledger_elsewhere_serves_as_one_beside_the_output(run, tmp_path, photos):
    (tmp_path / "out").mkdir()
    (tmp_path / "kept").mkdir()
    command = [*photos, "-o", "out/a.jsonl", "--ledger", "kept/l"]
    assert run(*command)[0] == 0
    assert (os.listdir("out"), os.listdir("kept")) == (["a.jsonl"], ["l"])
    whole = (tmp_path / "out" / "a.jsonl").read_bytes()
    assert run(*command)[2][0].startswith("captioned 0 photos in")
    os.unlink("out/a.jsonl")
    assert run(*command)[0] == 0
    assert (tmp_path / "out" / "a.jsonl").read_bytes() == whole
    # Without it the output is somebody else's.
    code, _, said = run(*photos, "-o", "out/a.jsonl")
    assert (code, "its ledger is gone" in said[0]) == (2, True)


def test_one_ledger_serves_one_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ledger, out, other = tmp_path / "l", tmp_path / "a.jsonl", tmp_path / "b.jsonl"

    def opened(path, existing="resume"):
        with contextlib.closing(FileOutput(path, "lines", WRITER, existing, KEY, ledger)) as output:
            output.write([entry("a")])
            output.finish()

    opened(out)
    for existing in ("resume", "append", "overwrite"):
        with pytest.raises(OptionsError, match=r"the ledger .*/l is that of a\.jsonl, and not of .*/b\.jsonl: name an"):
            opened(other, existing)
    with pytest.raises(OptionsError, match=r"the ledger .*/l is that of an output file: name another with ledger"):
        SidecarOutput(ledger, "txt", "resume", RunKey(b"", b""))
    assert names(out) == ["a"]
    assert not other.exists()
    sidecars = tmp_path / "s"
    SidecarOutput(sidecars, "txt", "resume", RunKey(b"", b"")).close()
    ledger = sidecars
    for existing in ("resume", "overwrite"):
        with pytest.raises(OptionsError, match=r"the ledger .*/s is that of sidecars: name another"):
            opened(other, existing)


def test_an_empty_ledger_does_not_answer_for_an_output(tmp_path):
    """The output and its own ledger stay as they are, and go on."""
    out, own, empty = tmp_path / "out.jsonl", tmp_path / "out.jsonl.ledger", tmp_path / "empty"
    written(out, entry("a"))
    before = out.read_bytes(), own.read_bytes()
    empty.touch()
    for _ in range(2):
        with pytest.raises(OptionsError, match="exists and was not written by caption-rt, or its ledger is gone"):
            FileOutput(out, "lines", WRITER, "resume", KEY, empty)
    assert (out.read_bytes(), own.read_bytes()) == before
    written(out, entry("b"))
    assert names(out) == ["a", "b"]
    own.unlink()
    with pytest.raises(OptionsError, match="exists and was not written by caption-rt, or its ledger is gone"):
        FileOutput(out, "lines", WRITER, "resume", KEY, empty)
    assert names(out) == ["a", "b"]


def test_what_has_the_name_of_a_ledger_and_is_none(tmp_path, monkeypatch):
    """Beside the output it goes with it; what was named may be anything, and a database is always somebody's."""
    monkeypatch.chdir(tmp_path)
    out, ledger = tmp_path / "out.jsonl", tmp_path / "out.jsonl.ledger"
    ledger.write_text("accounts\n" * 50)
    for existing in ("resume", "skip", "append"):
        with pytest.raises(OptionsError, match="is not a ledger of caption-rt: move it away, or name another"):
            written(out, entry("a"), existing=existing)
    written(out, entry("a"), existing="overwrite")
    assert names(out) == ["a"]
    written(out, entry("b"))
    assert names(out) == ["a", "b"]
    mine = tmp_path / "mine"
    mine.write_text("accounts\n" * 50)
    with pytest.raises(OptionsError, match="is not a ledger of caption-rt"):
        FileOutput(out, "lines", WRITER, "overwrite", KEY, mine)
    assert mine.read_text() == "accounts\n" * 50
    ledger.unlink()
    sqlite3.connect(ledger).execute("CREATE TABLE t (x)").connection.close()
    with pytest.raises(OptionsError, match="is not a ledger of caption-rt"):
        written(out, existing="overwrite")

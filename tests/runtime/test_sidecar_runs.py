"""Runs that write a file beside each photo: whose a sidecar is, and what happens to it."""

import os
import shutil

import pytest
from PIL import Image

from caption_rt import cli
from running import BUNDLE

OTHER_WORDS = ("--max-words", "2")


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """The command over the folder "photos"; its exit code and the first line of its summary, without the time."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, format_name="txt", photos="photos"):
        capfd.readouterr()
        code = cli.main(
            ["--model", str(BUNDLE), "--device", "cpu", photos, "--format", format_name, *map(str, arguments)]
        )
        said = capfd.readouterr().err.splitlines()
        assert all(line.startswith("caption-rt: ") for line in said)
        return code, said

    return call


@pytest.fixture
def folder(tmp_path, photos):
    """Three photos."""
    (tmp_path / "photos").mkdir()
    for name, photo in zip(("a.jpg", "b.jpg", "c.jpg"), photos, strict=True):
        shutil.copy(photo, tmp_path / "photos" / name)
    return tmp_path / "photos"


A, B, C = "runs dog ball\n", "on cat\n", "in dog cat ball cat\n"


def texts(folder, suffix=".txt"):
    return {path.name: path.read_text() for path in sorted(folder.iterdir()) if path.suffix == suffix}


def test_a_file_beside_each_photo(run, folder):
    code, said = run()
    assert code == 0
    assert texts(folder) == {"a.txt": A, "b.txt": B, "c.txt": C}
    assert said[0].startswith("caption-rt: captioned 3 photos in ")
    assert sorted(os.listdir(folder)) == sorted(
        [".caption-rt.ledger", "a.jpg", "a.txt", "b.jpg", "b.txt", "c.jpg", "c.txt"]
    )
    code, said = run()
    assert code == 0
    assert "; 3 had their caption before; 0 failed" in said[0]


def test_photos_of_one_name_each_have_their_own(run, folder):
    with Image.open(folder / "c.jpg") as image:
        image.save(folder / "c.png")
    run()
    assert sorted(texts(folder)) == ["a.txt", "b.txt", "c.jpg.txt", "c.png.txt"]


def test_xmp_and_txt_keep_apart_in_one_ledger(run, folder):
    run()
    assert run(format_name="xmp")[0] == 0
    assert [C.strip() in text for text in texts(folder, ".xmp").values()] == [False, False, True]
    for name in ("txt", "xmp"):
        assert "; 3 had their caption before" in run(format_name=name)[1][0]


def test_by_default_nothing_of_others_is_touched(run, folder):
    (folder / "a.txt").write_text("mine")
    code, said = run()
    assert code == 0
    assert texts(folder) == {"a.txt": "mine", "b.txt": B, "c.txt": C}
    assert "; 1 left alone" in said[0]
    assert run("--max-words", "2")[0] == 0
    assert texts(folder) == {"a.txt": "mine", "b.txt": "dog grass\n", "c.txt": "in dog\n"}


def test_one_that_was_edited_is_left_alone_and_one_that_is_gone_is_written_again(run, folder):
    run()
    (folder / "a.txt").write_text("better words\n")
    (folder / "b.txt").unlink()
    _, said = run()
    assert "; 2 had their caption before; 1 left alone" in said[0]
    assert texts(folder) == {"a.txt": "better words\n", "b.txt": B, "c.txt": C}
    shutil.copy(folder / "c.jpg", folder / "a.jpg")
    run()
    assert texts(folder)["a.txt"] == "better words\n"


def test_a_changed_photo_has_a_new_one(run, folder):
    run()
    shutil.copy(folder / "c.jpg", folder / "a.jpg")
    _, said = run()
    assert "captioned 1 photo in" in said[0]
    assert texts(folder) == {"a.txt": C, "b.txt": B, "c.txt": C}


def test_skip_leaves_whatever_is_there(run, folder):
    run()
    (folder / "b.txt").write_text("mine")
    (folder / "c.txt").unlink()
    _, said = run("--existing", "skip", *OTHER_WORDS)
    assert texts(folder) == {"a.txt": A, "b.txt": "mine", "c.txt": "in dog\n"}
    assert "captioned 1 photo in" in said[0]
    assert "; 2 left alone" in said[0]


def test_append_adds_once(run, folder):
    (folder / "a.txt").write_text("mine")
    run("--existing", "append")
    added = {"a.txt": f"mine\n{A}", "b.txt": B, "c.txt": C}
    assert texts(folder) == added
    _, said = run("--existing", "append")
    assert texts(folder) == added
    assert "; 3 had their caption before" in said[0]
    # Whatever changes, what was somebody else's stays by default.
    shutil.copy(folder / "c.jpg", folder / "a.jpg")
    _, said = run()
    assert texts(folder) == added
    assert "; 1 left alone" in said[0]
    run("--existing", "append")
    assert texts(folder)["a.txt"] == f"mine\n{A}{C}"


def test_overwrite_replaces_once(run, folder):
    for name in "abc":
        (folder / f"{name}.txt").write_text("mine")
    _, said = run("--existing", "overwrite")
    assert texts(folder) == {"a.txt": A, "b.txt": B, "c.txt": C}
    (folder / "c.txt").write_text("mine again")
    _, said = run("--existing", "overwrite")
    assert "captioned 1 photo in" in said[0]
    assert texts(folder)["c.txt"] == C
    _, said = run("--existing", "overwrite", *OTHER_WORDS)
    assert "captioned 3 photos in" in said[0]


def test_an_xmp_file_of_others_keeps_all_else(run, folder):
    theirs = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:Rating="5"/></rdf:RDF></x:xmpmeta>'
    )
    (folder / "a.xmp").write_text(theirs)
    (folder / "b.xmp").write_text("no XMP at all")
    run(format_name="xmp")
    assert texts(folder, ".xmp")["a.xmp"] == theirs
    code, said = run("--existing", "append", format_name="xmp")
    found = texts(folder, ".xmp")
    assert 'xmp:Rating="5"' in found["a.xmp"]
    assert A.strip() in found["a.xmp"]
    # One that cannot be added to costs one record, and stays.
    assert found["b.xmp"] == "no XMP at all"
    assert code == 6
    assert said[1] == "caption-rt:   1 x has an XMP file that nothing can be added to: photos/b.jpg"


def test_a_bad_photo_has_none_and_is_not_tried_twice(run, folder):
    (folder / "bad.jpg").write_bytes(b"noise")
    code, said = run()
    assert code == 6
    assert said[0].endswith("; 1 failed:")
    code, again = run()
    assert code == 6
    assert "captioned 0 photos" in again[0]
    assert again[1:] == said[1:]
    assert "bad.txt" not in texts(folder)


def test_a_sidecar_that_cannot_be_written_costs_its_own_record(run, folder):
    (folder / "b.txt").mkdir()  # not even root can put a file in its place
    code, said = run("--existing", "overwrite")
    assert code == 6
    assert {name: (folder / name).read_text() for name in ("a.txt", "c.txt")} == {"a.txt": A, "c.txt": C}
    assert said[1] == "caption-rt:   1 x has a sidecar that cannot be read (Is a directory): photos/b.jpg"


def test_what_has_no_place_for_a_sidecar(run, folder, monkeypatch):
    code, said = run(photos="http://127.0.0.1:9/a.jpg")
    assert code == 2
    assert said == ["caption-rt: error: http://127.0.0.1:9/a.jpg has no place for a sidecar: save it as a file first"]


def test_a_damaged_ledger(run, folder):
    run()
    ledger = folder / ".caption-rt.ledger"
    ledger.write_bytes(ledger.read_bytes()[:4096] + b"\x55" * (ledger.stat().st_size - 4096))
    code, said = run()
    assert code == 1
    assert said == [
        "caption-rt: error: the ledger photos/.caption-rt.ledger is damaged: delete it; sidecars that are there then "
        "count as not ours"
    ]
    ledger.unlink()
    assert "; 3 left alone" in run()[1][0]


def test_each_shard_has_its_ledger(run, folder):
    assert run("--shard", "1/2")[0] == run("--shard", "2/2")[0] == 0
    assert texts(folder) == {"a.txt": A, "b.txt": B, "c.txt": C}
    assert sorted(path.name for path in folder.glob(".*")) == [
        ".caption-rt.1-of-2.ledger",
        ".caption-rt.2-of-2.ledger",
    ]

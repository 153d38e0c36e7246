"""Fetching a data set from a real server on this machine: what is fetched, checked, unpacked and refused."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from caption_train.cli import main
from caption_train.datasets import load_dataset
from caption_train.errors import DatasetError
from caption_train.fetching import Archive, Job, fetch, plan, read_archives, space_needed
from coco_server import (
    EXPECTED,
    FILES,
    TRAIN,
    VALIDATION,
    command,
    content,
    photos,
    run,
    wait_for,
    zipped,
)
from web import FileServer


def test_everything_is_fetched_checked_and_unpacked(
    tmp_path: Path, server: FileServer, addresses: Callable[..., Path]
) -> None:
    folder = tmp_path / "coco"
    result = run("fetch", "coco", folder, "--addresses", addresses(), "--yes")
    assert result.returncode == 0, result.stderr
    assert content(folder) == EXPECTED
    assert sorted(path.name for path in folder.iterdir()) == [
        ".fetch.lock",
        "annotations",
        "fetched.json",
        "train2014",
        "val2014",
    ]
    ledger = json.loads((folder / "fetched.json").read_text(encoding="utf-8"))
    data = FILES["/zips/train2014.zip"]
    assert ledger["train2014.zip"] == {
        "address": f"{server.address}/zips/train2014.zip",
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "unpacked": {"files": 60, "bytes": sum(map(len, photos("train2014", TRAIN).values()))},
    }
    lines = result.stderr.splitlines()
    total = sum(map(len, FILES.values()))
    assert f"caption-train: to fetch: {total / 1e3:,.1f} kB; it takes " in result.stderr
    assert lines.index(next(line for line in lines if "to fetch:" in line)) == 3  # before anything is fetched
    dataset = load_dataset(folder)
    assert (len(dataset.train), len(dataset.validation), dataset.own_split, dataset.missing) == (60, 10, True, 0)


def test_what_is_there_is_not_fetched_again(
    tmp_path: Path, server: FileServer, addresses: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["fetch", "coco", str(tmp_path / "coco"), "--addresses", str(addresses()), "--yes"]
    assert main([*arguments, "--only", "val"]) == 0
    assert [path for _, path, _ in server.requests] == ["/zips/val2014.zip"]
    assert main([*arguments, "--only", "val"]) == 0
    assert len(server.requests) == 1
    next((tmp_path / "coco" / "val2014").iterdir()).write_bytes(b"")
    assert main([*arguments, "--only", "val"]) == 0
    assert "files of val2014.zip are gone or changed" in caplog.text
    assert len(server.requests) == 2
    assert content(tmp_path / "coco") == photos("val2014", VALIDATION)


def test_files_that_somebody_put_there_do_no_harm(
    tmp_path: Path, server: FileServer, addresses: Callable[..., Path]
) -> None:
    arguments = ["fetch", "coco", str(tmp_path), "--addresses", str(addresses()), "--yes", "--only", "annotations"]
    assert main(arguments) == 0
    (tmp_path / "annotations" / "captions_mine2014.json").write_text("{}")
    for _ in range(2):
        assert main(arguments) == 0
    assert len(server.asked) == 1


def test_nothing_is_fetched_twice(
    tmp_path: Path, server: FileServer, addresses: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Named twice, or planned by two processes, of which one waits until its user says yes."""
    arguments = ["fetch", "coco", str(tmp_path), "--addresses", str(addresses()), "--yes", "--only", "val"]
    archives = read_archives("coco", "2014", ["val"], addresses=addresses())
    jobs = plan(archives, tmp_path)
    assert main([*arguments, "--only", "val"]) == 0
    said = capsys.readouterr().err
    assert said.count("val2014.zip: ") == 1
    fetch(jobs, tmp_path, lambda *_: contextlib.nullcontext(lambda count: None))
    assert len(server.asked) == 1


def test_what_is_next_is_said_where_it_would_work(
    tmp_path: Path, server: FileServer, addresses: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["fetch", "coco", str(tmp_path), "--addresses", str(addresses()), "--yes", "--only"]
    assert main([*arguments, "annotations"]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == "caption-train: done"
    assert main(["report", str(tmp_path), "--no-photos"]) == 0
    assert re.search(r"^train +60 ", capsys.readouterr().out, re.MULTILINE)
    assert main([*arguments, "val"]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == f"caption-train: done; next: caption-train train {tmp_path} RUN"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("{", "line 1: this is not JSON"), ("[]", "is damaged"), ('{"val2014.zip": {"unpacked": 3}}', "is damaged")],
)
def test_a_damaged_ledger(
    tmp_path: Path, addresses: Callable[..., Path], capsys: pytest.CaptureFixture[str], text: str, complaint: str
) -> None:
    (tmp_path / "fetched.json").write_text(text)
    assert main(["fetch", "coco", str(tmp_path), "--addresses", str(addresses()), "--yes", "--only", "val"]) == 6
    said = capsys.readouterr().err
    assert complaint in said
    assert "fetched.json" in said
    assert said.rstrip().endswith(": delete it, and what it says is done is fetched again")


def test_many_gigabytes_are_not_fetched_unasked(
    tmp_path: Path, server: FileServer, addresses: Callable[..., Path]
) -> None:
    result = run("fetch", "coco", tmp_path / "coco", "--addresses", addresses())
    assert (result.returncode, result.stderr.splitlines()[-1]) == (
        2,
        "caption-train: error: nobody is there to be asked whether to go on: give --yes to agree",
    )
    assert "train2014.zip: " in result.stderr
    assert (server.requests, (tmp_path / "coco").exists()) == ([], False)


@pytest.mark.skipif(sys.platform == "win32", reason="terminals of POSIX")
@pytest.mark.parametrize(("answer", "fetched"), [(b"n\n", False), (b"y\n", True)])
def test_a_person_is_asked(
    tmp_path: Path, server: FileServer, addresses: Callable[..., Path], answer: bytes, fetched: bool
) -> None:
    import pty

    ours, theirs = pty.openpty()
    arguments = command("fetch", "coco", tmp_path / "coco", "--addresses", addresses(), "--only", "val")
    with subprocess.Popen(arguments, stdin=theirs, stderr=subprocess.PIPE, text=True) as child:
        os.close(theirs)
        os.write(ours, answer)
        assert child.stderr is not None
        said = child.stderr.read()
    os.close(ours)
    assert child.returncode == 0
    assert "Go on? [y/N]" in said
    assert ("nothing was fetched" in said, bool(server.requests)) == (not fetched, fetched)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"missing": True}, "zips/val2014.zip cannot be fetched: the server answers 404"),
        ({"val": "0" * 64}, "val2014.zip is damaged, its SHA-256 is "),
        ({"longer": True}, "bytes on the server, and "),
        ({"page": True}, "val2014.zip is no zip file, or damaged"),
        ({"other": True}, "val2014.zip holds no files of the name val2014/*.jpg"),
    ],
)
def test_what_is_not_the_archive(
    tmp_path: Path,
    server: FileServer,
    addresses: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    complaint: str,
) -> None:
    if "page" in changes:
        server.files["/zips/val2014.zip"] = b"<html>"
    if "other" in changes:
        server.files["/zips/val2014.zip"] = zipped({"readme.txt": b"see elsewhere"})
    file = addresses(**{name: text for name, text in changes.items() if isinstance(text, str)})
    if "missing" in changes:
        del server.files["/zips/val2014.zip"]
    if "longer" in changes:
        server.files["/zips/val2014.zip"] += b"0"
    assert main(["fetch", "coco", str(tmp_path / "coco"), "--addresses", str(file), "--yes", "--only", "val"]) == 6
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("caption-train: error: ")
    assert complaint in said
    assert not list((tmp_path / "coco").glob("val2014/*"))


def test_without_a_published_checksum_the_first_download_is_held_against_later_ones(
    tmp_path: Path, server: FileServer, addresses: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = addresses(sizes=False, checksums=False)
    arguments = ["fetch", "coco", str(tmp_path), "--addresses", str(file), "--yes", "--only", "val"]
    assert main(arguments) == 0
    shutil.rmtree(tmp_path / "val2014")
    original = server.files["/zips/val2014.zip"]
    server.files["/zips/val2014.zip"] = zipped(photos("val2014", range(5)))
    assert main(arguments) == 6
    assert "val2014.zip is another file than the one that was fetched before" in capsys.readouterr().err
    server.files["/zips/val2014.zip"] = original
    assert main(arguments) == 0
    assert content(tmp_path) == photos("val2014", VALIDATION)


def test_archives_that_are_there_or_are_to_stay(
    tmp_path: Path, server: FileServer, addresses: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["fetch", "coco", str(tmp_path), "--addresses", str(addresses()), "--yes"]
    mine = tmp_path / "val2014.zip"
    mine.write_bytes(FILES["/zips/val2014.zip"][:-1] + b"x")
    assert main([*arguments, "--only", "val"]) == 6
    assert f"delete {mine} to have it fetched again" in capsys.readouterr().err
    mine.write_bytes(FILES["/zips/val2014.zip"])
    assert main([*arguments, "--only", "val"]) == 0
    assert (server.requests, mine.exists()) == ([], True)  # somebody put it there
    mine.unlink()
    for fetched, photo in enumerate(sorted((tmp_path / "val2014").iterdir())[:2], 1):
        photo.unlink()
        assert main([*arguments, "--only", "val"]) == 0
        assert (len(server.asked), mine.exists()) == (1, fetched == 2)
        mine.write_bytes(FILES["/zips/val2014.zip"])  # as well where it was fetched before
    server.requests.clear()
    assert main([*arguments, "--only", "train", "--keep-archives"]) == 0
    assert (tmp_path / "train2014.zip").read_bytes() == FILES["/zips/train2014.zip"]


def test_a_mirror_takes_the_place_of_the_publishers_server(server: FileServer) -> None:
    official = read_archives("coco", "2017", ["annotations", "train", "val"])
    assert [archive.address for archive in official] == [
        "http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
        "http://images.cocodataset.org/zips/train2017.zip",
        "http://images.cocodataset.org/zips/val2017.zip",
    ]
    assert [archive.bytes for archive in official] == [252907541, 19336861798, 815585330]
    assert all(archive.sha256 and len(archive.sha256) == 64 for archive in official)
    (mirrored,) = read_archives("coco", "2014", ["train"], mirror=f"{server.address}/data/coco")
    assert mirrored.address == f"{server.address}/data/coco/zips/train2014.zip"
    assert mirrored.sha256 == read_archives("coco", "2014", ["train"])[0].sha256


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[2014", "this is not TOML"),
        ("", r"says nothing of \[2014.val\]"),
        ("2014 = 3", r"says nothing of \[2014.val\]"),
        ("[2014.val]\nfiles = 'a/*'", r"\[2014.val\]: address is missing"),
        ("[2014.val]\naddress = 'a.zip'\nfiles = 'a/*'", "a.zip is no http or https address"),
        ("[2014.val]\naddress = 'file:///etc/passwd'\nfiles = 'a/*'", "is no http or https address"),
        ("[2014.val]\naddress = 'http:///b.zip'\nfiles = 'a/*'", "is no http or https address"),
        ("base = 'http://[::1'\n[2014.val]\naddress = 'b.zip'\nfiles = 'a/*'", "is no http or https address"),
        ("[2014.val]\naddress = 'http://[::1/b.zip'\nfiles = 'a/*'", "is no http or https address"),
        ("[2014.val]\naddress = 'http://a/'\nfiles = 'a/*'", "is no http or https address of a file"),
        ("[2014.val]\naddress = 'http://a/b.zip'\nfiles = '../*'", "leads out of the folder"),
        ("[2014.val]\naddress = 'http://a/b.zip'\nfiles = 'a/*'\nbytes = '3'", "bytes = '3' is not understood"),
        ("[2014.val]\naddress = 'http://a/b.zip'\nfiles = 'a/*'\nmd5 = '3'", "md5 = '3' is not understood"),
    ],
)
def test_addresses_that_are_malformed(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "a.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DatasetError, match=complaint):
        read_archives("coco", "2014", ["val"], addresses=path)


def test_too_small_a_disk_is_seen_beforehand(
    tmp_path: Path,
    server: FileServer,
    addresses: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usage = namedtuple("usage", "total used free")
    size = len(FILES["/zips/val2014.zip"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 2 * size - 1))
    arguments = ["fetch", "coco", str(tmp_path / "coco"), "--addresses", str(addresses()), "--yes", "--only", "val"]
    assert main(arguments) == 6
    assert "GB are needed, and" in capsys.readouterr().err
    assert server.requests == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 2 * size))
    assert main(arguments) == 0


def test_the_most_that_lies_on_the_disk_at_a_time() -> None:
    jobs = [Job(Archive(f"http://a/{i}.zip", "*"), size, held, 0) for i, (size, held) in enumerate([(10, 0), (4, 3)])]
    assert space_needed(jobs, keep_archives=False) == 20  # the first archive and its files; then 10 + 1 + 4
    assert space_needed(jobs, keep_archives=True) == 25
    assert space_needed(jobs[:0], keep_archives=True) == 0


def test_one_process_fetches_at_a_time(
    tmp_path: Path, server: FileServer, addresses: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["fetch", "coco", str(tmp_path), "--addresses", str(addresses()), "--yes", "--only", "train"]
    server.drip = 0.03
    first = threading.Thread(target=lambda: run(*arguments))
    first.start()
    wait_for((tmp_path / "train2014.zip.part").exists)
    code = main(arguments)
    said = capsys.readouterr().err
    server.drip = None
    first.join()
    if sys.platform != "win32":
        assert (code, said.splitlines()[-1]) == (
            6,
            f"caption-train: error: another process is fetching into {tmp_path}; wait for it",
        )

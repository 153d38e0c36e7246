"""Fetching that is killed in the middle, or from a server that hangs up, changes its files or is not there."""

import json
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from caption_train import download as download_module
from caption_train.cli import main
from caption_train.errors import DatasetError
from coco_server import FILES, TRAIN, VALIDATION, content, photos, run, started, wait_for, zipped
from web import FileServer


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_stopped_in_the_middle_of_a_download(
    tmp_path: Path, server: FileServer, addresses: Callable[..., Path], how: signal.Signals
) -> None:
    arguments = ["fetch", "coco", tmp_path / "coco", "--addresses", addresses(), "--yes", "--only", "train"]
    part = tmp_path / "coco" / "train2014.zip.part"
    server.drip = 0.02
    with started(*arguments) as child:
        wait_for(lambda: part.exists() and part.stat().st_size > 8000)
        child.send_signal(how)
        _, said = child.communicate(timeout=60)
    if how == signal.SIGINT:
        assert child.returncode == 130
        assert said.splitlines()[-1] == "caption-train: error: interrupted; give the same command again to go on"
    else:
        assert child.returncode == -signal.SIGKILL
    assert "Traceback" not in said
    held = part.stat().st_size
    assert 8000 < held < len(FILES["/zips/train2014.zip"])
    server.drip = None
    result = run(*arguments)
    assert result.returncode == 0
    assert f"of which {held / 1e3:.1f} kB are here" in result.stderr
    assert server.asked == [None, f"bytes={held}-"]
    assert content(tmp_path / "coco") == photos("train2014", TRAIN)


KILLED = """
import os, signal, sys
from caption_train import cli
replace, left = os.replace, int(sys.argv.pop(1))
def count(source, target):
    global left
    if str(target).endswith((".jpg", ".zip")):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = count
sys.exit(cli.main())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(("moment", "there"), [(0, 0), (1, 0), (24, 23), (60, 59)])
def test_killed_before_a_file_is_put_in_place(
    tmp_path: Path, server: FileServer, addresses: Callable[..., Path], moment: int, there: int
) -> None:
    arguments = ["fetch", "coco", str(tmp_path / "coco"), "--addresses", str(addresses()), "--yes", "--only", "train"]
    child = [sys.executable, "-c", textwrap.dedent(KILLED), str(moment), *arguments]
    assert subprocess.run(child, capture_output=True, check=False).returncode == -signal.SIGKILL
    found = list((tmp_path / "coco").glob("train2014/*.jpg"))
    assert len(found) == there
    before = {path: path.stat().st_ino for path in found}
    if found:
        found[0].write_bytes(bytes(found[0].stat().st_size))  # as a power cut may leave one: as long, and wrong
        del before[found[0]]
    assert main(arguments) == 0
    assert len(server.requests) == 1  # what had arrived was not fetched again
    assert content(tmp_path / "coco") == photos("train2014", TRAIN)
    assert {path: path.stat().st_ino for path in before} == before  # nor unpacked again
    assert not list((tmp_path / "coco").glob("train2014/.*"))


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_killed_from_outside_while_it_unpacks(tmp_path: Path, server: FileServer) -> None:
    many = {f"train2014/{i:05d}.jpg": random.Random(i).randbytes(50) for i in range(4000)}
    server.files["/zips/train2014.zip"] = zipped(many)
    folder = tmp_path / "coco"
    table = f'base = "{server.address}"\n[2014.train]\naddress = "zips/train2014.zip"\nfiles = "train2014/*.jpg"\n'
    (tmp_path / "a.toml").write_text(table, encoding="utf-8")
    arguments = ["fetch", "coco", str(folder), "--addresses", str(tmp_path / "a.toml"), "--yes", "--only", "train"]
    with started(*arguments) as child:
        wait_for(lambda: (folder / "train2014" / "00100.jpg").exists())
        child.kill()
        child.communicate()
    assert 100 < len(list(folder.glob("train2014/*.jpg"))) < 4000
    assert main(arguments) == 0
    assert content(folder) == many


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses before each new attempt, which nobody waits for."""
    found: list[float] = []
    # Not `time.sleep` itself, which threads of other tests may be using.
    monkeypatch.setattr(download_module, "time", SimpleNamespace(**{**vars(time), "sleep": found.append}))
    return found


@pytest.mark.usefixtures("pauses")
def test_a_server_that_does_not_resume(tmp_path: Path, server: FileServer, addresses: Callable[..., Path]) -> None:
    server.ranges, server.break_after = False, [5000]
    assert main(["fetch", "coco", str(tmp_path), "--addresses", str(addresses()), "--yes", "--only", "train"]) == 0
    assert server.asked == [None, "bytes=5000-"]
    assert content(tmp_path) == photos("train2014", TRAIN)


@pytest.mark.usefixtures("pauses")
def test_a_server_that_states_no_length_and_breaks_off(
    tmp_path: Path, server: FileServer, addresses: Callable[..., Path]
) -> None:
    server.lengths, server.break_after = False, [5000]
    assert main(["fetch", "coco", str(tmp_path), "--addresses", str(addresses()), "--yes", "--only", "train"]) == 0
    assert server.asked == [None, "bytes=5000-"]
    assert content(tmp_path) == photos("train2014", TRAIN)


@pytest.mark.parametrize("name", ["val2014.zip.part", "val2014.zip.part.json"])
def test_the_disks_trouble_is_not_the_networks(
    tmp_path: Path,
    server: FileServer,
    addresses: Callable[..., Path],
    pauses: list[float],
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    (tmp_path / name).mkdir()  # a folder where a file is to be stands for any trouble of the disk
    (tmp_path / name / "x").touch()
    assert main(["fetch", "coco", str(tmp_path), "--addresses", str(addresses()), "--yes", "--only", "val"]) == 6
    assert "val2014.zip.part cannot be written (Is a directory): make room, and" in capsys.readouterr().err
    assert (len(server.asked), pauses) == (1, [])
    assert not list(tmp_path.glob(".*.tmp"))


def test_what_has_arrived_from_elsewhere_is_not_here(
    tmp_path: Path, server: FileServer, addresses: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    part = tmp_path / "val2014.zip.part"
    part.write_bytes(FILES["/zips/val2014.zip"][:3000])
    note = {"address": "http://images.cocodataset.org/zips/val2014.zip", "validator": None, "bytes": None}
    part.with_suffix(".part.json").write_text(json.dumps(note), encoding="utf-8")
    assert main(["fetch", "coco", str(tmp_path), "--addresses", str(addresses()), "--yes", "--only", "val"]) == 0
    assert "are here" not in capsys.readouterr().err
    assert server.asked == [None]
    assert content(tmp_path) == photos("val2014", VALIDATION)


def test_a_file_that_changed_on_the_server_meanwhile(
    tmp_path: Path, server: FileServer, addresses: Callable[..., Path]
) -> None:
    arguments = ["fetch", "coco", str(tmp_path), "--yes", "--only", "val"]
    part = tmp_path / "val2014.zip.part"
    part.write_bytes(b"x" * 700)
    note = {"address": f"{server.address}/zips/val2014.zip", "validator": '"v0"', "bytes": 10**6}
    part.with_suffix(".part.json").write_text(json.dumps(note), encoding="utf-8")
    assert main([*arguments, "--addresses", str(addresses())]) == 0
    assert server.asked == ["bytes=700-"]  # with If-Range, to which the server sends the whole
    assert content(tmp_path) == photos("val2014", VALIDATION)


@pytest.mark.usefixtures("pauses")
@pytest.mark.parametrize("beginning", [b"x" * 10**6, b"x" * 700])
def test_a_beginning_of_something_else(
    tmp_path: Path, server: FileServer, addresses: Callable[..., Path], beginning: bytes
) -> None:
    """Longer than the file, or of the right length and the right address but with wrong bytes."""
    arguments = ["fetch", "coco", str(tmp_path), "--yes", "--only", "val", "--addresses", str(addresses())]
    part = tmp_path / "val2014.zip.part"
    part.write_bytes(beginning)
    note = {"address": f"{server.address}/zips/val2014.zip", "validator": None, "bytes": None}
    part.with_suffix(".part.json").write_text(json.dumps(note), encoding="utf-8")
    codes = [main(arguments)]
    if codes == [6]:  # the checksum found it
        assert not part.exists()
        codes.append(main(arguments))
    assert codes[-1] == 0
    assert content(tmp_path) == photos("val2014", VALIDATION)


def test_a_connection_that_breaks_is_taken_up_again(
    tmp_path: Path, server: FileServer, addresses: Callable[..., Path], pauses: list[float]
) -> None:
    server.break_after, server.failures = [3000, 4000, 0, 0, 0, 1000], [503]
    assert main(["fetch", "coco", str(tmp_path), "--addresses", str(addresses()), "--yes", "--only", "train"]) == 0
    starts = [None, None, 3000, 7000, 7000, 7000, 7000, 8000]
    assert server.asked == [None if start is None else f"bytes={start}-" for start in starts]
    assert pauses == [2, 1, 1, 2, 4, 8, 1]
    assert content(tmp_path) == photos("train2014", TRAIN)


@pytest.mark.usefixtures("pauses")
def test_a_server_that_never_goes_on(tmp_path: Path, server: FileServer, addresses: Callable[..., Path]) -> None:
    server.break_after = [3000, 0, 0, 0, 0, 0]
    result = main(["fetch", "coco", str(tmp_path), "--addresses", str(addresses()), "--yes", "--only", "train"])
    assert (result, len(server.asked)) == (6, 5)


@pytest.mark.usefixtures("pauses")
def test_a_host_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"cannot be fetched from 127.0.0.1 \(Connection refused\)"):
        download_module.download("http://127.0.0.1:9/a.zip", tmp_path / "a.zip")

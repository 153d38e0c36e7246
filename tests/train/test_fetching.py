"""Fetching a data set from a real server on this machine, killed and interrupted in the middle."""

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from caption_train import download as download_module
from caption_train.cli import main
from caption_train.datasets import load_dataset
from caption_train.errors import DatasetError
from caption_train.fetching import Archive, Job, read_archives, space_needed
from web import FileServer

PROGRAM = "import sys; from caption_train.cli import main; sys.exit(main())"
TENSORFLOW = ("h5py", "keras", "matplotlib", "pycocoevalcap", "tensorflow")
NAMES = {"annotations": "annotations_trainval2014.zip", "train": "train2014.zip", "val": "val2014.zip"}


def photo(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.frombytes("RGB", (24, 24), random.Random(seed).randbytes(1728)).save(buffer, "JPEG")
    return buffer.getvalue()


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def captions(subset: str, numbers: range) -> bytes:
    images = [{"id": i, "file_name": f"COCO_{subset}_{i:012d}.jpg"} for i in numbers]
    texts = [{"id": i, "image_id": i, "caption": f"A dog number {i}."} for i in numbers]
    return json.dumps({"images": images, "annotations": texts}).encode()


def photos(subset: str, numbers: range) -> dict[str, bytes]:
    return {f"{subset}/COCO_{subset}_{i:012d}.jpg": photo(i) for i in numbers}


TRAIN, VALIDATION = range(60), range(60, 70)
FILES = {
    "/annotations/annotations_trainval2014.zip": zipped(
        {
            "annotations/instances_train2014.json": b"{}" * 1000,
            "annotations/captions_train2014.json": captions("train2014", TRAIN),
            "annotations/captions_val2014.json": captions("val2014", VALIDATION),
        },
        zipfile.ZIP_DEFLATED,
    ),
    "/zips/train2014.zip": zipped({"train2014/": b"", **photos("train2014", TRAIN)}),
    "/zips/val2014.zip": zipped(photos("val2014", VALIDATION)),
}


@pytest.fixture
def server() -> Iterator[FileServer]:
    server = FileServer(dict(FILES))
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def addresses(tmp_path: Path, server: FileServer) -> Callable[..., Path]:
    """A file of addresses; what is left out of it, or changed, by keyword."""

    def write(*, sizes: bool = True, checksums: bool = True, **changes: str) -> Path:
        lines = [f'base = "{server.address}"']
        for part, name in NAMES.items():
            (path,) = [path for path in FILES if path.endswith(f"/{name}")]
            data = server.files[path]
            files = "annotations/captions_*2014.json" if part == "annotations" else f"{name[:-4]}/*.jpg"
            lines += [f"[2014.{part}]", f'address = "{path[1:]}"', f'files = "{files}"']
            lines += [f"bytes = {len(data)}"] if sizes else []
            digest = changes.get(part, hashlib.sha256(data).hexdigest())
            lines += [f'sha256 = "{digest}"'] if checksums else []
        path = tmp_path / "addresses.toml"
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return write


def command(*arguments: object) -> list[str]:
    """`caption-train` as a process of its own, on a machine without TensorFlow."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({TENSORFLOW}, None)); "
    return [sys.executable, "-c", blocked + PROGRAM, *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        command(*arguments), capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=60
    )
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    return result


def content(folder: Path) -> dict[str, bytes]:
    """All that was unpacked."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.parent != folder]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


EXPECTED = {
    **photos("train2014", TRAIN),
    **photos("val2014", VALIDATION),
    "annotations/captions_train2014.json": captions("train2014", TRAIN),
    "annotations/captions_val2014.json": captions("val2014", VALIDATION),
}


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


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def started(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, text=True)


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


@pytest.mark.usefixtures("pauses")
def test_a_host_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"cannot be fetched from 127.0.0.1 \(Connection refused\)"):
        download_module.download("http://127.0.0.1:9/a.zip", tmp_path / "a.zip")


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

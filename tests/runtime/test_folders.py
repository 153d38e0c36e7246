"""Runs over folders, lists and addresses, from the command line to what is in the output afterwards."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from caption_rt import cli
from running import BUNDLE, ENVIRONMENT, caption_rt, make_photos


@pytest.fixture
def run(tmp_path, monkeypatch, capfdbinary):
    """Run the command in an empty folder with the tiny bundle; in this process, but where standard input is needed."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, text=True, **keywords):
        if keywords:
            return caption_rt(*arguments, text=text, **keywords)
        capfdbinary.readouterr()
        texts = ["--model", str(BUNDLE), "--device", "cpu", *map(os.fspath, arguments)]
        code = cli.main(texts)
        printed = capfdbinary.readouterr()
        if text:
            printed = printed.out.decode(), printed.err.decode()
        return subprocess.CompletedProcess(texts, code, *printed)

    return call


def complaints(done):
    """The lines of standard error; each must be one of ours."""
    lines = done.stderr.splitlines()
    assert all(line.startswith("caption-rt: error: ") for line in lines), done.stderr
    return [line.removeprefix("caption-rt: error: ") for line in lines]


def bad_photos(folder, good):
    """Bad photos by path, with what is said of them."""
    data = good.read_bytes()
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "truncated.jpg").write_bytes(data[: len(data) // 3])
    (folder / "text.jpg").write_bytes(b"this is a text\n" * 50)
    sentences = {"empty.jpg": "is empty", "truncated.jpg": "is cut short", "text.jpg": "holds text"}
    return {folder / name: said for name, said in {**sentences, "missing.jpg": "does not exist"}.items()}


def records(text):
    return [json.loads(line) for line in text.splitlines()]


def test_a_folder_goes_to_standard_output_with_a_summary(run, photos):
    done = run(photos[0].parent, "--exclude", "astro*")
    assert done.returncode == 0
    assert [line.split("\t") for line in done.stdout.splitlines()] == [
        [str(photos[1]), "on cat"],
        [str(photos[2]), "in dog cat ball cat"],
    ]
    assert done.stderr.startswith("caption-rt: captioned 2 photos in ")
    assert done.stderr.endswith("; 0 failed\n")


@pytest.mark.parametrize("name", ["jsonl", "csv", "tsv", "html", "text"])
def test_each_format_goes_to_a_file_and_to_standard_output(run, photos, tmp_path, name):
    arguments = ["--format", name, *photos]
    done = run(*arguments, "-o", "out.any")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith("caption-rt: captioned 3 photos in ")
    printed = run(*arguments, text=False)
    assert (printed.returncode, printed.stderr) == (0, b"")
    assert printed.stdout == (tmp_path / "out.any").read_bytes()
    assert printed.stdout.count(b"in dog cat ball cat") == 1
    assert run(*arguments, "-o", "-", text=False).stdout == printed.stdout
    again = run(*arguments, "-o", "out.any")
    assert again.returncode == 0
    assert "captioned 0 photos" in again.stderr
    assert "; 3 had their caption before" in again.stderr
    assert printed.stdout == (tmp_path / "out.any").read_bytes()


# Log-probabilities differ in the last digits with the photos that share a batch.
ALONE = ("--batch-size", "1")


@pytest.mark.parametrize("name", ["jsonl", "csv", "tsv", "html"])
def test_what_is_there_already(run, photos, tmp_path, name):
    out = tmp_path / f"out.{name}"

    def lines(*photos):
        (tmp_path / f"fresh.{name}").unlink(missing_ok=True)
        (tmp_path / f"fresh.{name}.ledger").unlink(missing_ok=True)
        assert run(*photos, "-o", f"fresh.{name}", *ALONE).returncode == 0
        return (tmp_path / f"fresh.{name}").read_bytes()

    both, first = lines(*photos[:2]), lines(photos[0])
    out.write_bytes(first)  # as if somebody else had written it
    done = run(photos[1], "-o", out)
    assert done.returncode == 2
    assert complaints(done) == [
        f"the output {out} exists and was not written by caption-rt, or its ledger is gone: choose another, or "
        "--existing append or overwrite"
    ]
    assert run(photos[1], "-o", out, "--existing", "append", *ALONE).returncode == 0
    assert out.read_bytes() == both
    assert run(photos[1], "-o", out, "--existing", "append", *ALONE).returncode == 0
    assert out.read_bytes() == both
    done = run(photos[1], photos[2], "-o", out, "--existing", "skip", "--max-words", "2")
    assert "captioned 1 photo in" in done.stderr
    assert out.read_bytes().startswith(both)
    assert run(photos[1], "-o", out, "--existing", "overwrite", *ALONE).returncode == 0
    assert out.read_bytes() == lines(photos[1])
    out.write_bytes(out.read_bytes() + b"mine\n")
    done = run(*photos, "-o", out)
    assert done.returncode == 2
    assert "was changed since caption-rt wrote it: choose another, or --existing append" in complaints(done)[0]


def test_an_output_that_was_added_to_and_is_gone(run, photos, tmp_path):
    """What others had written cannot be written again from the ledger, and a refusal leaves no empty file."""
    out = tmp_path / "out.jsonl"
    out.write_bytes(b'{"mine": 1}\n')
    assert run(photos[0], "-o", out, "--existing", "append").returncode == 0
    out.unlink()
    for _ in range(2):
        done = run(photos[0], "-o", out)
        assert done.returncode == 2
        assert complaints(done)[0].startswith(f"the output {out} is gone, and with it what others had written there")
        assert not out.exists()
    assert run(photos[0], "-o", out, "--existing", "overwrite").returncode == 0
    assert len(records(out.read_text())) == 1


def test_changed_and_deleted_photos(run, photos, tmp_path):
    (tmp_path / "p").mkdir()
    for name, photo in zip("abc", photos, strict=True):
        shutil.copy(photo, tmp_path / "p" / f"{name}.jpg")
    assert run("p", "-o", "out.jsonl").returncode == 0
    first = records((tmp_path / "out.jsonl").read_text())
    shutil.copy(photos[2], tmp_path / "p" / "a.jpg")
    (tmp_path / "p" / "b.jpg").unlink()
    done = run("p", "-o", "out.jsonl")
    assert "captioned 1 photo in" in done.stderr
    second = records((tmp_path / "out.jsonl").read_text())
    # The changed one in its place, and the deleted one's record stays.
    assert [record["path"] for record in second] == ["p/a.jpg", "p/b.jpg", "p/c.jpg"]
    assert second[0] == {**first[2], "path": "p/a.jpg"}
    assert second[1:] == first[1:]


def test_the_same_photos_by_other_names_and_after_a_move(run, photos, tmp_path):
    (tmp_path / "all" / "p").mkdir(parents=True)
    shutil.copy(photos[0], tmp_path / "all" / "p" / "a.jpg")
    assert run("all/p", "-o", "all/out.csv").returncode == 0
    (tmp_path / "all").rename(tmp_path / "moved")
    for arguments in (["moved/p"], ["moved/../moved/p/a.jpg"], [tmp_path / "moved" / "p"]):
        assert "; 1 had their caption before" in run(*arguments, "-o", "moved/out.csv").stderr


def test_paths_and_bytes_on_standard_input(run, photos, tmp_path):
    listed = "\n".join(map(str, photos[1:])).encode()
    done = run("-", input=listed, text=False)
    assert done.stdout.decode().splitlines() == [
        f"{photos[1]}\ton cat",
        f"{photos[2]}\tin dog cat ball cat",
    ]
    shutil.copy(photos[2], tmp_path / "two\nlines.jpg")
    done = run("-", "-0", "--json", input=b"two\nlines.jpg\0missing\nphoto.jpg\0", text=False)
    assert done.returncode == 6
    assert [record["path"] for record in records(done.stdout.decode())] == ["two\nlines.jpg", "missing\nphoto.jpg"]
    done = run("-", input=photos[2].read_bytes(), text=False)
    assert (done.stdout, done.stderr) == (b"in dog cat ball cat\n", b"")
    done = run("-", input=photos[2].read_bytes()[:3000], text=False)
    assert (done.returncode, done.stdout) == (4, b"")
    assert done.stderr.startswith(b"caption-rt: error: standard input is cut short")


NOTHING = "note: no path came on standard input, or none that leads to a photo"


def test_nothing_on_standard_input(run, tmp_path):
    """A list may be empty; where one photo may have been meant, it is an error."""
    done = run("-", input="")
    assert (done.returncode, done.stdout) == (4, "")
    assert complaints(done) == ["standard input is empty: neither a photo nor a list of paths came"]
    (tmp_path / "empty").mkdir()
    for given, arguments in (
        ("", ["-", "-0"]),
        ("", ["-", "-o", "out.jsonl"]),
        ("\n", ["-"]),
        ("empty\n", ["-"]),
        ("", ["-", "--format", "txt"]),
    ):
        done = run(*arguments, input=given)
        assert (done.returncode, done.stdout) == (0, "")
        assert done.stderr.splitlines()[0] == f"caption-rt: {NOTHING}"
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_a_folder_may_be_empty(run, tmp_path, photos):
    """For a job that runs every night it is no mistake, and the output is there for what comes after it."""
    (tmp_path / "p").mkdir()
    done = run("p", "-o", "out.csv")
    assert (done.returncode, done.stdout) == (0, "")
    note, summary = done.stderr.splitlines()
    assert note == "caption-rt: note: there is no photo in p: files are taken that end as photos do (.jpg, .png)"
    assert summary.endswith("; 0 failed")
    assert (tmp_path / "out.csv").read_text().startswith("path,status,caption,")
    shutil.copy(photos[0], tmp_path / "p" / "a.jpg")
    assert "note: " not in run("p", "-o", "out.csv").stderr
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 2
    done = run("p", "--exclude", "*")
    assert done.returncode == 0
    assert "(.jpg, .png) and that --include and --exclude let pass\n" in done.stderr


def test_photos_that_are_piped_in_one_after_the_other_all_have_their_record(run, photos, tmp_path):
    """Standard input is known by what it holds."""
    out = tmp_path / "out.csv"

    def pipe(data, *arguments):
        done = run("-", "-o", out, *arguments, input=data, text=False)
        lines = out.read_bytes().splitlines()
        return done.returncode, len(lines) - 1, done.stderr.decode()

    counts = [pipe(photo.read_bytes())[:2] for photo in (*photos[:2], photos[0])]
    assert counts == [(0, 1), (0, 2), (0, 2)]
    # Bad ones as well, those among them of which only the beginning was read.
    for count, data in enumerate((b"\0noise", b"\0other noise", b"\0noise"), 3):
        assert pipe(data)[:2] == (4, min(count, 4))
    for count, photo in enumerate(photos[:2], 5):
        code, lines, said = pipe(photo.read_bytes(), "--max-bytes", "1k")
        assert (code, lines) == (4, count)
        assert "1 x is too large a file: -" in said
    texts = [line for line in out.read_text().splitlines() if "runs dog ball" in line or "on cat" in line]
    assert len(texts) == 2


def test_a_photo_that_is_named_several_times_is_one_photo(run, photos, tmp_path):
    (tmp_path / "p").mkdir()
    for name, photo in zip("ab", photos, strict=False):
        shutil.copy(photo, tmp_path / "p" / f"{name}.jpg")
    names = ["p", "p/a.jpg", "./p/a.jpg", tmp_path / "p" / "a.jpg", "p", "none.jpg", "./none.jpg"]
    for where in (["-o", "out.jsonl"], ["--format", "txt"]):
        done = run(*names, *where, "--errors", "e.jsonl")
        assert done.returncode == 6
        assert done.stderr.startswith("caption-rt: captioned 2 photos in ")
        assert done.stderr.splitlines()[0].endswith("; 1 failed:")
        assert len(records((tmp_path / "e.jsonl").read_text())) == 1
    again = run(*names, "-o", "out.jsonl")
    assert "captioned 0 photos" in again.stderr
    assert "; 2 had their caption before; 1 failed" in again.stderr
    listed = run("-", "-o", "list.csv", input="p/a.jpg\n" * 5 + "p\n")
    assert "captioned 2 photos in" in listed.stderr
    # Lines go to standard output as often as asked for.
    assert len(run("p/a.jpg", "p/a.jpg").stdout.splitlines()) == 2


def test_shards_part_the_photos(run, photos, tmp_path):
    (tmp_path / "p").mkdir()
    for number in range(8):
        shutil.copy(photos[number % 3], tmp_path / "p" / f"{number}.jpg")
    found = []
    for part in range(1, 5):
        done = run("p", "--shard", f"{part}/4", "-o", f"{part}.jsonl")
        assert done.returncode == 0
        found += [record["path"] for record in records((tmp_path / f"{part}.jsonl").read_text())]
    assert sorted(found) == [f"p/{number}.jpg" for number in range(8)]
    # A part without photos is no mistake.
    done = run("p/1.jpg", "--shard", "1/1000")
    assert (done.returncode, done.stdout) == (0, "")
    assert "note: " not in done.stderr


def test_the_file_of_errors_and_the_exit_code_are_those_of_an_unbroken_run(run, photos, tmp_path):
    bad = bad_photos(tmp_path, photos[0])
    arguments = [*bad, photos[0], "-o", "out.csv", "--errors", "errors.jsonl"]
    done = run(*arguments)
    assert done.returncode == 6
    errors = records((tmp_path / "errors.jsonl").read_text())
    assert [error["path"] for error in errors] == [str(path) for path in bad]
    assert {error["class"] for error in errors} == {"ImageError"}
    assert all(sentence in error["message"] for error, sentence in zip(errors, bad.values(), strict=True))
    again = run(*arguments)
    assert again.returncode == 6
    assert "captioned 0 photos" in again.stderr
    assert again.stderr.splitlines()[1:] == done.stderr.splitlines()[1:]
    assert sorted((tmp_path / "errors.jsonl").read_text().splitlines()) == sorted(map(json.dumps, errors))
    assert run(*bad, "-o", "none.csv").returncode == 4
    assert run(photos[0], "--errors", "none.jsonl").returncode == 0
    assert (tmp_path / "none.jsonl").read_bytes() == b""


def test_every_file_of_the_malformed_corpus_has_one_record(run, tmp_path):
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        from make_malformed_images import make
    finally:
        sys.path.pop(0)
    (tmp_path / "p").mkdir()
    made = make(tmp_path / "p")
    done = run("-", "-0", "-o", "out.jsonl", input="\0".join(map(str, made)))
    assert done.returncode == 6
    found = [record["path"] for record in records((tmp_path / "out.jsonl").read_text())]
    assert found == [str(path) for path in made]
    # libtiff speaks for itself.
    assert len([line for line in done.stderr.splitlines() if line.startswith("caption-rt: ")]) < 20


@pytest.fixture
def server(photos):
    """A web server on this machine with the photos; its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(photos[0].parent))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_an_address_is_fetched(run, server, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert run(f"{server}/coffee.jpg").stdout == "in dog cat ball cat\n"
    done = run(f"{server}/coffee.jpg", f"{server}/none.jpg", "-o", "out.jsonl")
    assert done.returncode == 6
    found = records((tmp_path / "out.jsonl").read_text())
    assert [record["path"] for record in found] == [f"{server}/coffee.jpg", f"{server}/none.jpg"]
    assert found[0]["caption"] == "in dog cat ball cat"
    assert "404" in found[1]["error"]["message"]
    done = run(f"{server}/coffee.jpg", "-o", "out.jsonl")
    assert "; 1 had their caption before" in done.stderr


def test_limits_with_units(run, photos):
    done = run(photos[0], "--max-bytes", "1k")
    assert (done.returncode, done.stdout) == (4, "")
    assert "is a file of 51.9 KiB, and the limit is 1.0 KiB: scale it down, or raise --max-bytes" in complaints(done)[0]
    done = run(photos[0], "--max-pixels", "0.01M")
    assert done.returncode == 4
    assert (
        "(262.1 thousand pixels), and the limit is 10.0 thousand pixels: scale it down, or raise --max"
        in complaints(done)[0]
    )
    assert run(photos[0], "--max-bytes", "1G", "--max-pixels", "300 MB").returncode == 0


def test_ways_to_choose_words(run, photos):
    def caption(*options):
        return json.loads(run(photos[0], "--json", *options).stdout)

    assert caption("--sample", "--seed", "3") == caption("--sample", "--seed", "3")
    assert caption("--sample", "--no-guard")["strategy"] == "sample"
    assert len(caption("--n-best", "3", "--no-guard")["alternatives"]) == 2
    assert "cat" not in caption("--ban", "cat", "--ban", "GRASS")["words"]
    assert len(caption("--min-words", "10", "--no-guard")["words"]) == 10
    assert caption("--length-penalty", "0", "--beam", "2", "--no-guard")["strategy"] == "beam"
    assert caption("--no-guard")["retried_for"] == []


def test_the_doctor(run, monkeypatch):
    done = run("--doctor", "--device", "cpu")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith("ok       self-test     passed, 2 photos on cpu")
    report = json.loads(run("--doctor", "--json", "--device", "cpu").stdout)
    assert report["status"] in ("ok", "warning")
    assert report["findings"][-1]["part"] == "self-test"
    assert cli.main(["--doctor", "--model", "none"]) == 3


def test_output_that_is_a_device_has_no_ledger(run, photos, tmp_path):
    done = run(photos[0], "-o", "/dev/null", "--format", "csv")
    assert (done.returncode, done.stdout) == (0, "")
    assert not os.path.exists("/dev/null.ledger")
    piped = run(photos[0], "-o", "/dev/stdout", "--json", cwd=tmp_path)
    assert json.loads(piped.stdout)["status"] == "ok"
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="terminals of POSIX")
def test_a_bar_on_a_terminal_and_nowhere_else(tiny_bundle, photos, tmp_path):
    import pty

    def on_terminal(*arguments):
        """What standard error shows on a terminal."""
        primary, secondary = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "caption_rt", "--model", tiny_bundle, *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TERM": "xterm"},
            stdout=subprocess.DEVNULL,
            stderr=secondary,
        )
        os.close(secondary)
        shown = b""
        while True:
            try:
                piece = os.read(primary, 1 << 16)
            except OSError:  # of Linux, once the other side is closed
                break
            if not piece:
                break
            shown += piece
        os.close(primary)
        assert process.wait() == 0
        return shown.decode()

    shown = on_terminal(photos[0].parent, "-o", "out.jsonl")
    assert "3/3" in shown
    assert "photos/s" in shown
    assert "100%" in shown or "#" in shown
    assert shown.endswith(" had their caption before; 0 failed\r\n") or "captioned 3 photos in" in shown
    assert on_terminal(photos[0]) == ""
    # Into a pipe there is the summary alone.
    done = subprocess.run(
        [sys.executable, "-m", "caption_rt", "--model", tiny_bundle, photos[0].parent, "-o", tmp_path / "b.csv"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.count("\n") == 1
    assert "\r" not in done.stderr


PEAK = (
    "import sys\n"
    "from caption_rt.cli import main\n"
    "assert main(sys.argv[1:]) == 0\n"
    # Not ru_maxrss, which a child inherits from the process that forked it.
    "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))\n"
)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory as Linux counts it")
@pytest.mark.parametrize("name", ["jsonl", "html"])
def test_memory_stays_flat_however_many_photos(tiny_bundle, tmp_path, name):
    make_photos(tmp_path / "many", 4000)
    make_photos(tmp_path / "few", 200)
    peaks = {}
    for folder in ("few", "many"):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, "--model", tiny_bundle, folder, "-o", f"{folder}.{name}"],
            cwd=tmp_path,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=True,
        )
        peaks[folder] = int(done.stdout)
    assert peaks["many"] < 1.1 * peaks["few"]

"""A run over folders that is ended at any moment, and called again, ends as one that was never ended."""

import fcntl
import os
import pty
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time

import pytest

from running import caption_rt, ended, forked, make_photo, make_photos, started

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes and signals of Linux")

LINES = ["jsonl", "csv", "html"]
SIDECARS = ["txt", "xmp"]

STOPPING = "caption-rt: stopping: the photos in work are finished first (Ctrl-C once more stops at once)"


def arguments(folder, name, batch_size=4):
    """The command over a folder's photos, with a format."""
    where = ["--format", name] if name in SIDECARS else ["-o", folder / f"out.{name}"]
    return [folder / "photos", "--batch-size", str(batch_size), *where]


def outputs(folder):
    """What a run made, by path: the output or the sidecars; no ledgers, and no photos."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".png" and ".ledger" not in path.name
    }


def unbroken(folder, count, name, **keywords):
    """Photos, and what a run over them makes that nothing ends; the folder is left without it."""
    make_photos(folder / "photos", count)
    (folder / "photos" / "000" / "bad.png").write_bytes(b"no photo")
    assert ended(forked(arguments(folder, name, **keywords))) == 6
    expected = outputs(folder)
    # The tiny model says nothing of some photos, which then have no sidecar.
    assert count / 2 < len(expected) < count if name in SIDECARS else len(expected) == 1
    clear(folder, expected)
    return expected


def clear(folder, expected):
    for path in (*expected, *(path.relative_to(folder) for path in folder.rglob("*.ledger"))):
        (folder / path).unlink()


def killed_often(folder, name, expected, kills, generator):
    """Kill a run at random moments, and start it again, until it ends by itself.

    After each kill the output is looked at: it never holds what the unbroken run's does not hold at that place.

    Returns:
        How often a run was killed, at most `kills`; most of them soon after they wrote something.
    """
    for count in range(kills):
        before = changed(folder)
        process = forked(arguments(folder, name, batch_size=2))
        if generator.random() < 0.2:
            time.sleep(generator.uniform(0, 0.05))
        else:
            while changed(folder) == before and process.is_alive():
                time.sleep(0.001)
            time.sleep(generator.uniform(0, 0.01))
        process.kill()
        code = ended(process)
        for path, data in outputs(folder).items():
            if path.endswith(".part"):  # of a sidecar that was just being written
                continue
            assert expected[path].startswith(data) if name in LINES else expected[path] == data
        if code != -signal.SIGKILL:
            assert code == 6
            return count
    assert ended(forked(arguments(folder, name, batch_size=2))) == 6
    return kills


def changed(folder):
    """When the ledger last changed."""
    return [path.stat().st_mtime_ns for path in folder.rglob("*.ledger")]


@pytest.mark.parametrize("name", ["jsonl", "txt"])
def test_killed_at_many_moments(tmp_path, name):
    expected = unbroken(tmp_path, 80, name, batch_size=2)
    assert killed_often(tmp_path, name, expected, 10, random.Random(name)) >= 9
    assert outputs(tmp_path) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LINES, *SIDECARS])
def test_killed_at_very_many_moments(tmp_path, name):
    expected = unbroken(tmp_path, 200, name, batch_size=2)
    generator = random.Random(name)
    for _ in range(4):
        assert killed_often(tmp_path, name, expected, 40, generator) >= 15
        assert outputs(tmp_path) == expected
        clear(tmp_path, expected)


# A run of two batches changes the disk at so many moments, of which the quick test takes every third.
FEWER = pytest.param(3, id="some")
ALL = pytest.param(1, id="all", marks=pytest.mark.slow)


@pytest.mark.parametrize("every", [FEWER, ALL])
@pytest.mark.parametrize("name", ["jsonl", "txt"])
def test_killed_at_changes_of_the_disk(tmp_path, name, every):
    """Before and after each commit of the ledger, before each flush, and in the middle of each write."""
    expected = unbroken(tmp_path, 5, name)
    step = 0
    while True:
        step += every
        code = ended(forked(arguments(tmp_path, name), dies_at=step))
        if code == 6:
            break
        assert code == -signal.SIGKILL
        # With the next start, nothing of the half line is left, even if that one comes to nothing else.
        assert ended(forked(arguments(tmp_path, name))) == 6
        assert outputs(tmp_path) == expected, step
        clear(tmp_path, expected)
    assert step > 10
    assert outputs(tmp_path) == expected


@pytest.mark.parametrize("every", [FEWER, ALL])
def test_killed_while_the_output_is_written_anew(tmp_path, every):
    """Some photos have changed: their old records leave the output, whenever the run is killed."""
    unbroken(tmp_path, 5, "jsonl")
    assert ended(forked(arguments(tmp_path, "jsonl"))) == 6
    before = tmp_path / "before"
    shutil.copytree(tmp_path, before, ignore=shutil.ignore_patterns("before", "work"))
    for place in (1, 4):
        make_photo(before / "photos" / "000" / f"{place:05}.png", seed=place + 100)

    def again(dies_at=None):
        work = tmp_path / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(before, work)
        return work, ended(forked(arguments(work, "jsonl"), dies_at))

    work, code = again()
    assert code == 6
    expected = {path: data.replace(bytes(work), b"") for path, data in outputs(work).items()}
    assert len(expected["out.jsonl"].splitlines()) == 6
    for step in range(1, 100, every):
        work, code = again(step)
        if code == 6:
            break
        assert ended(forked(arguments(work, "jsonl"))) == 6
        found = {path: data.replace(bytes(work), b"") for path, data in outputs(work).items()}
        assert found == expected, step
    assert step > 8


def wait_for(condition, process):
    """Until a run has come so far; it must not end before."""
    for _ in range(2000):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    raise AssertionError("it never came to that")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_in_order(tmp_path, number):
    expected = unbroken(tmp_path, 100, "jsonl", batch_size=2)["out.jsonl"]
    out = tmp_path / "out.jsonl"
    process = started(*arguments(tmp_path, "jsonl", batch_size=2))
    wait_for(lambda: out.exists() and out.stat().st_size > 2000, process)
    process.send_signal(number)
    printed, said = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert printed == ""
    lines = said.splitlines()
    assert lines[0] == STOPPING
    assert lines[-1] == (
        "caption-rt: error: interrupted; all that was captioned is written, and the same command goes on from there"
    )
    assert lines[1].startswith("caption-rt: captioned ")
    assert expected.startswith(out.read_bytes())
    assert out.read_bytes().endswith(b"\n")
    assert len(out.read_bytes()) < len(expected)
    assert ended(forked(arguments(tmp_path, "jsonl", batch_size=2))) == 6
    assert out.read_bytes() == expected


def test_a_second_signal_ends_it_at_once(tmp_path):
    photos = make_photos(tmp_path / "photos", 4)
    out = tmp_path / "out.jsonl"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        # A server that never answers: without the second signal the run would wait for it.
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/photo.jpg"
        process = started(*photos, address, "-o", out, "--batch-size", "2")
        # The second batch may be waiting for what comes after it.
        wait_for(lambda: out.exists() and len(out.read_bytes().splitlines()) >= 2, process)
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == f"{STOPPING}\n"
        process.send_signal(signal.SIGTERM)
        printed, said = process.communicate(timeout=10)
    assert process.returncode == 143
    assert (printed, said) == ("", "caption-rt: stopped at once; all that was captioned is written\n")


def test_a_signal_while_standard_input_is_waited_for(tmp_path):
    make_photos(tmp_path / "photos", 30)
    out = tmp_path / "out.jsonl"
    process = started("-", "-o", out, "--batch-size", "2", stdin=subprocess.PIPE)
    process.stdin.write(f"{tmp_path / 'photos'}\n{tmp_path / 'pho'}")
    process.stdin.flush()
    wait_for(lambda: out.exists() and len(out.read_bytes().splitlines()) >= 2, process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130
    assert 2 <= len(out.read_bytes().splitlines()) < 30


@pytest.mark.parametrize("told", [True, False])
def test_a_terminal_that_is_closed(tmp_path, told):
    """With SIGHUP the batches in the network are finished and written; without, as after a shell's disown, all."""
    expected = unbroken(tmp_path, 60, "jsonl", batch_size=2)["out.jsonl"]
    ours, theirs = pty.openpty()
    out = tmp_path / "out.jsonl"

    def take_the_terminal():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = started(
        *arguments(tmp_path, "jsonl", batch_size=2),
        **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
        start_new_session=True,
        preexec_fn=take_the_terminal if told else None,
    )
    os.close(theirs)
    while b"photos/s" not in os.read(ours, 1 << 16) or not out.exists() or out.stat().st_size < 1000:
        assert process.poll() is None
    os.close(ours)
    assert process.wait(30) == (128 + signal.SIGHUP if told else 6)
    data = out.read_bytes()
    assert expected.startswith(data)
    assert data.endswith(b"\n")
    if told:
        assert len(data) < len(expected)
        assert ended(forked(arguments(tmp_path, "jsonl", batch_size=2))) == 6
    assert out.read_bytes() == expected


def test_an_ignored_signal_stays_ignored(tmp_path):
    """As nohup and background jobs have it."""
    make_photos(tmp_path / "photos", 100)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = started(*arguments(tmp_path, "jsonl", batch_size=2))
    finally:
        signal.signal(signal.SIGHUP, before)
    out = tmp_path / "out.jsonl"
    wait_for(lambda: out.exists() and out.stat().st_size > 1000, process)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert len(out.read_bytes().splitlines()) == 100


@pytest.mark.parametrize("name", ["jsonl", "csv"])
@pytest.mark.parametrize("limit", [20_000, 45_000])
def test_a_disk_that_is_full(tmp_path, name, limit):
    """No file may grow beyond a limit, which is what a quota does."""
    expected = unbroken(tmp_path, 60, name)
    out = tmp_path / f"out.{name}"
    done = caption_rt(
        *arguments(tmp_path, name),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert "cannot be written" in lines[-1]
    assert lines[-1].endswith("give the same command again to go on")
    assert "Traceback" not in done.stderr
    data = out.read_bytes() if out.exists() else b""
    assert expected[out.name].startswith(data)
    assert not data or data.endswith(b"\n")
    assert caption_rt(*arguments(tmp_path, name)).returncode == 6
    assert outputs(tmp_path) == expected


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, with little room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "none", disk], capture_output=True, check=False
    ).returncode
    if mounted != 0:
        pytest.skip("file systems cannot be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_really_full(tmp_path, small_disk):
    expected = unbroken(tmp_path, 100, "jsonl")["out.jsonl"]
    command = [tmp_path / "photos", "--batch-size", "4", "-o", small_disk / "out.jsonl"]
    done = caption_rt(*command)
    assert done.returncode == 1
    assert "cannot be written" in done.stderr.splitlines()[-1]
    data = (small_disk / "out.jsonl").read_bytes()
    assert expected.startswith(data)
    assert data.endswith(b"\n")
    subprocess.run(["mount", "-o", "remount,size=2m", small_disk], check=True)
    assert caption_rt(*command).returncode == 6
    assert (small_disk / "out.jsonl").read_bytes() == expected


def test_sidecars_on_a_full_disk_are_whole_or_not_there(tmp_path, small_disk):
    expected = unbroken(tmp_path, 60, "xmp")
    subprocess.run(["mount", "-o", "remount,size=480k", small_disk], check=True)
    shutil.copytree(tmp_path / "photos", small_disk / "photos")
    done = caption_rt(small_disk / "photos", "--format", "xmp")
    assert done.returncode == 1, done.stderr
    assert "cannot be written" in done.stderr.splitlines()[-1]
    found = outputs(small_disk)
    assert 0 < len(found) < 60
    assert all(expected[path] == data for path, data in found.items())
    subprocess.run(["mount", "-o", "remount,size=2m", small_disk], check=True)
    assert caption_rt(small_disk / "photos", "--format", "xmp").returncode == 6
    assert outputs(small_disk) == expected


def test_two_runs_at_once(tmp_path):
    make_photos(tmp_path / "photos", 30)
    out = tmp_path / "out.jsonl"
    first = started("-", "-o", out, "--batch-size", "1", stdin=subprocess.PIPE)
    first.stdin.write(f"{tmp_path / 'photos'}\n")
    first.stdin.flush()
    wait_for(lambda: out.exists() and out.stat().st_size > 1000, first)
    second = caption_rt(tmp_path / "photos", "-o", out)
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr == (
        f"caption-rt: error: another caption-rt is at work with {out}.ledger: wait until it is done, or choose another "
        "output\n"
    )
    _, said = first.communicate(timeout=30)
    assert first.returncode == 0, said
    assert len(out.read_bytes().splitlines()) == 30
    assert sorted(os.listdir(tmp_path)) == ["out.jsonl", "out.jsonl.ledger", "photos"]

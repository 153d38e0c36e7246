"""How the command ends: interrupted, on a full disk, with nobody who reads, and in order."""

import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from caption_rt import cli
from running import complaints, started

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_in_the_first_moments_is_one_sentence(tiny_bundle, photos):
    """While NumPy, ONNX Runtime and the like are imported, at whatever moment."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # It says when Python itself has started, which is not ours.
    begun = "import sys; from caption_rt.__main__ import main; print(flush=True); sys.exit(main())"
    for wait in (0.002, 0.01, 0.02, 0.04, 0.08, 0.15):
        process = subprocess.Popen(
            [sys.executable, "-c", begun, "--model", tiny_bundle, *photos * 20],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        process.stdout.readline()
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 130, said
        assert said.splitlines()[-1] == "caption-rt: error: interrupted"
        assert "Traceback" not in said


@pytest.mark.parametrize("module", ["caption_rt.request", "onnxruntime", "caption_rt.batch"])
def test_ctrl_c_that_python_loses_ends_the_run_all_the_same(tiny_bundle, photos, module):
    """What is raised while Python clears something away goes no further, such as in an import's last moments."""
    code = f"""
import os, signal, sys
class Lost:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
class Finder:
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            Lost()
sys.meta_path.insert(0, Finder())
from caption_rt.__main__ import main
sys.exit(main())
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code, "--model", tiny_bundle, photos[2]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "caption-rt: error: interrupted")


def test_the_script_and_the_module_begin_where_ctrl_c_is_heard():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["project"]["scripts"]["caption-rt"] == "caption_rt.__main__:main"
    code = "import sys, caption_rt.__main__; print(*(name for name in sys.modules if name.startswith('caption_rt')))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    loaded = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    # Nothing else before it: all that takes time is imported within.
    assert loaded.stdout.split() == ["caption_rt.errors", "caption_rt", "caption_rt.__main__"]


def test_the_process_ends_without_taking_itself_apart_but_in_order(tiny_bundle, photos):
    """Threads are joined, exit handlers called, all output there; a handler that came before ours is called, too."""
    last = "class Last:\n    def __del__(self): print('taken apart')\nlast = Last()\n"
    handler = "atexit.register(print, 'handled')\n"
    thread = "threading.Timer(0.2, print, ['joined']).start()\n"
    for begin, end in (("", []), (handler, ["handled", "taken apart"])):
        code = f"import atexit, sys, threading\nfrom caption_rt.__main__ import main\n{last}{begin}code = main()\n"
        code += f"atexit.register(print, 'later')\n{thread}print(code)\nsys.exit(code)\n"
        done = subprocess.run(
            [sys.executable, "-c", code, "--model", tiny_bundle, photos[2], "missing.jpg"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 6
        assert done.stdout.splitlines()[1:] == ["6", "joined", "later", *end], done.stderr
        assert done.stderr == "caption-rt: error: missing.jpg does not exist: check the path\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_one_sentence(tiny_bundle, photos):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "caption_rt", "--model", tiny_bundle, *photos],
            env=environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert complaints(done) == ["the output cannot be written: No space left on device: make room on the disk"]


@pytest.mark.skipif(os.name != "posix", reason="signals and pipes of POSIX")
def test_a_reader_that_leaves_early_ends_the_run_quietly(tiny_bundle, photos):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, "-m", "caption_rt", "--model", tiny_bundle, *photos],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 141


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_a_reader_that_leaves_ends_the_command_wherever_it_prints(photos, tmp_path):
    """What click prints by itself, and an output that is a pipe."""
    reader, writer = os.pipe()
    os.close(reader)
    process = started("--help", stdout=writer)
    os.close(writer)
    assert (process.communicate(timeout=60)[1], process.returncode) == ("", 141)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    process = started(*photos * 9, "-o", pipe, "--format", "jsonl", "--batch-size", "1")
    with pipe.open("rb", buffering=0) as file:
        file.read(10)
    assert (process.communicate(timeout=60)[1], process.returncode) == ("", 141)


def test_main_returns_its_code_and_never_exits(tiny_bundle, photos, capsys):
    assert cli.main(["--model", str(tiny_bundle), str(photos[2])]) == 0
    assert capsys.readouterr() == ("in dog cat ball cat\n", "")
    assert cli.main(["--model", str(tiny_bundle), "missing.jpg"]) == 4
    assert cli.main(["--beam"]) == 2
    assert cli.main(["--version"]) == 0


def test_ctrl_c_before_the_first_photo_ends_with_130(monkeypatch, tiny_bundle, photos, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("caption_rt.captioner.Captioner.load", interrupt)
    assert cli.main(["--model", str(tiny_bundle), str(photos[0])]) == 130
    assert capsys.readouterr().err.strip() == "caption-rt: error: interrupted"

"""What tests of whole runs share: photos, the command in processes, and processes that die at a chosen moment."""

import contextlib
import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from PIL import Image

BUNDLE = Path(__file__).resolve().parent / "data" / "tiny_bundle"
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
PREFIX = [sys.executable, "-m", "caption_rt", "--model", str(BUNDLE), "--device", "cpu"]

_forks = multiprocessing.get_context("forkserver") if sys.platform != "win32" else multiprocessing.get_context()
if sys.platform != "win32":
    # Loaded once, so that a process is there in milliseconds: it is killed before it would be otherwise. So is pytest,
    # as `__main__`, which every process would load anew.
    _ours = ("cli", "batch", "captioner", "gallery", "output_file", "output_sidecars", "xmp")
    _forks.set_forkserver_preload(
        ["__main__", "running", "onnxruntime", "PIL.PngImagePlugin", "csv", *(f"caption_rt.{name}" for name in _ours)]
    )


def caption_rt(*arguments: object, **keywords: Any) -> subprocess.CompletedProcess[str]:
    """Run the command with the tiny bundle."""
    return subprocess.run(
        [*PREFIX, *map(os.fspath, arguments)],
        **{"env": ENVIRONMENT, "capture_output": True, "text": True, "check": False, "timeout": 120, **keywords},
    )


def started(*arguments: object, **keywords: Any) -> subprocess.Popen[str]:
    """Start the command with the tiny bundle."""
    return subprocess.Popen(
        [*PREFIX, *map(os.fspath, arguments)],
        **{
            "env": ENVIRONMENT,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            **keywords,
        },
    )


def make_photos(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Photos of noise, all different, in subfolders of ten; in the order of a scan."""
    generator = random.Random(seed)
    paths = []
    for number in range(count):
        path = folder / f"{number // 10:03}" / f"{number:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        make_photo(path, generator.randrange(2**32))
        paths.append(path)
    return paths


def make_photo(path: Path, seed: int) -> None:
    """A small photo of noise."""
    Image.frombytes("RGB", (8, 8), random.Random(seed).randbytes(192)).resize((40, 30)).save(path)


def forked(arguments: Sequence[object], dies_at: int | None = None) -> BaseProcess:
    """The command in a process that is there in milliseconds.

    Args:
        arguments: of the command.
        dies_at: the process kills itself before, or in the middle of, so many changes of the disk.
    """
    texts = [*PREFIX[3:], *map(os.fspath, arguments)]
    process: BaseProcess = _forks.Process(target=_command, args=(texts, dies_at))
    process.start()
    return process


def _command(arguments: list[str], dies_at: int | None) -> None:
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    if dies_at is not None:
        _die_at(dies_at)
    from caption_rt.cli import main

    sys.exit(main(arguments))


def _die_at(step: int) -> None:
    """Count what changes the disk, and at the step of that number do half of it and kill the process."""
    left = step

    def counted(function: Any, half: Any = None) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                if half is not None:
                    half(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)

        return call

    write = os.write
    os.write = counted(os.write, lambda file, data: write(file, bytes(data[: len(data) // 2])))
    for name in ("fsync", "replace", "truncate", "ftruncate"):
        setattr(os, name, counted(getattr(os, name)))

    class Connection(sqlite3.Connection):
        """One that counts what is written, and the commits before and after."""

        def execute(self, statement: str, *arguments: Any) -> Any:
            run = super().execute
            if statement == "COMMIT":
                run = counted(run, lambda *_: None)
                result = run(statement, *arguments)
                counted(lambda: None)()
                return result
            return run(statement, *arguments)

    connect = sqlite3.connect
    sqlite3.connect = lambda *arguments, **keywords: connect(*arguments, **keywords, factory=Connection)


def ended(process: BaseProcess, seconds: float = 60) -> int | None:
    """The exit code of a process that ends by itself, negative for a signal."""
    process.join(seconds)
    with contextlib.suppress(ValueError):
        return process.exitcode
    return None


def complaints(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines of standard error; each must be one of ours."""
    lines = done.stderr.splitlines()
    assert all(line.startswith("caption-rt: error: ") for line in lines), done.stderr
    return [line.removeprefix("caption-rt: error: ") for line in lines]

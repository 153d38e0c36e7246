"""What the tests of the training package share."""

import hashlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coco_server import FILES, NAMES
from web import FileServer

# These import TensorFlow at their head. Without it they are left out, unless nothing may be (see tests/conftest.py).
NEED_TENSORFLOW = [
    "test_batches.py",
    "test_cli.py",
    "test_distill.py",
    "test_distributed.py",
    "test_finetune.py",
    "test_extraction.py",
    "test_importing.py",
    "test_logs.py",
    "test_inception.py",
    "test_model.py",
    "test_objectives.py",
    "test_optimizer.py",
    "test_precision.py",
    "test_recurrence.py",
    "test_runs.py",
    "test_second_stages.py",
    "test_self_critical.py",
    "test_sheets.py",
    "test_training.py",
]

# Before TensorFlow is imported, which reads it once: what it says of its own set-up is not about the tests.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

if importlib.util.find_spec("tensorflow") is None and os.environ.get("CAPTION_RT_NO_SKIP") != "1":
    collect_ignore = [str(Path(__file__).with_name(name)) for name in NEED_TENSORFLOW]

# Of a checkpoint that does not fit, TensorFlow lists every variable when it is thrown away, at the process' end.
logging.getLogger("tensorflow").setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """`main` sets what TensorFlow reads; called within this process, that is not to stay."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def server() -> Iterator[FileServer]:
    """A web server that has a small MS-COCO."""
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

"""What the tests of the training package share."""

import importlib.util
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# These import TensorFlow at their head. Without it they are left out, unless nothing may be (see tests/conftest.py).
NEED_TENSORFLOW = [
    "test_batches.py",
    "test_cli.py",
    "test_distill.py",
    "test_distributed.py",
    "test_finetune.py",
    "test_extraction.py",
    "test_importing.py",
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

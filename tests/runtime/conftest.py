"""What the runtime's tests share."""

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from caption_rt import Bundle, Captioner, engine


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The script that makes the tiny bundle: its sizes, and its network in NumPy."""
    path = Path(__file__).with_name("make_tiny_bundle.py")
    spec = importlib.util.spec_from_file_location("make_tiny_bundle", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def captioner(tiny_bundle: Path) -> Captioner:
    """A captioner of the tiny bundle."""
    return Captioner.load(tiny_bundle, "cpu")


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle, to be changed."""
    return shutil.copytree(tiny_bundle, tmp_path / "copy")


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    """The tiny bundle, open."""
    return Bundle.open(tiny_bundle)


@pytest.fixture
def fresh_probe() -> Iterator[None]:
    """Forget what was found out about CUDA, before and after."""
    engine.cuda_missing.cache_clear()
    yield
    engine.cuda_missing.cache_clear()

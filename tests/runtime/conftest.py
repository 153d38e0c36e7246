"""What the runtime's tests share."""

import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import onnxruntime
import pytest

from caption_rt import Bundle, Captioner, engine
from caption_rt.cli import main
from caption_rt.errors import BundleError


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


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of each session of ONNX Runtime that is made."""
    made: list[tuple[Any, ...]] = []
    real = onnxruntime.InferenceSession

    def make(*arguments: Any, **options: Any) -> onnxruntime.InferenceSession:
        made.append(arguments)
        return real(*arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", make)
    return made


@pytest.fixture
def refused(
    sessions: list[tuple[Any, ...]], photos: list[Path], capfd: pytest.CaptureFixture[str]
) -> Callable[[Path], str]:
    """Open a bundle in both ways; gives the sentence that both refuse it with."""

    def check(path: Path) -> str:
        with pytest.raises(BundleError) as caught:
            Captioner.load(path, "cpu")
        sentence = str(caught.value)
        assert sentence.isprintable()
        assert main(["--model", str(path), "--device", "cpu", str(photos[0])]) == 3
        printed = capfd.readouterr()
        assert (printed.out, printed.err) == ("", f"caption-rt: error: {sentence}\n")
        assert sessions == []
        return sentence

    return check

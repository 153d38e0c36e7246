"""What all tests share: the rules by which tests skip, and the committed data."""

import importlib.util
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent


def shared_folder() -> Path:
    """The folder of shared data beside the checkout, or the one that CAPTION_RT_SHARED names."""
    return Path(os.environ.get("CAPTION_RT_SHARED") or TESTS.parent.parent / "shared")


def pytest_configure() -> None:
    # Neither tests nor the processes that they start leave graphs in the user's cache, or find some there.
    os.environ["CAPTION_RT_CACHE"] = "off"
    # A shell without job control starts background commands with SIGINT ignored, and so would the tests' processes be.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _missing(item: pytest.Item) -> str | None:
    """Why a test cannot run here, or None."""
    if item.get_closest_marker("tf") and importlib.util.find_spec("tensorflow") is None:
        return "TensorFlow is not installed"
    if item.get_closest_marker("data") and not shared_folder().is_dir():
        return f"there is no folder {shared_folder()}"
    for marker in item.iter_markers("program"):
        for name in marker.args:
            if shutil.which(name) is None:
                return f"the program {name} is not installed"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    reason = _missing(item)
    if reason is None:
        return
    # Where everything is known to be there, a test that quietly skips is a test that is lost.
    if os.environ.get("CAPTION_RT_NO_SKIP") == "1":
        pytest.fail(f"{reason}, and CAPTION_RT_NO_SKIP=1 allows no skip")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data; for tests marked `data`."""
    return shared_folder()


@pytest.fixture(scope="session")
def tiny_bundle() -> Path:
    """The bundle that tests/runtime/make_tiny_bundle.py makes."""
    return TESTS / "data" / "tiny_bundle"


@pytest.fixture(scope="session")
def photos() -> list[Path]:
    """The committed photos: astronaut, chelsea (a cat), coffee; of different shapes."""
    return [TESTS / "data" / "photos" / f"{name}.jpg" for name in ("astronaut", "chelsea", "coffee")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium, by Playwright; for tests marked `program("chromium")`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Debian's; its sandbox does not run as root, which is what a container gives.
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()

import os

import pytest

from caption_train.console import quiet_stderr


def test_what_libraries_say_while_they_load_is_kept_back(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet_stderr():
        os.write(2, b"noise past Python\n")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


def load(error: Exception) -> None:
    with quiet_stderr():
        os.write(2, b"what went on\n")
        raise error


def test_it_is_shown_where_loading_fails(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ImportError, match="a library does not load"):
        load(ImportError("a library does not load"))
    assert capfd.readouterr().err == "what went on\n"


def test_a_missing_package_needs_no_more_words(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModuleNotFoundError):
        load(ModuleNotFoundError("none", name="tensorflow"))
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"

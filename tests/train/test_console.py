import os

import pytest

from caption_train.console import quiet_stderr


def test_what_libraries_say_while_they_load_is_kept_back(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet_stderr():
        os.write(2, b"noise past Python\n")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


def test_it_is_shown_where_loading_fails(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ImportError), quiet_stderr():
        os.write(2, b"why it fails\n")
        raise ImportError("a library does not load")
    assert capfd.readouterr().err == "why it fails\n"


def test_a_missing_package_needs_no_more_words(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModuleNotFoundError), quiet_stderr():
        os.write(2, b"noise\n")
        raise ModuleNotFoundError("none", name="tensorflow")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"

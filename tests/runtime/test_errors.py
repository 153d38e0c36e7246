"""The tree of errors."""

import ast
import errno
import pickle
from pathlib import Path

import pytest

import caption_rt
from caption_rt.errors import (
    BundleError,
    CaptionError,
    EngineError,
    ImageError,
    OptionsError,
    Parameter,
    printable,
    remedy_of,
    shown,
)


@pytest.mark.parametrize(
    ("error", "code", "built_in"),
    [
        (CaptionError, 1, Exception),
        (OptionsError, 2, ValueError),
        (BundleError, 3, Exception),
        (ImageError, 4, ValueError),
        (EngineError, 5, RuntimeError),
    ],
)
def test_each_error_has_its_exit_code_and_its_built_in(error, code, built_in):
    assert error.exit_code == code
    assert issubclass(error, CaptionError)
    assert issubclass(error, built_in)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain name.jpg", "plain name.jpg"),
        ("Grüße 猫.jpg", "Grüße 猫.jpg"),
        ("narrow\u202fspace.png", "narrow\u202fspace.png"),
        ("two\nlines\t.jpg", "two\\nlines\\t.jpg"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("undecodable\udcff", "undecodable\\udcff"),
        ("line\u2028separator", "line\\u2028separator"),
    ],
)
def test_printable_escapes_what_breaks_a_line_and_nothing_else(name, shown):
    assert printable(name) == shown


def test_a_very_long_name_is_shortened_in_the_middle():
    assert shown("a\n" + "b" * 200) == "a\\n" + "b" * 200
    text = shown("start" + "x" * 100_000 + "end.jpg")
    assert (len(text), text[:6], text[-8:]) == (299, "startx", "xend.jpg")
    assert "xxx ... xxx" in text


def test_a_command_says_its_options_in_place_of_our_parameters():
    error = ImageError("max_bytes.jpg is too large: raise ", Parameter("max_bytes"), reason="is too large")
    assert str(error) == "max_bytes.jpg is too large: raise max_bytes"
    error.__cause__ = KeyError("why")
    renamed = error.renamed({"max_bytes": "--max-bytes", "other": "--other"})
    assert str(renamed) == "max_bytes.jpg is too large: raise --max-bytes"
    assert (type(renamed), renamed.reason, renamed.__cause__) == (ImageError, "is too large", error.__cause__)
    assert str(error.renamed({})) == str(error)
    plain = ImageError("it is bad", reason="is bad")
    assert plain.renamed({"it is bad": "no"}) is plain


@pytest.mark.parametrize("kind", [CaptionError, OptionsError, ImageError])
def test_an_error_that_travels_to_another_process_is_the_same(kind):
    error = pickle.loads(pickle.dumps(kind("raise ", Parameter("max_bytes"), reason="is too large")))
    assert (type(error), str(error), error.reason) == (kind, "raise max_bytes", "is too large")
    assert str(error.renamed({"max_bytes": "--max-bytes"})) == "raise --max-bytes"


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "make room on the disk"),
        (errno.EROFS, "nothing can be written there, so choose a place elsewhere"),
        (errno.EACCES, "change the permissions of its folder, or choose a place elsewhere"),
        (errno.EIO, ""),
    ],
)
def test_what_can_be_done_about_a_file_that_cannot_be_written(number, remedy):
    assert remedy_of(OSError(number, "no")) == remedy


@pytest.mark.parametrize("path", sorted(Path(caption_rt.__file__).parent.glob("*.py")), ids=lambda path: path.name)
def test_every_error_about_a_photo_states_its_reason(path):
    """A run over many photos counts by it."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    errors = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "ImageError"]
    assert [call.lineno for call in errors if "reason" not in {keyword.arg for keyword in call.keywords}] == []

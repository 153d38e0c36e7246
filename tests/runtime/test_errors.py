"""The tree of errors."""

import pytest

from caption_rt.errors import BundleError, CaptionError, EngineError, ImageError, OptionsError, printable


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

"""The errors of caption-rt: what went wrong, in one sentence, with the exit code a command line ends with."""

from typing import ClassVar

__all__ = ["BundleError", "CaptionError", "EngineError", "ImageError", "OptionsError", "printable"]

# Control characters, line and paragraph separators, and the lone surrogates that stand for undecodable bytes of a name.
_BREAK_LINES = frozenset({"Cc", "Zl", "Zp", "Cs"})


class CaptionError(Exception):
    """The root of everything that caption-rt raises on purpose; its text is one sentence for a person."""

    exit_code: ClassVar[int] = 1
    """What a command line that ends with this error gives back to the shell."""


class OptionsError(CaptionError, ValueError):
    """An option or argument that cannot be meant: a beam of 0 words, an unknown device, a missing extra."""

    exit_code: ClassVar[int] = 2


class BundleError(CaptionError):
    """A bundle that is not there, not readable, of another format or version, or not what its manifest says."""

    exit_code: ClassVar[int] = 3


class ImageError(CaptionError, ValueError):
    """A photo that cannot be read; the others of the same call are not concerned."""

    exit_code: ClassVar[int] = 4


class EngineError(CaptionError, RuntimeError):
    """ONNX Runtime or its device failed; ONNX Runtime's own error, where there is one, stays as ``__cause__``."""

    exit_code: ClassVar[int] = 5


def printable(name: object) -> str:
    r"""The text of a file name or foreign message, safe to print on one line of any terminal.

    A file name may hold line breaks, escape sequences and undecodable bytes; each becomes its escape (``\n``, ``\x1b``,
    ``\udcff``), everything else stays as it is.
    """
    text = str(name)
    if text.isprintable():
        return text
    import unicodedata  # names are nearly always printable

    return "".join(
        char.encode("unicode_escape").decode("ascii") if unicodedata.category(char) in _BREAK_LINES else char
        for char in text
    )

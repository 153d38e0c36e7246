"""The errors of caption-rt: what went wrong, in one sentence, with the exit code a command line ends with."""

import errno
from collections.abc import Mapping
from typing import ClassVar, TypeVar

__all__ = [
    "BundleError",
    "CaptionError",
    "EngineError",
    "ImageError",
    "OptionsError",
    "Parameter",
    "printable",
    "remedy_of",
    "shown",
]

E = TypeVar("E", bound="CaptionError")

# Control characters, line and paragraph separators, and the lone surrogates that stand for undecodable bytes of a name.
_BREAK_LINES = frozenset({"Cc", "Zl", "Zp", "Cs"})


# Longer names are shortened in sentences: on Linux a path has at most 4096 bytes, and what is no path any number.
_LONGEST_NAME = 300

_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room on the disk"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "change the permissions of its folder, or choose a place elsewhere"),
    errno.EROFS: "nothing can be written there, so choose a place elsewhere",
}


class Parameter(str):
    """The name of one of our parameters within the text of an error; a command line says its option there."""


class CaptionError(Exception):
    """The root of everything that caption-rt raises on purpose; its text is one sentence for a person."""

    exit_code: ClassVar[int] = 1
    """What a command line that ends with this error gives back to the shell."""

    def __init__(self, *text: str, reason: str = "") -> None:
        """Take the sentence.

        Args:
            text: the sentence, in pieces where some of them are a `Parameter`.
            reason: what is wrong, without what differs from one photo to the next (its name, numbers): by it a run over
                many photos counts what went wrong. Goes on from "it", as in "is empty".
        """
        super().__init__(*text)
        self.reason = reason

    def __str__(self) -> str:
        """The sentence."""
        return "".join(map(str, self.args))

    def renamed(self: E, names: Mapping[str, str]) -> E:
        """The error as a command line says it.

        Args:
            names: what is said in place of each parameter.
        """
        if not any(isinstance(piece, Parameter) for piece in self.args):
            return self
        text = (names.get(piece, piece) if isinstance(piece, Parameter) else str(piece) for piece in self.args)
        other = type(self)(*text, reason=self.reason)
        other.__cause__ = self.__cause__
        return other


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


def shown(name: object) -> str:
    """A name for a sentence: `printable`, and shortened in the middle where it is very long."""
    text = printable(name)
    if len(text) <= _LONGEST_NAME:
        return text
    half = (_LONGEST_NAME - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def remedy_of(exc: OSError) -> str:
    """What can be done about a file that cannot be written, as the end of a sentence; empty if nobody knows."""
    return _REMEDIES.get(exc.errno or 0, "")

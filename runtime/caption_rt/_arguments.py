"""What callers give: whole numbers, NumPy's among them, and how a sentence calls what cannot be meant."""

from numbers import Integral

from caption_rt.errors import OptionsError, Parameter, printable

__all__ = ["described", "whole_number"]


def whole_number(name: str, value: object, least: int, most: int) -> int:
    """A parameter that is a whole number, as one of Python's: NumPy's whole numbers are taken, True and 2.0 are not.

    Args:
        name: of the parameter.
        value: what was given.
        least: the smallest that can be meant.
        most: the largest.

    Raises:
        OptionsError: it is no whole number, or out of its range.
    """
    if isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= most:
        return int(value)
    text = printable(repr(value)[:100])
    raise OptionsError(Parameter(name), f" must be a whole number from {least} to {most}, not {text}")


def described(value: object) -> str:
    """A value of a wrong type, for a sentence: its type, and what it looks like."""
    return f"the {type(value).__name__} {printable(repr(value)[:60])}"

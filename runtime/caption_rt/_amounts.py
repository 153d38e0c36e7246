"""Counts of bytes and of pixels as a sentence says them."""

from collections.abc import Sequence

__all__ = ["byte_count", "byte_counts", "pixel_counts"]

_BYTES = ((1024**4, "TiB"), (1024**3, "GiB"), (1024**2, "MiB"), (1024, "KiB"))
_PIXELS = ((10**9, "billion pixels"), (10**6, "million pixels"), (10**3, "thousand pixels"))


def byte_count(count: int) -> str:
    """A file's size, such as "1.2 GiB"."""
    return _in_words(count, _BYTES, "byte")


def byte_counts(count: int, limit: int) -> tuple[str, str]:
    """A file's size and the limit that it exceeds, such as ("1.2 GiB", "256.0 MiB")."""
    return _told_apart(count, limit, _BYTES, "byte")


def pixel_counts(count: int, limit: int) -> tuple[str, str]:
    """A photo's pixels and the limit that they exceed, such as ("1.2 billion pixels", "300.0 million pixels")."""
    return _told_apart(count, limit, _PIXELS, "pixel")


def _told_apart(count: int, limit: int, units: Sequence[tuple[int, str]], one: str) -> tuple[str, str]:
    """Both in words, rounded as long as they differ then."""
    first, second = (_in_words(number, units, one) for number in (count, limit))
    return (_whole(count, one), _whole(limit, one)) if first == second else (first, second)


def _in_words(number: int, units: Sequence[tuple[int, str]], one: str) -> str:
    return next((f"{number / unit:.1f} {name}" for unit, name in units if number >= unit), _whole(number, one))


def _whole(number: int, one: str) -> str:
    return f"{number} {one}" if number == 1 else f"{number} {one}s"

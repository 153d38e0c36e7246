"""Reading a JSON object strictly: a key that is missing or has the wrong type is an error that names the key."""

import json
from typing import Any

from caption_rt.errors import BundleError, printable

__all__ = ["Fields", "parse_json"]


def parse_json(data: bytes, name: str) -> object:
    """The value of a JSON file.

    Args:
        data: the file's bytes, UTF-8.
        name: the file's name, for the error.

    Raises:
        BundleError: the bytes are not JSON, or an object has a key twice.
    """

    def refuse(constant: str) -> object:
        raise ValueError(f"{constant} is not JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            # One reader takes the first, another the last.
            if key in found:
                raise ValueError(f"the key {key!r} is there twice")
            found[key] = value
        return found

    try:
        return json.loads(data.decode("utf-8"), parse_constant=refuse, object_pairs_hook=once)
    # Nesting without end exhausts the parser's stack.
    except (ValueError, RecursionError) as exc:
        raise BundleError(f"{name} is not valid JSON: {printable(exc)}") from exc


class Fields:
    """A JSON object whose keys are required.

    Args:
        data: what `json.loads` gave.
        where: which object it is, for the errors: "manifest.json", "manifest.json: grid".

    Raises:
        BundleError: `data` is not a JSON object; every method raises it for a key that is missing or of another type.
    """

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, dict):
            raise BundleError(f"{where} is not a JSON object")
        self._data: dict[str, Any] = data
        self._where = where

    def names(self) -> list[str]:
        """All keys, in the file's order."""
        return list(self._data)

    def error(self, key: str, what: str) -> BundleError:
        """The error to raise about a key: "manifest.json: grid.rows is not ..."."""
        return BundleError(f"{self._where}: {printable(key)} {what}")

    def value(self, key: str) -> Any:
        """The value as it is."""
        if key not in self._data:
            raise BundleError(f"{self._where}: the key {printable(key)} is missing")
        return self._data[key]

    def text(self, key: str) -> str:
        """A string."""
        value = self.value(key)
        if not isinstance(value, str):
            raise self.error(key, "is not a string")
        return value

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        """One of some strings."""
        value = self.text(key)
        if value not in choices:
            raise self.error(key, f"is {printable(value)!r}, not one of {', '.join(choices)}")
        return value

    def integer(self, key: str, minimum: int = 0) -> int:
        """A whole number, at least `minimum`."""
        value = self.value(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise self.error(key, f"is not a whole number of at least {minimum}")
        return value

    def number(self, key: str) -> float:
        """A number, not an infinite one."""
        return self._number(key, self.value(key))

    def items(self, key: str) -> list[Any]:
        """A list of anything."""
        value = self.value(key)
        if not isinstance(value, list):
            raise self.error(key, "is not a list")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings."""
        values = self.items(key)
        if not all(isinstance(value, str) for value in values):
            raise self.error(key, "is not a list of strings")
        return values

    def integers(self, key: str) -> list[int]:
        """A list of whole numbers."""
        values = self.items(key)
        if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
            raise self.error(key, "is not a list of whole numbers")
        return values

    def numbers(self, key: str) -> list[float]:
        """A list of numbers."""
        return [self._number(key, value) for value in self.items(key)]

    def mapping(self, key: str) -> dict[str, Any]:
        """A JSON object of anything."""
        value = self.value(key)
        if not isinstance(value, dict):
            raise self.error(key, "is not a JSON object")
        return value

    def inner(self, key: str) -> "Fields":
        """A JSON object whose keys are required too."""
        return Fields(self.mapping(key), f"{self._where}: {printable(key)}")

    def inners(self, key: str) -> list["Fields"]:
        """A list of such objects."""
        return [Fields(item, f"{self._where}: {printable(key)}[{i}]") for i, item in enumerate(self.items(key))]

    def _number(self, key: str, value: object) -> float:
        # 1e999 is JSON, and so is a whole number that no float can hold.
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
            return float(value)
        raise self.error(key, "is not a number" if value is self._data[key] else "is not a list of numbers")

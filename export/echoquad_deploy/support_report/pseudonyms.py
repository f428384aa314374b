"""Pseudonyms: numbered words in place of names that the report must not show."""

from __future__ import annotations

from collections import defaultdict

__all__ = ["Pseudonyms"]


class Pseudonyms:
    """Replaces values by words such as ``host-1``: the same value by the same word, numbered as they come.

    A hash would not do: names are short, and a list of all of them is hashed in no time.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, dict[str, int]] = defaultdict(dict)

    def replace(self, kind: str, value: object) -> str:
        """Return the word for a value of a kind, such as ``host``."""
        known = self._numbers[kind]
        return f"{kind}-{known.setdefault(str(value), len(known) + 1)}"

    def find(self, kind: str, value: object) -> str | None:
        """Return the word for a value that was replaced before, else None."""
        number = self._numbers[kind].get(str(value))
        return None if number is None else f"{kind}-{number}"

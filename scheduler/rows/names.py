"""Small numbers for names that come and go: places in arrays, bits of masks."""

from __future__ import annotations


class Names:
    """Name -> number, counted from 0; that of a name which has gone is given to a later one."""

    def __init__(self) -> None:
        self.listed: list[str] = []
        """By number; "" where there is none now. Who keeps this list keeps the names of then: it
        only grows, and is replaced when a number changes hands."""
        self.number_of: dict[str, int] = {}
        self._free: list[int] = []

    def number(self, name: str) -> int:
        """Of a name, which gets one if it has none."""
        known = self.number_of.get(name)
        if known is not None:
            return known
        if self._free:
            number = self._free.pop()
            self._replace(number, name)
        else:
            number = len(self.listed)
            self.listed.append(name)
        self.number_of[name] = number
        return number

    def remove(self, name: str) -> int:
        """Returns the number that is free now; raises ``KeyError`` for a stranger."""
        number = self.number_of.pop(name)
        self._replace(number, "")
        self._free.append(number)
        return number

    def _replace(self, number: int, name: str) -> None:
        self.listed = [*self.listed]
        self.listed[number] = name

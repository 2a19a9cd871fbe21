"""The gateways of one cluster: one is active, the others are its standbys, and a client that knows
the URLs of all asks one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

NOT_ACTIVE = 503
"""Status of a standby's answer, and of one that has no engine: the next one may have."""


class Gateways:
    """Whoever answered last as an active one does is asked first."""

    def __init__(self, urls: Iterable[str]) -> None:
        self._urls = [url.rstrip("/") for url in urls]

    def __iter__(self) -> Iterator[str]:
        """A round: the URL of each, without a slash at its end."""
        return iter(list(self._urls))

    def answered(self, url: str) -> None:
        """As the active one."""
        self._urls.remove(url)
        self._urls.insert(0, url)

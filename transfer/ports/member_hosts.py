"""Hosts of members that come while a process runs, as the gateway names them: its ports hear them,
too, until they have left."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Iterable, Sequence

from transfer.ports.source_filter import CannotFilter, admit_others, parse

log = logging.getLogger(__name__)


class MemberHosts:
    """Who is heard at the ports of one process that hear ``networks`` alone, those of its
    configuration, besides these; none: everyone is heard anyhow. One thread."""

    def __init__(self, networks: Sequence[str]) -> None:
        self._networks = list(networks)
        self._hosts: frozenset[str] = frozenset()

    def meet(self, hosts: Iterable[str], are_all: bool) -> None:
        """Hear these from now on; others no more, if they are all that there are. Where that
        fails, all stays as it was, and the log says so."""
        met = frozenset(hosts) if are_all else self._hosts.union(hosts)
        if met == self._hosts or not self._networks:
            return
        try:
            admit_others([*self._networks, *self._beyond_networks(met)])
        except (CannotFilter, ValueError) as error:
            log.error("hosts that have come or gone make no difference: %s", error)
            return
        log.info("heard besides, or no more: %s", ", ".join(sorted(met ^ self._hosts)))
        self._hosts = met

    def _beyond_networks(self, hosts: Iterable[str]) -> list[str]:
        known = parse(self._networks)
        addresses = sorted(map(ipaddress.ip_address, hosts), key=lambda a: (a.version, a))
        return [str(each) for each in addresses if not any(each in network for network in known)]

"""Ports of a cluster's processes: each owns a block, counted from ``--base-port``, so that a
port seen in a log tells whose it is."""

from __future__ import annotations

from dataclasses import replace

from common import mooncake_ports
from launch.cluster.process_record import ProcessRecord
from launch.cluster.tensor_parallel import EngineRanks

# Offsets inside a process's block of ports.
CONTROL = 0
HTTP = 1
RENDEZVOUS = 2
BOOTSTRAP, _BOOTSTRAP_PORTS = 8, 8
_MOONCAKE, _MOONCAKE_PORTS, _MOONCAKE_STARTS = 16, 8, 4
"""Each rank's Mooncake takes two of so many ports, of others at each of so many starts. It needs
a choice: those of a process that just ended cannot be bound for a minute."""
_MEETING_PORTS = 14
"""That SGLang takes from its ``--dist-init-addr`` on (server_args.py, ``PortArgs``)."""

BOOTSTRAP_FLAG = "--disaggregation-bootstrap-port"


def block_ports(ranks: EngineRanks) -> int:
    """Ports that a process of so many ranks owns."""
    return control(ranks, ranks.groups) if ranks.meet else meeting(ranks)


def control(ranks: EngineRanks, group: int) -> int:
    """Offset of the control port of one of an engine's attention groups."""
    return CONTROL if group == 0 else meeting(ranks) + _MEETING_PORTS + group - 1


def meeting(ranks: EngineRanks) -> int:
    """Offset of the first port at which ranks meet, where there are several attention groups or
    hosts."""
    return _MOONCAKE + ranks.total * _MOONCAKE_PORTS * _MOONCAKE_STARTS


def mooncake_env(block_port: int, ranks: int) -> dict[str, str]:
    """For a process whose block begins at ``block_port``; :mod:`engine.sglang.rank_ports`
    shares the ports out among its ranks."""
    first = block_port + _MOONCAKE
    return mooncake_ports.to_env(range(first, first + ranks * _MOONCAKE_PORTS))


ON_EVERY_ADDRESS = ("Mooncake", "rendezvous", "meeting")
"""Purposes of ports that are bound to all of a host's addresses, whatever their process is told."""


def choices(block_port: int, ranks: EngineRanks) -> dict[str, range]:
    """Ports of which a process takes some at each start."""
    first = block_port + meeting(ranks)
    found = {"Mooncake": range(block_port + _MOONCAKE, first)}
    return found | ({"meeting": range(first, first + _MEETING_PORTS)} if ranks.meet else {})


def respawn(record: ProcessRecord, restart_count: int) -> ProcessRecord:
    """The record for the start after ``restart_count`` deaths, with ports of its own.

    Decode engines keep what they learnt from a prefill engine's bootstrap address, and would
    wait for the ranks of the dead one. Mooncake keeps a peer's data port by its RPC port, and
    a process that moved much data to it does not learn a new one: with the RPC port of the
    dead one, all that it writes to the new one fails.
    """
    argv, env, ports = list(record.argv), dict(record.env), dict(record.ports)
    if (first_start := mooncake_ports.from_env(env)) is not None:
        later = restart_count % _MOONCAKE_STARTS * len(first_start)
        env |= mooncake_ports.to_env(range(first_start.start + later, first_start.stop + later))
    if BOOTSTRAP_FLAG in argv:  # of all hosts of an engine the same one, at the first of them
        at = argv.index(BOOTSTRAP_FLAG) + 1
        argv[at] = str(int(argv[at]) + restart_count % _BOOTSTRAP_PORTS)
        ports |= {"bootstrap": int(argv[at])} if "bootstrap" in ports else {}
    return replace(record, argv=tuple(argv), env=env, ports=ports)

"""What iperf3 gets over a node's links: the limit that the arms are measured against."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from benchmarks.testbed.network import Network, within

PORT = 5201
OMIT_S = 1
TIMEOUT_S = 30.0


class IperfFailed(Exception):
    """No rate; the text says why."""


def storage_rates(network: Network, nodes: list[str], seconds: int) -> dict[str, float]:
    """Bytes of payload a second that each node, alone, receives from the store's host."""
    return {
        node: _rate(network, network.store, node, network.store_address, seconds) for node in nodes
    }


def compute_rates(network: Network, nodes: list[str], seconds: int) -> dict[str, float]:
    """The same over compute NICs, each node from the one before it."""
    rates = {}
    for source, node in zip([nodes[-1], *nodes], nodes, strict=False):
        space, address = network.namespace(source), network.compute_address(source)
        rates[node] = _rate(network, space, node, address, seconds)
    return rates


def _rate(network: Network, source: str, node: str, address: str, seconds: int) -> float:
    server = subprocess.Popen(
        [*within(source), "iperf3", "-s", "-1", "-p", str(PORT), "--forceflush"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        _wait_listening(server)
        test = ("-c", address, "-p", str(PORT), "-R", "-t", str(seconds), "-O", str(OMIT_S), "-J")
        done = subprocess.run(
            [*within(network.namespace(node)), "iperf3", *test],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S + seconds,
            check=False,
        )
        return received_bytes_per_s(json.loads(done.stdout))
    except (subprocess.TimeoutExpired, json.JSONDecodeError, KeyError) as error:
        raise IperfFailed(f"iperf3 of {node}: {error!r}") from error
    finally:
        server.kill()
        server.communicate()


def received_bytes_per_s(report: dict[str, Any]) -> float:
    """The receiver's rate in iperf3's JSON; raises :class:`IperfFailed` with its error."""
    if "error" in report:
        raise IperfFailed(f"iperf3: {report['error']}")
    rate = float(report["end"]["sum_received"]["bits_per_second"]) / 8
    if rate == 0:
        # A receiver that gets no core until the test is over has omitted all of it.
        raise IperfFailed("iperf3: nothing received; is the machine overloaded?")
    return rate


def _wait_listening(server: subprocess.Popen[str]) -> None:
    assert server.stdout is not None
    for line in server.stdout:
        if "listening" in line:
            return
    raise IperfFailed("iperf3's server did not start")

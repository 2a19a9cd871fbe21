"""Ports for Mooncake, handed on in the environment and shared out among ranks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from common import mooncake_ports


@given(st.integers(1024, 30000), st.integers(1, 64), st.integers(1, 16))
def test_ranks_share_out_all_ports_of_their_process(first, each, ranks):
    ports = range(first, first + each * ranks)
    assert mooncake_ports.from_env(mooncake_ports.to_env(ports)) == ports
    parts = [mooncake_ports.of_rank(ports, rank, ranks) for rank in range(ranks)]
    assert [port for part in parts for port in part] == list(ports)
    assert mooncake_ports.from_env({}) is None

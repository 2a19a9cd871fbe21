"""Each rank of an engine has ports of its own for Mooncake."""

from __future__ import annotations

import pytest

from engine.sglang.rank_ports import take_own_ports
from launch.cluster.ports import mooncake_env

FIRST = 21000


def ports(env: dict[str, str]) -> range:
    return range(int(env["MC_MIN_RPC_PORT"]), int(env["MC_MAX_RPC_PORT"]) + 1)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_share_out_what_the_launcher_gave_their_engine(ranks):
    together: list[int] = []
    for rank in range(ranks):
        env = mooncake_env(FIRST, ranks)
        take_own_ports(env, rank, ranks)
        assert len(ports(env)) >= 8, "it takes two, of which some may not be free yet"
        together += ports(env)
    assert together == list(ports(mooncake_env(FIRST, ranks)))


def test_an_engine_whose_ports_nobody_chose_keeps_mooncakes_own():
    env = {"PATH": "/bin"}
    take_own_ports(env, rank=1, ranks=2)
    assert env == {"PATH": "/bin"}

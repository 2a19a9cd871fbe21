"""The terminal view, of states recorded from a cluster (1 prefill, 2 decode engines, tiny)."""

from __future__ import annotations

import asyncio
import copy
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from launch.top import main, render
from tests.common.ports import free_port
from tests.launch.gateway.client import GENERATE, post
from tests.launch.gateway.stubs import running_cluster as cluster_of

VIEWS = json.loads((Path(__file__).parent / "cluster_views.json").read_text())
"""Busy with three clients; 2 s later, d1 drained."""


def shown(view, before=None) -> list[str]:
    console = Console(width=140, color_system=None)
    with console.capture() as capture:
        console.print(render(view, before))
    return capture.get().splitlines()


def row(lines: list[str], name: str) -> list[str]:
    """Cells of the one row that begins so."""
    [line] = [line for line in lines if line.startswith(name)]
    return re.split(r"  +", line.strip())


def test_engines_agents_and_requests_are_shown():
    lines = shown(VIEWS[1])
    assert "n-way" in lines[0] and "3/256" in lines[0] and "138 blocks" in lines[0]
    assert row(lines, "p0 ")[:2] == ["p0 (prefill)", "busy"] and row(lines, "p0 ")[-1] == "11,294"
    assert row(lines, "d0 ")[1:3] == ["busy", "6"]
    assert row(lines, "d1 ")[1] == "drained"
    assert "849.9 MiB" in row(lines, "agent-d0")
    newest = row(lines, VIEWS[1]["requests"]["recent"][0]["rid"][:16])
    assert newest[1:3] == ["ok", "p0 d0"] and {"1,500", "1,472"} <= set(newest)
    assert newest[-1] == "agent-d1:23"


def test_reads_are_shared_out_since_the_state_before():
    first = shown(VIEWS[0])
    shares = {name: row(first, name)[-1] for name in ("agent-p0", "agent-d0", "agent-d1")}
    assert [shares[name][-3:] for name in sorted(shares)] == ["20%", "30%", "50%"]
    assert row(first, "agent-p0")[-2] == "█████░░░░░"
    later = copy.deepcopy(VIEWS[0])
    later["agents"][0]["share_bytes_total"] += 3 << 20
    later["agents"][1]["share_bytes_total"] += 1 << 20
    lines = shown(later, VIEWS[0])
    names = [agent["name"] for agent in later["agents"]]
    assert [row(lines, name)[-1][-4:].strip() for name in names] == ["75%", "25%", "0%"]


def test_a_standby_is_told_apart():
    assert "standby | " in shown(VIEWS[0] | {"standing": "standby"})[0]
    assert "standby" not in shown(VIEWS[0])[0]


def test_who_is_silent_or_still_draining_is_seen():
    view = copy.deepcopy(VIEWS[0])
    view["engines"][0]["alive"] = False
    view["engines"][1]["draining"] = True
    lines = shown(view)
    names = [engine["name"] for engine in view["engines"][:2]]
    assert [row(lines, f"{name} ")[1] for name in names] == ["silent", "draining"]


@pytest.mark.asyncio
async def test_it_asks_the_gateway_that_answers(capsys) -> None:
    async with cluster_of() as cluster:
        await post(cluster, "/generate", {**GENERATE, "rid": "mine"})
        urls = ",".join(f"http://127.0.0.1:{port}" for port in (free_port(), cluster.config.port))
        assert await asyncio.to_thread(main, ["--once", "--url", urls]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert row(lines, "mine")[1:3] == ["ok", "p0 d0"]
    assert row(lines, "node-p")[1] == "idle"


@pytest.mark.parametrize("options", [["--once"], []])
def test_without_a_cluster_it_says_so(options, capsys) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert main([*options, "--url", url]) == 1
    assert "no cluster" in capsys.readouterr().out

"""``python -m launch.node``: a reader joins, drains and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from common.cluster.membership import JoinRequest, LeaveRequest, NodeMembers, Renewal, State
from common.user_files import write_private
from launch.cluster.child import session_members
from tests.cluster import free_port_block
from tests.launch.node.registry_stub import StubRegistry, refusal

TIMEOUT_S = 60


@contextlib.asynccontextmanager
async def reader(registry: StubRegistry, folder: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    secret = folder / "secret"
    write_private(secret, b"s" * 32)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "launch.node", "--join", registry.url, "--role", "reader"),
        *("--name", "r0", f"--cluster-secret-file={secret}", "--host=127.0.0.1"),
        *("--dram-bytes=1MiB", "--ssd-bytes=1MiB", f"--ssd-dir={folder}", "--transfer=tcp"),
        *(f"--base-port={free_port_block(96)}", f"--log-dir={folder}", "--device=cpu"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def said(process: asyncio.subprocess.Process, words: str) -> None:
    assert process.stdout is not None
    async with asyncio.timeout(TIMEOUT_S):
        while words not in (line := (await process.stdout.readline()).decode()):
            assert line, f"it ended without saying {words!r}"


def children_of(pid: int) -> list[int]:
    """Leaders of sessions of their own, whose parent this is."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def drains(registry: StubRegistry) -> Callable[[], bool]:
    return lambda: any(r.state is State.DRAINING for r in registry.of(Renewal))


async def test_a_reader_joins_drains_at_a_signal_and_leaves(tmp_path):
    async with StubRegistry() as registry, reader(registry, tmp_path) as process:
        await said(process, "r0 serves")
        [request] = registry.of(JoinRequest)
        assert (request.name, request.members) == ("r0", NodeMembers())
        told = registry.of(Renewal)[-1].members
        assert told.agent.name == "agent-r0" and told.agent.control.startswith("tcp://127.0.0.1:")
        sessions = children_of(process.pid)
        assert session_members(sessions)
        process.send_signal(signal.SIGTERM)
        await registry.until(drains(registry), TIMEOUT_S)
        assert session_members(sessions) and not registry.of(LeaveRequest)
        registry.idle = True
        assert await asyncio.wait_for(process.wait(), TIMEOUT_S) == 0
        assert registry.of(LeaveRequest) and not registry.leases
        assert session_members(sessions) == []


@pytest.mark.slow
async def test_a_second_signal_ends_it_at_once(tmp_path):
    async with StubRegistry() as registry, reader(registry, tmp_path) as process:
        await said(process, "r0 serves")
        sessions = children_of(process.pid)
        process.send_signal(signal.SIGTERM)
        await registry.until(drains(registry), TIMEOUT_S)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), TIMEOUT_S) == 0
        assert registry.of(LeaveRequest)
        assert session_members(sessions) == []


async def test_a_signal_ends_a_node_that_waits_for_a_gateway(tmp_path):
    async with StubRegistry() as registry:
        registry.refusals = [refusal(503, "not yet") for _ in range(600)]
        async with reader(registry, tmp_path) as process:
            await said(process, "waiting to join")
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), TIMEOUT_S) == 0
        assert not (tmp_path / "agent-r0.log").exists()


async def test_a_node_that_is_refused_says_why_and_starts_nothing(tmp_path):
    async with StubRegistry() as registry:
        registry.refusals = [refusal(409, "--transfer is rdma there")]
        async with reader(registry, tmp_path) as process:
            await said(process, "error: ")
            assert await asyncio.wait_for(process.wait(), TIMEOUT_S) == 1
        assert not registry.of(LeaveRequest)
        assert not (tmp_path / "agent-r0.log").exists()


@pytest.mark.slow
async def test_a_lease_that_is_refused_later_ends_the_node(tmp_path):
    async with StubRegistry() as registry, reader(registry, tmp_path) as process:
        await said(process, "r0 serves")
        sessions = children_of(process.pid)
        registry.forget()
        registry.refusals = [refusal(404, "unknown"), refusal(409, "r0 is another's")]
        await said(process, "r0 is another's")
        assert await asyncio.wait_for(process.wait(), TIMEOUT_S) == 1
        assert session_members(sessions) == []

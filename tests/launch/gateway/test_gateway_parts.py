"""A model whose state has parts: what the gateway orders, and what it tells of it."""

from __future__ import annotations

import msgspec
import pytest

from common.block import BlockLayout, Part, block_keys, part_key
from common.messages.from_gateway import EnginePlan, ReadShare, ReleasePlan
from common.page_hashes import page_hashes
from tests.launch.gateway.agent_stub import NAMESPACE, PAGE_TOKENS
from tests.launch.gateway.client import GENERATE, PROMPT, metric, post
from tests.launch.gateway.stubs import running_cluster as cluster_of

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]

WINDOW = Part("window", BlockLayout(PAGE_TOKENS, 2, (4, 4)), 2)
WITH_WINDOW = msgspec.structs.replace(NAMESPACE, parts=(WINDOW,))


async def test_a_hit_travels_with_its_window_or_is_shorter() -> None:
    async with cluster_of(path_policy="decode") as cluster:
        for engine in cluster.engines:
            engine.namespace = WITH_WINDOW
        peers = cluster.services.plane.members.engines
        await cluster.until(
            lambda: all(peer.hello.namespace == WITH_WINDOW for peer in peers.values())
        )
        tokens, agent = [ord(c) for c in PROMPT], cluster.agents["node-d"]
        keys = block_keys(WITH_WINDOW.digest(), page_hashes(tokens, PAGE_TOKENS))[:3]
        window = [part_key("window", key) for key in keys[:2]]
        await cluster.announce(agent.name, [*keys, *window])
        status, _, trace = await post(cluster, "/generate", GENERATE)
        assert status == 200
        assert trace["hit_blocks"] == 2 and trace["lacking"] == {"window": 1}
        [share] = agent.got(ReadShare)
        assert share.keys == [*keys[:2], *window]
        assert share.sizes == [NAMESPACE.layout.block_bytes] * 2 + [WINDOW.layout.block_bytes] * 2
        for engine in cluster.engines:
            [plan] = engine.got(EnginePlan)
            assert plan.keys == keys[:2] and plan.part_readers == [[0, 0]] and not plan.fault
        assert await metric(cluster, 'dualpath:lacking_tokens_total{part="window"}') == PAGE_TOKENS
        agent.lost = {window[1]}
        _, _, trace = await post(cluster, "/generate", GENERATE)
        assert (trace["hit_blocks"], trace["attempts"]) == (1, 1), "its window is there"
        plan = cluster.prefills[0].got(EnginePlan)[-1]
        assert plan.keys == keys[:1] and plan.part_readers == [[0]]
        agent.lost = set(window)
        _, _, trace = await post(cluster, "/generate", GENERATE)
        plan = cluster.prefills[0].got(EnginePlan)[-1]
        assert plan.keys == [] and plan.part_readers in ([], [[]])
        await cluster.until(lambda: agent.got(ReleasePlan))

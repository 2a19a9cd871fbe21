"""What an engine tells the gateway of its load, read from SGLang's queues as they are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from common.ids import Incarnation
from common.loads import ModelBounds
from engine.report import EngineIdentity, EngineReport
from engine.sglang.requests import EngineRequests
from tests.engine.parts import NAMESPACE, PAGE, Parts, Request

BOUNDS = ModelBounds(vocabulary_tokens=100, context_tokens=64, prompt_tokens_max=60)


class Scheduler:
    """SGLang's, with requests in all places at which it keeps them."""

    def __init__(self, role: str) -> None:
        request = [Request(f"r{i}", list(range(10 * (i + 1)))) for i in range(6)]
        self.running_batch = SimpleNamespace(reqs=[request[0]])
        self.waiting_queue = [request[1]]
        self.chunked_req = request[2]
        waiting, wrapped = request[3], [SimpleNamespace(req=r) for r in request[4:]]
        is_prefill = role == "prefill"
        self.disagg_prefill_bootstrap_queue = self._queue([waiting] if is_prefill else None)
        self.disagg_decode_prealloc_queue = self._queue(None if is_prefill else wrapped[:1])
        self.disagg_decode_transfer_queue = self._queue(None if is_prefill else wrapped[1:])
        self.tree_cache = SimpleNamespace(evictable_size=lambda: 100)

    def _queue(self, entries):
        return SimpleNamespace(queue=entries) if entries is not None else None


@pytest.fixture
def report():
    def report(role: str) -> tuple[Parts, EngineReport]:
        engine = Parts(role, pages=5)
        identity = EngineIdentity("e0", role, "a", "group", Incarnation(3), 8998, BOUNDS)
        samples = [engine.deliveries.samples, engine.jobs.samples, engine.persister.samples]
        requests = EngineRequests(Scheduler(role))
        made = EngineReport(identity, requests, engine.plans, engine.holds, lambda: None, samples)
        return engine, made

    return report


def test_a_prefill_engine_counts_what_is_neither_computed_nor_to_be_loaded(report):
    engine, made = report("prefill")
    load = made.hello().load
    assert (load.engine, load.role, load.agent, load.group) == ("e0", "prefill", "a", "group")
    assert load.sequences == 3  # running, waiting, and waiting for its decode engine
    assert load.context_tokens == 10 + 20 + 40
    assert load.pending_tokens == 20 + 40 + 30  # the one that was cut too
    assert load.free_tokens == 5 * PAGE + 100
    engine.plan(Request("r3", list(range(40))), 4)
    assert made.hello().load.pending_tokens == 20 + (40 - 4 * PAGE) + 30


def test_a_decode_engine_has_nothing_pending(report):
    _, made = report("decode")
    load = made.hello().load
    assert load.sequences == 4 and load.context_tokens == 10 + 20 + 50 + 60
    assert load.pending_tokens == 0


def test_it_tells_its_weights_and_all_its_parts_have_counted(report):
    engine, made = report("decode")
    hello = made.hello()
    assert hello.namespace == NAMESPACE and hello.bootstrap_port == 8998
    engine.weights.changed("2", is_clean=True)
    request = Request("r", list(range(18)))
    engine.persister.begin(request)
    engine.persister.advance(request, 18)
    hello = made.hello()
    assert hello.weights.version == "2" and hello.namespace == engine.weights.namespace
    values = {sample.metric: sample.value for sample in hello.samples}
    assert values["engine_blocks_offered_total"] == 4 and values["engine_open_jobs"] == 1
    assert {"engine_deliveries_total", "engine_quarantined_pages"} <= values.keys()

"""A trainer updates the weights through the gateway while requests run: every token is one that
plain SGLang gives with the weights that were there, and no KV of one version meets another."""

from __future__ import annotations

import json
import signal
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from benchmarks.clients.trainer import Group, described, serialized, tensors_of
from launch.models.resolve import resolve_model
from tests.cluster import GREEDY, RequestFailed, get, post, prompt
from tests.common.ports import free_port
from tests.weights.conftest import WITH_THE_CLUSTER

pytestmark = WITH_THE_CLUSTER

PAGE = 64
PROMPT = prompt(400, seed=8)
HIT = (len(PROMPT) - 1) // PAGE * PAGE
TINY = resolve_model("tiny")


@pytest.fixture
def call(cluster):
    def call(path: str, **body: Any) -> Any:
        return post(f"{cluster.url}/{path}", body).body

    return call


class Stream:
    """A request whose tokens come one after another."""

    def __init__(self, url: str, ids: list[int], tokens: int) -> None:
        params = {**GREEDY, "max_new_tokens": tokens}
        body = {"input_ids": ids, "sampling_params": params, "stream": True}
        request = urllib.request.Request(
            f"{url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        self.ids = ids
        self._events = self._read(urllib.request.urlopen(request, timeout=120))
        self.last: dict[str, Any] = next(self._events)

    @staticmethod
    def _read(response: Any) -> Iterator[dict[str, Any]]:
        with response:
            for line in response:
                if line.startswith(b"data:") and b"[DONE]" not in line:
                    yield json.loads(line[5:])

    def rest(self) -> dict[str, Any]:
        """The last event, at the end."""
        for event in self._events:
            self.last = event
            assert "error" not in self.last, self.last
        return self.last

    @property
    def output_ids(self) -> list[int]:
        return self.last["output_ids"]


def in_background(pool: ThreadPoolExecutor, work: Any, *args: Any, **fields: Any) -> Future[Any]:
    return pool.submit(work, *args, **fields)


def test_a_pause_ends_what_runs_and_a_folder_s_weights_have_their_kv_again(
    cluster, plain, models, call
):
    other, _ = models
    assert cluster.generate(PROMPT).output_ids == plain(PROMPT)
    cluster.wait_stored()
    running = Stream(cluster.url, prompt(200, seed=9), tokens=400)
    with ThreadPoolExecutor() as pool:
        assert call("pause_generation")["status"] == "ok"
        waiting = pool.submit(cluster.generate, prompt(300, seed=10))
        updated = call("update_weights_from_disk", model_path=str(other), weight_version="1")
        assert updated["success"]
        assert not waiting.done()
        call("continue_generation")
        assert waiting.result().output_ids == plain.of_weights(other, prompt(300, seed=10))
    cut = running.rest()
    assert cut["meta_info"]["finish_reason"]["type"] == "abort"
    got = running.output_ids
    assert 0 < len(got) < 400 and got == plain(running.ids, max_new_tokens=len(got))

    under_others = cluster.generate(PROMPT)
    assert under_others.output_ids == plain.of_weights(other, PROMPT) != plain(PROMPT)
    assert under_others.cached_tokens == 0
    assert (
        json.loads(urllib.request.urlopen(f"{cluster.url}/health", timeout=10).read())[
            "weight_version"
        ]
        == "1"
    )

    call("update_weights_from_disk", model_path=str(TINY))  # no pause, no version
    back = cluster.generate(PROMPT)
    assert back.output_ids == plain(PROMPT) and back.cached_tokens == HIT
    assert back.read_bytes("dram") + back.read_bytes("ssd") >= 0


def test_what_decodes_goes_on_under_the_new_weights_after_a_retraction(
    cluster, plain, models, call
):
    other, _ = models
    running = Stream(cluster.url, prompt(200, seed=11), tokens=300)
    call("pause_generation", mode="retract")
    call("flush_cache")
    call("update_weights_from_disk", model_path=str(other), weight_version="2")
    call("continue_generation")
    meta = running.rest()["meta_info"]
    got = running.output_ids
    assert len(got) == 300, meta
    first, second = meta["weight_versions"]
    assert second["version"] == "2" and second["end"] == 300
    begun = got[: first["end"]]
    assert 0 < len(begun) < 300 and begun == plain(running.ids, max_new_tokens=len(begun))
    rest = got[len(begun) :]
    assert rest[:16] == plain.of_weights(other, running.ids + begun)


def test_tensors_reach_every_engine_and_a_hostile_pickle_none(cluster, plain, models, call):
    _, other = models
    engines = cluster.incarnations("engines")
    for hostile in ("Y29zCnN5c3RlbQooUydlY2hvJwp0Ui4=", "bm8gcGlja2xl"):
        with pytest.raises(RequestFailed, match="400"):
            call("update_weights_from_tensor", serialized_named_tensors=[hostile])
    tensors = tensors_of(other)
    body = {"serialized_named_tensors": [serialized(tensors)], "weight_version": "3"}
    assert call("update_weights_from_tensor", **body)["success"]
    answer = cluster.generate(PROMPT)
    assert answer.output_ids == plain.of_weights(other, PROMPT)
    assert answer.cached_tokens == 0
    assert cluster.incarnations("engines") == engines


def test_two_jobs_that_call_their_weights_alike_share_nothing(cluster, plain, models, call):
    group = Group("job", free_port(), world_size=3)
    with pytest.raises(RequestFailed, match="world_size 2 is too small"):
        call("init_weights_update_group", **{**group.body(), "world_size": 2})
    joining = group.join()
    assert call("init_weights_update_group", **group.body())["success"]
    joining.join(30)
    for model in models:
        tensors = tensors_of(model)
        call("pause_generation")
        call("begin_weight_update", selector="all")
        sending = group.broadcast(tensors)
        body = {**described(tensors), "group_name": "job", "weight_version": "1"}
        assert call("update_weights_from_distributed", **body)["success"]
        sending.join(30)
        call("end_weight_update")
        call("continue_generation")
        cold = cluster.generate(PROMPT)
        assert cold.output_ids == plain.of_weights(model, PROMPT) and cold.cached_tokens == 0
        cluster.wait_stored()
        cluster.flush_engines()
        warm = cluster.generate(PROMPT)
        assert warm.output_ids == cold.output_ids and warm.cached_tokens == HIT
    call("destroy_weights_update_group", group_name="job")


def test_an_engine_that_begins_anew_waits_for_the_weights_of_the_others(
    cluster, plain, models, call
):
    """It begins with those of its flags, which the cluster has no more; but loads the folder that
    they came from, where there is one."""
    restarted(cluster, "d0")
    status, text = get(f"{cluster.url}/health")
    assert status == 503 and "weights" in text
    other, _ = models
    call("update_weights_from_disk", model_path=str(other), weight_version="9")
    expected = plain.of_weights(other, PROMPT)
    assert cluster.generate(PROMPT).output_ids == expected
    restarted(cluster, "d0")
    cluster.wait_healthy()
    assert cluster.generate(PROMPT).output_ids == expected


def restarted(cluster, name: str) -> None:
    before = cluster.incarnations("engines")
    cluster.signal(name, signal.SIGKILL)
    cluster.wait_until(
        lambda: cluster.incarnations("engines").get(name, 0) > before[name], 120, "it is back"
    )

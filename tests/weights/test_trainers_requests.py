"""The requests of trainers, as their sources have them, in their order: what the gateway of a
cluster answers is what plain SGLang does, status and keys, but for what docs/api.md lists."""

from __future__ import annotations

import pytest

from benchmarks.clients.trainer import tensors_of
from launch.models.resolve import resolve_model
from tests.cluster import post, prompt
from tests.weights.conftest import WITH_THE_CLUSTER
from tests.weights.replay import AS_SENT, Replay

pytestmark = WITH_THE_CLUSTER

ROUTERS = ("/workers", "/get_weight_version")
"""Not SGLang's own: of its router, and of the build that slime brings."""
READ: dict[str, tuple[str, ...]] = {
    "/health": (),
    "/health_generate": (),
    "/v1/loads?include=core": (".loads[].num_running_reqs", ".loads[].num_waiting_reqs"),
    "/server_info": (".model_path", ".tp_size", ".pp_size", ".dp_size", ".disaggregation_mode"),
}
"""Of answers about one process: what trainers read of them."""
IDS = prompt(300, seed=12)


@pytest.fixture
def at_sglang(plain):
    """Its weights are a test's alone; what others have asked it is no hit here."""
    with plain.lent() as url:
        post(f"{url}/flush_cache", {})
        yield url


@pytest.fixture(autouse=True)
def weights_of_the_model(cluster):
    """For the tests that come after."""
    yield
    tiny = {"model_path": str(resolve_model("tiny"))}
    assert post(f"{cluster.url}/update_weights_from_disk", tiny).body["success"]


@pytest.mark.parametrize("trainer", AS_SENT)
def test_the_gateway_answers_a_trainer_as_sglang_does(trainer, at_sglang, cluster, models):
    weights = tensors_of(resolve_model("tiny"))
    alone = Replay(at_sglang, 1, models[0], weights, opens_sessions=True)
    whole = Replay(cluster.url, 2, models[0], weights, opens_sessions=False)
    for path, method, body in AS_SENT[trainer]:
        expected, got = alone.call(path, method, body), whole.call(path, method, body)
        if path in ROUTERS:
            assert (expected.status, got.status) == (404, 200), path
            continue
        assert got.status == expected.status, (path, expected.value, got.value)
        if expected.status >= 400:  # what is wrong is said by several engines
            continue
        wanted = READ.get(path, expected.shape)
        assert got.lacks(expected.only(wanted)) == [], (path, expected.value, got.value)
    assert cluster.state()["weights"]["held_by"] == []
    assert len(cluster.generate(IDS).output_ids) == 16


def test_memory_that_was_not_released_is_no_trouble_to_resume(cluster):
    """SGLang's scheduler ends there."""
    engines = cluster.incarnations("engines")
    for name in ("p0", "d0"):
        resumed = f"{cluster.url}/admin/engine/{name}/resume_memory_occupation"
        assert post(resumed, {"tags": ["weights"]}).body == "null"
    assert post(f"{cluster.url}/resume_memory_occupation", {}).body == "null"
    assert len(cluster.generate(IDS).output_ids) == 16
    assert cluster.incarnations("engines") == engines

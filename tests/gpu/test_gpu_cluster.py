"""(b) and (f) of docs/gpu.md: a prefill and a decode engine on one GPU over TCP, with overlap
and CUDA graphs as SGLang has them by default."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from tests.cluster import Cluster, get, prompt, running_cluster

PAGE = 64
HALF = "--base-gpu-id 0 --mem-fraction-static 0.35 --max-total-tokens 65536 --dtype bfloat16"

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module", params=["", "--disaggregation-enable-kv-checksum"])
def cluster(request, tmp_path_factory):
    """Both engines on one GPU; once more with SGLang's digests of what P sends."""
    flags = ["--model", "tiny", "--device", "cuda", "--transfer", "tcp", "--poison-kv"]
    flags += ["--load-policy", "always", "--engine-args", f"{HALF} {request.param}"]
    with running_cluster(tmp_path_factory.mktemp("gpu"), *flags) as running:
        yield running


def test_f_hits_give_the_tokens_of_computing_all(cluster):
    for seed, length in enumerate((65, 129, 1000, 4000)):
        ids = prompt(length, seed)
        cluster.flush_engines()
        cold = cluster.generate(ids)
        stored = until_stored(cluster, ids)
        assert stored.cached_tokens == (length - 1) // PAGE * PAGE
        assert stored.output_ids == cold.output_ids, f"{length} tokens"


def until_stored(cluster: Cluster, ids: list[int]) -> Any:
    deadline = time.monotonic() + 60
    while True:
        cluster.flush_engines()
        answer = cluster.generate(ids)
        if answer.cached_tokens or time.monotonic() > deadline:
            return answer
        time.sleep(0.5)


def test_b_layers_are_seen_while_graphs_are_replayed(cluster):
    """Every one of them leaves at its attention, none only at the end of its forward."""
    status, text = get(f"{cluster.url}/admin/engine/p0/server_info")
    assert status == 200
    assert json.loads(text)["cuda_graph_config"]["prefill"]["backend"] == "breakable"
    cluster.generate(prompt(500, seed=9))
    cluster.wait_reported("engines")
    assert cluster.metric_sum("engine_suffix_sent_bytes_total") > 0
    assert cluster.metric_sum("engine_layers_unseen_total") == 0

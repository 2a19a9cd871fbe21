"""Prefill with KV of a few layers in memory, on real processes: tokens are those of plain
SGLang, whatever share is a hit, in one chunk or several, with late, dead and unwanted
deliveries. SGLang's leak check is on: an engine that leaks a page ends, and is missed here."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import signal
import threading
import time
import urllib.parse

import pytest

from tests.cluster import GREEDY, prompt, running_cluster, shared_plain
from tests.prefill_checks import PAGE, check_sampled_prompts

WINDOW = 2
"""The least. tests/test_ranks_walk.py has 3 and 4, with ranks, with a quota, and where they do not
divide the number of layers."""
CHUNK = 512
BASE_TOKENS = 3000
POOL_TOKENS = 32768
ENGINES = ("p0", "d0")

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(600)]


BASES = [prompt(BASE_TOKENS, seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def plain():
    return shared_plain()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, plain):
    flags = ["--model", "tiny", "--poison-kv", "--load-policy", "always", "--dram-bytes", "400MiB"]
    flags += ["--prefill-layer-window", str(WINDOW), "--max-total-tokens", str(POOL_TOKENS)]
    flags += ["--prefill-args", f"--chunked-prefill-size {CHUNK}", "--deliver-timeout-s", "8"]
    with running_cluster(tmp_path_factory.mktemp("window"), *flags) as running:
        for base in BASES:
            running.generate(base)
        running.wait_stored()
        yield running
        assert running.metric_sum("dualpath:engine_open_jobs") == 0


@pytest.fixture(autouse=True)
def nothing_is_left(cluster):
    """Every page is free again, and no engine had to be started anew."""
    before = cluster.incarnations("engines")
    cluster.flush_engines()
    free = free_tokens(cluster)
    yield
    cluster.flush_engines()
    cluster.wait_until(lambda: free_tokens(cluster) == free, 20, "all pages free")
    cluster.wait_unharmed(before)


def free_tokens(cluster) -> dict[str, int]:
    return {engine["name"]: engine["free_tokens"] for engine in cluster.state()["engines"]}


def test_tokens_are_those_of_plain_sglang(cluster, plain):
    check_sampled_prompts(cluster, plain, BASES, examples=8)


def test_the_pool_has_the_buffers_of_the_window_only(cluster):
    sizes = {e: cluster.metric_sum(f'engine_kv_bytes{{engine="{e}"') for e in ENGINES}
    assert sizes["p0"] == (POOL_TOKENS + PAGE) * 8192 * WINDOW / 8


def test_later_chunks_read_earlier_ones_from_the_decode_engine(cluster, plain):
    before = cluster.metric_sum("engine_read_back_pages_total")
    ids = BASES[0][:1024] + prompt(1500, seed=50)
    assert cluster.generate(ids).output_ids == plain(ids)
    cluster.wait_reported("engines")
    # Chunks of 512: 1024 hit, 512 + 512 + 476 new ones; the second re-reads 8 pages, the
    # third 16.
    assert cluster.metric_sum("engine_read_back_pages_total") - before == 24


def test_a_prefix_that_only_the_decode_engine_has_is_computed_again(cluster, plain):
    ids = prompt(900, seed=60)
    reply = cluster.generate(ids).output_ids
    longer = ids + reply + prompt(700, seed=61)
    cluster.set_policy("split")  # whatever is stored by now is a hit, the rest is D's alone
    assert cluster.generate(longer).output_ids == plain(longer)


def test_thirty_two_at_once(cluster, plain):
    prompts = [BASES[i % 2][: 600 + 64 * i] + prompt(40 + i, seed=i) for i in range(32)]
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(cluster.generate, prompts))
    for ids, answer in list(zip(prompts, answers, strict=True))[::4]:
        assert answer.output_ids == plain(ids)
    assert all(len(answer.output_ids) == 16 for answer in answers)


@contextlib.contextmanager
def stuttering(cluster, name: str):
    """The process runs for 5 ms at a time and then stands still for 50."""
    over = threading.Event()

    def stutter() -> None:
        while not over.is_set():
            cluster.signal(name, signal.SIGSTOP)
            time.sleep(0.05)
            cluster.signal(name, signal.SIGCONT)
            time.sleep(0.005)

    thread = threading.Thread(target=stutter)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_every_layer_comes_late(cluster, plain):
    ids = BASES[0][:2944] + prompt(40, seed=70)
    cluster.set_policy("decode")
    with stuttering(cluster, "agent-d0"):
        answer = cluster.generate(ids)
    assert answer.output_ids == plain(ids) and answer.cached_tokens == 2944


@contextlib.contextmanager
def in_mid_layer(cluster, ids: list[int]):
    """A request whose delivery stands still: its agent is suspended while layers are due."""
    cluster.set_policy("decode")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        stutter = stuttering(cluster, "agent-d0")
        with stutter:
            future = pool.submit(cluster.generate, ids)
            time.sleep(0.25)
        cluster.signal("agent-d0", signal.SIGSTOP)
        try:
            yield future
        finally:
            with contextlib.suppress(AssertionError):
                cluster.signal("agent-d0", signal.SIGCONT)


def test_an_agent_that_dies_in_mid_layer(cluster, plain):
    ids = BASES[1][:2944] + prompt(50, seed=80)
    before = cluster.incarnations("agents")
    with in_mid_layer(cluster, ids) as answer:
        cluster.signal("agent-d0", signal.SIGKILL)
        assert answer.result(60).output_ids == plain(ids)
    cluster.wait_restarted({"agent-d0": before["agent-d0"]})
    assert cluster.generate(ids).output_ids == plain(ids)


def test_a_request_that_is_aborted_in_mid_layer(cluster, plain):
    ids = BASES[0][:2944] + prompt(50, seed=90)
    host = urllib.parse.urlsplit(cluster.url).netloc
    cluster.set_policy("decode")
    with stuttering(cluster, "agent-d0"):
        connection = http.client.HTTPConnection(host, timeout=10)
        body = json.dumps({"input_ids": ids, "sampling_params": GREEDY})
        connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
        time.sleep(0.3)
        connection.close()
        time.sleep(0.3)
    assert cluster.generate(ids).output_ids == plain(ids)

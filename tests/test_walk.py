"""The whole walk, on real processes: tokens are those of plain SGLang whatever path a block
took, and the trace says which path that was. KV pools are poisoned at start and after each
flush, so a delivery that never happened cannot pass unseen."""

from __future__ import annotations

import concurrent.futures
import json
import shutil
import signal
from typing import Any

import pytest
from hypothesis import given, settings

from launch.models.resolve import resolve_model
from tests.cluster import (
    RequestFailed,
    post,
    prompt,
    running_cluster,
    shared_plain,
)
from tests.launch.gateway import hostile

PAGE = 64
BLOCK_BYTES = 8192 * PAGE
VOCABULARY = range(300, 2000)
POLICIES = ("prefill", "decode", "round-robin", "shorter-queue", "split", "n-way")
LENGTHS = (63, 64, 65, 127, 128, 129, 4000)
# Fewer DRAM slots an agent than two prompts of so many tokens need (51 blocks each).
LARGE_PROMPT = 3300
DRAM_BYTES = 100 * BLOCK_BYTES
POOL_TOKENS = 20480

pytestmark = [pytest.mark.slow, pytest.mark.whole, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("walk")


@pytest.fixture(scope="module")
def plain():
    return shared_plain()


@pytest.fixture(scope="module")
def cluster(folder, plain):
    remote = (folder / "remote").as_uri()
    # Two decode engines, so that there is a third node for n-way reads.
    flags = ["--model", "tiny", "--decode", "2", "--poison-kv", "--dram-bytes", str(DRAM_BYTES)]
    # A small pool is poisoned sooner: with each flush.
    flags += ["--max-total-tokens", str(POOL_TOKENS)]
    # A quota that cuts the longest prompts.
    flags += ["--load-policy", "always", "--remote", remote, "--prefill-quota-ms", "300"]
    with running_cluster(folder / "cluster", *flags) as running:
        yield running


AGENTS = ("agent-p0", "agent-d0", "agent-d1")


def expected_hit(length: int) -> int:
    return (length - 1) // PAGE * PAGE


# ---- 1: token identity ------------------------------------------------------------------


def test_cold_prompts_give_the_tokens_of_plain_sglang(cluster, plain):
    for length in LENGTHS:
        ids = prompt(length, seed=length)
        assert cluster.generate(ids).output_ids == plain(ids), length
    cluster.wait_stored()
    sent = cluster.metric_sum("engine_moved_bytes_total")
    assert sent == cluster.metric_sum("engine_suffix_sent_bytes_total") > 0


@pytest.mark.parametrize("policy", POLICIES)
def test_hits_give_the_same_tokens_on_every_path(cluster, plain, policy):
    cluster.set_policy(policy)
    cluster.flush_engines()
    for length in LENGTHS:
        ids = prompt(length, seed=length)
        answer = cluster.generate(ids)
        assert answer.output_ids == plain(ids), length
        assert answer.cached_tokens == expected_hit(length)
        hit_bytes = expected_hit(length) // PAGE * BLOCK_BYTES
        delivered = answer.trace["delivered_bytes"]
        engines = {"p0", answer.trace["decode"]} if hit_bytes else set()
        assert delivered == dict.fromkeys(engines, hit_bytes)


def test_a_second_turn_hits_every_block_of_the_first_generated_ones_included(cluster, plain):
    first = prompt(1000, seed=1)
    reply = cluster.generate(first, sampling_params={"max_new_tokens": 90}).output_ids
    assert reply == plain(first, max_new_tokens=90)  # one block has generated tokens alone
    cluster.wait_stored()
    for number, policy in enumerate(POLICIES):
        second = first + reply + prompt(40, seed=100 + number)
        cluster.set_policy(policy)
        cluster.flush_engines()
        answer = cluster.generate(second)
        assert answer.output_ids == plain(second)
        # Of turn 1, all but the last generated token's KV exists.
        assert answer.cached_tokens == (len(first) + len(reply) - 1) // PAGE * PAGE


def test_sampling_gives_the_same_tokens_where_sglang_repeats_them(cluster, plain):
    # SGLang repeats a seed only with --enable-deterministic-inference, which has no CPU
    # backend; sampling among one candidate goes through the same sampler and repeats.
    ids = prompt(700, seed=3)
    sampled = {"temperature": 1.0, "top_k": 1, "sampling_seed": 11}
    assert cluster.generate(ids, sampling_params=sampled).output_ids == plain(ids, **sampled)
    cluster.wait_stored()
    for policy in POLICIES:
        cluster.set_policy(policy)
        cluster.flush_engines()
        answer = cluster.generate(ids, sampling_params=sampled)
        assert answer.output_ids == plain(ids, **sampled)
        assert answer.cached_tokens == expected_hit(len(ids))


# ---- 1 and 2: from SSD after a restart, from remote after SSD is gone; the trace ---------


def stored_prompts(cluster, policies: tuple[str, ...], seed: int) -> dict[str, list[int]]:
    """A prompt for each policy, all of it durable."""
    prompts = {policy: prompt(2000, seed + number) for number, policy in enumerate(policies)}
    for ids in prompts.values():
        cluster.generate(ids)
        cluster.wait_stored()
    return prompts


def test_blocks_survive_kill_9_of_the_agents_and_are_read_from_ssd(cluster, plain):
    prompts = stored_prompts(cluster, POLICIES, seed=40)
    cluster.restart_agents()
    cluster.flush_engines()
    for policy, ids in prompts.items():
        cluster.set_policy(policy)
        answer = cluster.generate(ids)
        assert answer.output_ids == plain(ids), policy
        assert answer.cached_tokens == expected_hit(len(ids)), policy
        read = answer.read_bytes("ssd") + answer.read_bytes("remote")
        assert read == expected_hit(len(ids)) // PAGE * BLOCK_BYTES, policy


def test_blocks_are_read_from_remote_when_ssd_is_gone(cluster, plain, folder):
    # n-way first: it gives nothing to an agent that was measured to be much slower than others,
    # and agents that were just started have not been measured.
    prompts = stored_prompts(cluster, ("n-way", "prefill", "decode", "split"), seed=50)
    shutil.rmtree(folder / "cluster" / "ssd", ignore_errors=True)
    cluster.restart_agents()
    cluster.flush_engines()
    for policy, ids in prompts.items():
        cluster.set_policy(policy)
        answer = cluster.generate(ids)
        assert answer.output_ids == plain(ids)
        decode = f"agent-{answer.trace['decode']}"
        readers = {
            "prefill": {"agent-p0"},
            "decode": {decode},
            "split": {"agent-p0", decode},
            "n-way": set(AGENTS),
        }
        assert answer.reader_agents == readers[policy], answer.trace
        blocks = expected_hit(len(ids)) // PAGE
        assert answer.read_bytes("remote") == blocks * BLOCK_BYTES, answer.trace
        assert sum(share["blocks"] for share in answer.trace["readers"].values()) == blocks


# ---- 3 and 4: many at once ---------------------------------------------------------------


def test_32_conversations_over_few_prefixes_read_each_block_once(cluster, plain):
    prefixes = [prompt(5 * PAGE, seed=100 + i) for i in range(4)]
    for prefix in prefixes:
        cluster.generate(prefix + [400])
    cluster.wait_stored()
    cluster.restart_agents()
    cluster.flush_engines()
    cluster.set_policy("shorter-queue")
    turns = [prefixes[i % 4] + prompt(30, seed=200 + i) for i in range(32)]
    before = cluster.metric_sum("dualpath:agent_storage_read_bytes_total")
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(cluster.generate, turns))
        assert [a.output_ids for a in answers] == list(pool.map(plain, turns))
    cluster.wait_stored()
    read = cluster.metric_sum("dualpath:agent_storage_read_bytes_total") - before
    assert read <= 4 * 5 * BLOCK_BYTES
    assert sum(a.read_bytes("ssd") + a.read_bytes("remote") for a in answers) == read


def test_less_dram_than_two_requests_need_only_slows_them(cluster, plain):
    prompts = [prompt(LARGE_PROMPT, seed=300 + i) for i in range(4)]
    for ids in prompts:
        cluster.generate(ids)
        cluster.wait_stored()
    cluster.flush_engines()
    for policy in ("decode", "split", "n-way"):
        cluster.set_policy(policy)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(cluster.generate, prompts))
        assert [a.output_ids for a in answers] == [plain(ids) for ids in prompts]
        cluster.flush_engines()


# ---- 6 and 7: damaged storage, tenants ---------------------------------------------------


@pytest.mark.parametrize("damage", ["corrupt", "truncate", "delete"])
def test_damaged_blocks_are_recomputed_and_counted(cluster, plain, folder, damage):
    ids = prompt(1500, seed=6 + len(damage))
    cluster.generate(ids)
    cluster.wait_stored()
    for agent in AGENTS:
        cluster.signal(agent, signal.SIGSTOP)
    for base in (folder / "cluster" / "ssd", folder / "remote"):
        _damage_all(base, damage)
    for agent in AGENTS:
        cluster.signal(agent, signal.SIGCONT)
    cluster.restart_agents()
    cluster.flush_engines()
    answer = cluster.generate(ids)
    assert answer.output_ids == plain(ids)
    assert answer.cached_tokens < expected_hit(len(ids))
    if damage != "delete":
        cluster.wait_until(lambda: _damaged(cluster) > 0, 10, "damage counted")
    again = cluster.generate(ids)
    assert again.output_ids == plain(ids)


def _damaged(cluster) -> float:
    return cluster.metric_sum("corrupt") + cluster.metric_sum("missing")


def _damage_all(base, damage: str) -> None:
    for path in (p for p in base.rglob("*") if p.is_file() and p.stat().st_size > PAGE):
        if damage == "delete":
            path.unlink()
        elif damage == "truncate":
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size // 2)
        else:
            size, step = path.stat().st_size, BLOCK_BYTES // 4
            with path.open("r+b") as file:
                for offset in range(size // 2 % step, size, step):  # in every block
                    file.seek(offset)
                    file.write(b"\xa5" * 64)


def test_two_cache_salts_never_share(cluster, plain):
    ids = prompt(1000, seed=7)
    for fields in ({"cache_salt": "alice"}, {"cache_salt": "bob"}, {"extra_key": "alice"}, {}):
        answer = cluster.generate(ids, **fields)
        assert answer.cached_tokens == 0, fields
        assert answer.output_ids == plain(ids)
        cluster.wait_stored()
    cluster.flush_engines()
    again = cluster.generate(ids, cache_salt="alice")
    assert again.cached_tokens == expected_hit(len(ids))
    assert again.output_ids == plain(ids)


# ---- the front door ----------------------------------------------------------------------


def test_no_request_ends_an_engine(cluster, plain):
    from tests.request_strategies import REQUESTS

    ids = prompt(700, seed=9)
    engines = cluster.incarnations("engines")

    def ask(path: str, body: dict[str, Any]) -> int:
        try:
            post(f"{cluster.url}{path}", body, timeout_s=60)
            return 200
        except RequestFailed as refused:
            assert json.loads(refused.body)["error"].keys() == {"message", "type", "param", "code"}
            return refused.status

    for field, path, body in hostile.REFUSED:
        assert ask(path, body) == 400, (field, path, body)
    # It fits the pool, but not beside the room for an answer that a decode engine keeps.
    assert ask("/generate", {"input_ids": [5] * (POOL_TOKENS - 400)}) == 400

    # A grammar that allows no token: nothing is left to draw from.
    nothing = {"max_new_tokens": 4, "ebnf": "root ::= root", "top_k": 5}
    assert ask("/generate", {"input_ids": ids, "sampling_params": nothing}) == 422

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(asked=REQUESTS)
    def fuzz(asked: tuple[str, dict[str, Any]]) -> None:
        assert ask(*asked) in (200, 400, 422), asked

    fuzz()
    cluster.wait_unharmed(engines)
    assert cluster.generate(ids).output_ids == plain(ids)


def test_the_official_openai_client_works(cluster):
    import openai

    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", timeout=60)
    assert client.models.list().data
    messages = [{"role": "user", "content": "import os"}]
    chat: dict[str, Any] = {
        "model": "tiny",
        "messages": messages,
        "max_tokens": 8,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**chat)
    streamed = client.chat.completions.create(**chat, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
    assert text == whole.choices[0].message.content and whole.usage.completion_tokens == 8
    two = client.chat.completions.create(**chat, n=2)
    assert [choice.index for choice in two.choices] == [0, 1]
    with_logprobs = client.chat.completions.create(**chat, logprobs=True, top_logprobs=2)
    assert len(with_logprobs.choices[0].logprobs.content) == 8
    completion = client.completions.create(model="tiny", prompt="import os", max_tokens=4)
    assert completion.usage.completion_tokens == 4


def test_images_are_refused_with_a_sentence(cluster):
    content = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}]}
    with pytest.raises(RequestFailed) as failure:
        post(f"{cluster.url}/v1/chat/completions", body)
    assert failure.value.status == 400 and "image" in failure.value.body


# ---- other weights: last, since the cluster's engines keep them --------------------------


@pytest.fixture(scope="module")
def other_model(folder):
    """The tiny model with other weights in one layer."""
    from safetensors.torch import load_file, save_file

    other = folder / "other-model"
    shutil.copytree(resolve_model("tiny"), other)
    weights = load_file(other / "model.safetensors")
    name = "model.layers.3.mlp.down_proj.weight"
    weights[name] = weights[name] * -1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    return other


OTHER_PROMPT = prompt(1000, seed=8)


def test_a_weight_update_makes_older_blocks_unreachable(cluster, plain, other_model):
    other_tokens = plain.of_weights(other_model, OTHER_PROMPT)
    assert cluster.generate(OTHER_PROMPT).output_ids == plain(OTHER_PROMPT) != other_tokens
    cluster.wait_stored()
    for engine in ("p0", "d0", "d1"):
        url = f"{cluster.url}/admin/engine/{engine}/update_weights_from_disk"
        assert post(url, {"model_path": str(other_model)}).body["success"]
    cluster.wait_healthy(20)  # soon true, also while the gateway knows the earlier weights only
    answer = cluster.generate(OTHER_PROMPT)
    assert answer.output_ids == other_tokens
    assert answer.cached_tokens == 0
    cluster.wait_stored()
    cluster.flush_engines()
    again = cluster.generate(OTHER_PROMPT)
    assert again.output_ids == other_tokens
    assert again.cached_tokens == expected_hit(len(OTHER_PROMPT))

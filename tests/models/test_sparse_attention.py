"""DeepSeek's sparse attention: a block is latents and index keys, and without the latter a hit
gives other tokens. Prompts are longer than what a token attends to (64 tokens); the last layer has
no indexer. Tokens are those of transformers. Pools are poisoned."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from benchmarks.clients.reference import make_other_weights
from launch.models.resolve import resolve_model
from storage.block_format import HEADER_BYTES, decode_header, encode_header
from storage.remote.packs.format import scan
from tests.cluster import Cluster, post, prompt, running_cluster
from tests.models.sparse_reference import reference
from tests.prefill_checks import PAGE, check_a_second_turn, check_agents_that_die

LATENT_BYTES, INDEX_BYTES = PAGE * 192 * 4, PAGE * 132
BLOCK_BYTES = 6 * LATENT_BYTES + 5 * INDEX_BYTES
LENGTHS = (65, 300, 1500)

pytestmark = [pytest.mark.slow, pytest.mark.whole, pytest.mark.timeout(600)]


def expected_hit(length: int) -> int:
    return (length - 1) // PAGE * PAGE


@pytest.fixture(scope="module")
def model() -> Path:
    return resolve_model("tiny-dsa")


@pytest.mark.parametrize("length", LENGTHS[1:])
def test_other_index_keys_give_other_tokens(model, length):
    """The control: what follows would see it if they were left out of blocks."""
    ids = prompt(length, length)
    right, spoilt = (reference(model, ids, spoilt=spoilt) for spoilt in (False, True))
    assert right[0] == spoilt[0] and right != spoilt


def test_index_keys_are_restored_with_their_latents_by_every_path(tmp_path, model):
    """P has two of six layers' latents and all index keys; D has two ranks, each with all."""
    tokens = functools.partial(reference, model)
    prompts = [prompt(length, length) for length in LENGTHS]
    flags = ["--model", "tiny-dsa", "--poison-kv", "--load-policy", "always"]
    flags += ["--dram-bytes", str(100 * BLOCK_BYTES), "--max-total-tokens", "20480"]
    flags += ["--decode-args", "--tp 2", "--prefill-args", "--chunked-prefill-size 512"]
    with running_cluster(tmp_path, *flags, "--prefill-layer-window", "2") as cluster:
        for ids in prompts:
            assert cluster.generate(ids).output_ids == tokens(ids)
        cluster.wait_stored()
        stored = sum((len(ids) + 15) // PAGE for ids in prompts) * BLOCK_BYTES
        assert cluster.metric_sum("dualpath:agent_pulled_bytes_total") == stored
        for policy in ("prefill", "decode", "split"):
            check_hits(cluster, tokens, prompts, policy)
        cluster.restart_agents()  # of the SSD
        check_hits(cluster, tokens, prompts, "split")
        check_a_second_turn(cluster, tokens)
        turns = [prompts[-1] + prompt(20, 50 + i) for i in range(3)]
        check_agents_that_die(cluster, tokens, turns, after_s=0.3)


def test_blocks_of_two_ranks_at_p_are_read_by_several_agents_from_remote(tmp_path, model):
    """Blocks whose index keys were exchanged give other tokens. Other weights have other blocks."""
    tokens, remote = functools.partial(reference, model), tmp_path / "remote"
    prompts = [prompt(length, length) for length in LENGTHS[1:]]
    flags = ["--model", "tiny-dsa", "--poison-kv", "--load-policy", "always"]
    flags += ["--max-total-tokens", "20480", "--path-policy", "n-way", "--prefill-quota-ms", "60"]
    flags += ["--prefill-args", "--tp 2", "--ssd-bytes", "0", "--remote", remote.as_uri()]
    with running_cluster(tmp_path, *flags) as cluster:
        for ids in prompts:
            assert cluster.generate(ids).output_ids == tokens(ids)
        cluster.wait_stored()
        cluster.restart_agents()
        cluster.flush_engines()
        for ids in prompts:
            answer = cluster.generate(ids)
            hit = expected_hit(len(ids))
            assert (answer.output_ids, answer.cached_tokens) == (tokens(ids), hit)
            hit_bytes = hit // PAGE * BLOCK_BYTES
            assert answer.trace["delivered_bytes"] == {"p0": 2 * hit_bytes, "d0": hit_bytes}
        assert answer.reader_agents == {"agent-p0", "agent-d0"}  # of the longest
        assert cluster.metric_sum("engine_quota_batches_total") > 0
        exchange_index_keys(remote)
        cluster.restart_agents()
        cluster.flush_engines()
        for ids in prompts:
            answer = cluster.generate(ids)
            assert answer.cached_tokens == expected_hit(len(ids))
            assert answer.output_ids != tokens(ids)
        check_other_weights(cluster, make_other_weights(model, tmp_path / "other"), prompts[0])


def exchange_index_keys(remote: Path) -> None:
    """Of layers 0 and 1, in every stored block, which is whole all the same."""
    changed = 0
    for path in filter(Path.is_file, remote.rglob("*")):
        data = bytearray(path.read_bytes())
        for at in scan(data, 0).rows["offset"].tolist():
            header = decode_header(data[at : at + HEADER_BYTES])
            begin, layout = at + HEADER_BYTES, header.label.layout
            ends = [begin + layout.layer_start(layer + 1) for layer in (0, 1)]
            first, second = (slice(end - INDEX_BYTES, end) for end in ends)
            data[first], data[second] = data[second], data[first]
            payload = data[begin : begin + header.payload_bytes]
            data[at:begin] = encode_header(
                header.key, payload, header.label, header.sequence, header.written_ms
            )
            changed += 1
        path.write_bytes(data)
    assert changed


def check_other_weights(cluster: Cluster, other: Path, ids: list[int]) -> None:
    for engine in ("p0", "d0"):
        url = f"{cluster.url}/admin/engine/{engine}/update_weights_from_disk"
        assert post(url, {"model_path": str(other)}).body["success"]
    cluster.wait_healthy(20)
    for hit in (0, expected_hit(len(ids))):
        answer = cluster.generate(ids)
        assert (answer.output_ids, answer.cached_tokens) == (reference(other, ids), hit)
        cluster.wait_stored()
        cluster.flush_engines()


def check_hits(cluster: Cluster, tokens, prompts, policy: str) -> None:
    cluster.set_policy(policy)
    cluster.flush_engines()
    for ids in prompts:
        answer = cluster.generate(ids)
        assert answer.output_ids == tokens(ids), (policy, len(ids))
        assert answer.cached_tokens == expected_hit(len(ids)), (policy, len(ids))
        hit_bytes = expected_hit(len(ids)) // PAGE * BLOCK_BYTES
        assert answer.trace["delivered_bytes"]["d0"] == 2 * hit_bytes

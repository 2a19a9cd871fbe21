"""A cluster started anew on its old store, with something else that changes KV: nothing of what
lies there is used, and tokens are those of plain SGLang with the same model and flags."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from common.user_files import cache_folder
from engine.model_digest import model_digest
from launch.models.resolve import resolve_model
from tests.cluster import (
    GREEDY,
    Cluster,
    plain_sglang,
    post,
    prompt,
    running_cluster,
    shared_plain,
)

pytestmark = [pytest.mark.slow, pytest.mark.whole, pytest.mark.timeout(600)]

IDS = prompt(300, seed=5)
HIT = 256
SMALL_POOL = ["--max-total-tokens", "4096"]
"""It is poisoned sooner."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy whose weights can be changed."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(resolve_model("tiny"), folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """With the store of a cluster that has served the prompt."""
    folder = tmp_path_factory.mktemp("store")
    with cluster_on(folder, model) as cluster:
        cluster.generate(IDS)
        cluster.wait_stored()
        cluster.flush_engines()
        assert cluster.generate(IDS).cached_tokens == HIT
        assert variants(cluster) == {0}
        cluster.wait_stored()
    return folder


def cluster_on(folder: Path, model: Path, *engine_args: str):
    flags = ["--model", str(model), "--ssd-dir", str(folder / "ssd"), "--poison-kv"]
    flags += ["--load-policy", "always", "--dram-bytes", "64MiB", *SMALL_POOL]
    flags += [f"--engine-args={shlex.join(engine_args)}"] if engine_args else []
    return running_cluster(folder / "cluster", *flags)


def variants(cluster: Cluster) -> set[float]:
    return {v for name, v in cluster.metrics().items() if "engine_namespace_variant" in name}


def check_without_old_kv(cluster: Cluster, expected: list[int]) -> None:
    first = cluster.generate(IDS)
    assert (first.cached_tokens, first.output_ids) == (0, expected)
    cluster.wait_stored()
    cluster.flush_engines()
    second = cluster.generate(IDS)
    assert (second.cached_tokens, second.output_ids) == (HIT, expected)


OTHER_FLAGS = {
    "rope": [
        "--json-model-override-args",
        json.dumps({"rope_theta": 500.0}, separators=(",", ":")),
    ],
    "dtype": ["--dtype", "bfloat16"],
}


@pytest.mark.parametrize("flags", OTHER_FLAGS.values(), ids=OTHER_FLAGS)
def test_other_flags_meet_no_old_kv(folder: Path, model: Path, flags: list[str]) -> None:
    with plain_sglang(model, folder / "plain", *SMALL_POOL, *flags) as served:
        with cluster_on(folder, model, *flags) as cluster:
            body = {"input_ids": IDS, "sampling_params": GREEDY}
            check_without_old_kv(cluster, post(f"{served()}/generate", body).body["output_ids"])
            assert variants(cluster) == {0}


def test_weights_that_no_digest_tells_apart_meet_no_old_kv(folder: Path, model: Path) -> None:
    """In a file of the same size and time, for which the old digest is remembered."""
    file, before = model / "model.safetensors", model_digest(model)
    times, weights = file.stat(), load_file(file)
    weights["model.layers.3.self_attn.k_proj.weight"] *= 1.25
    save_file(weights, file, {"format": "pt"})
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    after = model_digest(model)
    assert after != before
    for remembered in (cache_folder() / "digests").iterdir():
        if remembered.read_text() == after:
            remembered.write_text(before)
    assert model_digest(model) == before
    expected = shared_plain().of_weights(model, IDS)
    with cluster_on(folder, model) as cluster:
        check_without_old_kv(cluster, expected)
        assert variants(cluster) == {1}

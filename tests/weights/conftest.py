"""One cluster for all tests of this folder, and plain SGLang beside it."""

from __future__ import annotations

import pytest

from benchmarks.clients.reference import make_other_weights
from launch.models.resolve import resolve_model
from tests.cluster import running_cluster, shared_plain

WITH_THE_CLUSTER = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(600)]
"""Marks of its tests."""


@pytest.fixture(scope="package")
def plain():
    return shared_plain()


@pytest.fixture(scope="package")
def models(tmp_path_factory):
    """Two others than the model's own weights."""
    folder = tmp_path_factory.mktemp("models")
    tiny = resolve_model("tiny")
    return tuple(make_other_weights(tiny, folder / str(layer), layer) for layer in (3, 2))


@pytest.fixture(scope="package")
def cluster(plain, tmp_path_factory):
    flags = ["--model", "tiny", "--poison-kv", "--load-policy", "always"]
    flags += ["--dram-bytes", "256MiB", "--max-total-tokens", "16384"]
    with running_cluster(tmp_path_factory.mktemp("weights"), *flags) as running:
        yield running

"""One cluster for all tests of this folder: one prefill and two decode engines, poisoned pools."""

from __future__ import annotations

import contextlib
import json

import pytest

from tests.cluster import running_cluster
from tests.common.collector import running_collector
from tests.test_walk import BLOCK_BYTES

WITH_THE_CLUSTER = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(600)]
"""Marks of its tests."""
OPTION = "hush-of-the-remote-store"
BETA_TOKENS = 1600
"""Two cold prompts of 1500 at a time at the prefill engine; the others wait in the gateway."""
DRAM_BYTES = 60 * BLOCK_BYTES
"""Less than the prompts of ``test_operations.py`` need, so that storage is read all the time."""
POOL_TOKENS = 32768


@pytest.fixture(scope="package")
def collector():
    with running_collector() as running:
        yield running


@pytest.fixture(scope="package")
def cluster(collector, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    flags = ["--model", "tiny", "--decode", "2", "--poison-kv", "--load-policy", "always"]
    flags += ["--beta-tokens", str(BETA_TOKENS), "--max-total-tokens", str(POOL_TOKENS)]
    flags += ["--dram-bytes", str(DRAM_BYTES), "--remote", (folder / "remote").as_uri()]
    flags += ["--otlp-traces-endpoint", collector.endpoint]
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:  # jobs would read it, too
            patch.setenv("DUALPATH_REMOTE_OPTIONS", json.dumps({"secret": OPTION}))
            running = stack.enter_context(running_cluster(folder / "cluster", *flags))
        yield running

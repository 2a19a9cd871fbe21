"""Which namespace an engine's KV goes under, from one weight update to the next."""

from __future__ import annotations

import pytest

from engine import weights as weights_module
from engine.sglang import pool_hooks
from engine.weights import Weights
from tests.engine.parts import NAMESPACE, Parts


@pytest.fixture
def weights(monkeypatch) -> Weights:
    monkeypatch.setattr(weights_module, "model_digest", lambda folder: f"digest of {folder}")
    return Weights(NAMESPACE, "e0-3")


def test_a_named_version_makes_a_namespace_that_others_reach_too(weights):
    before = weights.digest
    weights.changed("2", None)
    assert (weights.namespace.model_digest, weights.namespace.weight_version) == ("model", "2")
    assert weights.digest == weights.namespace.digest() != before
    other = Weights(NAMESPACE, "e1-4")
    other.changed("2", None)
    assert other.digest == weights.digest


def test_weights_from_a_folder_are_named_by_their_digest(weights):
    weights.changed(None, "/models/x")
    assert weights.namespace.model_digest == "digest of /models/x"
    assert weights.namespace.weight_version == ""


def test_weights_that_nobody_has_named_are_shared_with_no_other_engine(weights):
    other = Weights(NAMESPACE, "e1-4")
    seen = set()
    for engine in (weights, other, weights, other):
        engine.changed(None, None)
        seen.add(engine.digest)
    assert len(seen) == 4
    rank = Weights(NAMESPACE, "e0-3")
    rank.changed(None, None)
    rank.changed(None, None)
    assert rank.digest == weights.digest  # the ranks of one engine agree


def test_whoever_asked_is_told_once_the_new_namespace_is_there(weights):
    told = []
    weights.on_change = lambda: told.append(weights.digest)
    weights.changed("2", None)
    assert told == [weights.digest]


def test_sglang_s_updates_reach_them(monkeypatch):
    engine = Parts("decode")
    monkeypatch.setattr(weights_module, "model_digest", lambda folder: f"digest of {folder}")
    monkeypatch.setattr(pool_hooks, "runtime", lambda: engine)

    class Update:
        weight_version, model_path = "7", "/models/y"

    class Result:
        success = False

    pool_hooks.after_update_from_disk(Result, None, Update)
    assert engine.weights.namespace == NAMESPACE  # a failed one leaves them as they were
    Result.success = True
    pool_hooks.after_update_from_disk(Result, None, Update)
    assert engine.weights.namespace.model_digest == "digest of /models/y"
    assert engine.weights.namespace.weight_version == "7"
    pool_hooks.after_weight_version(None, None, "8")
    assert engine.weights.namespace.weight_version == "8"

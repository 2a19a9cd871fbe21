"""Which namespace an engine's KV goes under, from one weight update to the next."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from common.messages.from_gateway import CommitWeights
from engine.model_digest import FolderReading
from engine.sglang import pool_hooks
from engine.sglang.weights import update_hooks
from engine.weights import FolderDigested, Weights
from tests.engine.parts import NAMESPACE, Parts


@pytest.fixture
def weights() -> Weights:
    return Weights(NAMESPACE, "e0-3")


def commit(engine: Weights, name: str, is_doubtful: bool = False) -> None:
    engine.heard(CommitWeights(engine.state.number, name, is_doubtful))


def test_a_trainer_s_version_is_a_label_and_names_nothing(weights):
    """Two jobs call their weights "1": neither meets the other's KV."""
    other = Weights(NAMESPACE, "e1-4")
    seen = {weights.digest}
    for engine in (weights, other, weights, other):
        engine.changed("1", is_clean=True)
        seen.add(engine.digest)
        assert engine.state.version == "1" and not engine.state.is_named
    assert len(seen) == 5


def test_ranks_of_one_engine_agree_on_a_name_that_nobody_has_given(weights):
    rank = Weights(NAMESPACE, "e0-3")
    for engine in (weights, rank):
        engine.changed(None, is_clean=True)
        engine.session(True, is_clean=True)
    assert rank.digest == weights.digest


def test_engines_are_reached_by_each_other_under_the_name_that_the_gateway_gives(weights):
    other = Weights(NAMESPACE, "e1-4")
    for engine in (weights, other):
        engine.changed("1", is_clean=True)
        commit(engine, "job/1")
    assert weights.digest == other.digest
    assert weights.namespace.weight_version == "job/1" and weights.state.is_named


def test_a_name_for_weights_that_have_changed_since_is_not_taken(weights):
    weights.changed("1", is_clean=True)
    late = CommitWeights(weights.state.number, "job/1", False)
    weights.changed("2", is_clean=True)
    weights.heard(late)
    assert not weights.state.is_named
    weights.session(True, is_clean=True)
    commit(weights, "job/2")  # they may still be written
    assert not weights.state.is_named
    weights.session(False, is_clean=True)
    commit(weights, "job/2")
    assert weights.state.is_named


def test_weights_of_a_folder_are_named_by_its_digest_and_reach_their_kv_again(weights):
    first = weights.digest
    digests = []
    for folder in ("other", "model", "other"):
        weights.changed("v", is_clean=True)
        weights.digesting()
        assert not weights.state.is_named and weights.state.is_digesting
        weights.heard(FolderDigested(weights.state.changes, folder))
        assert weights.state.is_named and not weights.state.is_digesting
        digests.append(weights.digest)
    assert digests[0] == digests[2] != digests[1] == first


def test_a_digest_of_weights_that_have_changed_since_is_not_taken(weights):
    weights.changed(None, is_clean=True)
    change = weights.state.changes
    weights.changed(None, is_clean=True)
    weights.heard(FolderDigested(change, "folder"))
    assert not weights.state.is_named


def test_what_comes_of_older_kv_goes_under_a_name_that_ends_with_the_flush(weights):
    weights.changed("1", is_clean=False)
    weights.heard(FolderDigested(weights.state.changes, "folder"))
    assert not weights.state.is_named  # the folder's name is for KV of its weights alone
    commit(weights, "job/1")
    doubtful = weights.digest
    assert weights.state.is_named and weights.state.is_doubtful
    weights.flushed()
    assert weights.digest != doubtful
    assert weights.namespace.model_digest == "folder" and not weights.state.is_doubtful


def test_an_engine_that_is_clean_is_doubtful_with_the_others_that_are_not(weights):
    weights.changed("1", is_clean=True)
    commit(weights, "job/1", is_doubtful=True)
    assert weights.state.is_doubtful
    weights.flushed()
    assert not weights.state.is_named and weights.state.last_name == "job/1"
    weights.flushed()  # of nothing: the name stays
    commit(weights, "job/1b")
    named = weights.digest
    weights.flushed()
    assert weights.digest == named


def test_whoever_asked_is_told_once_the_new_namespace_is_there(weights):
    told = []
    weights.on_change = lambda: told.append(weights.digest)
    weights.changed("2", is_clean=True)
    assert told == [weights.digest]


# ---- SGLang's calls -----------------------------------------------------------------------


class Ranks:
    """One rank, whose events wait to be applied."""

    is_leader = True

    def __init__(self) -> None:
        self.events: list[Any] = []

    def post(self, event: Any) -> None:
        self.events.append(event)


class Tree:
    """SGLang's, with some KV or none."""

    tokens = 0

    def evictable_size(self) -> int:
        return self.tokens

    def protected_size(self) -> int:
        return 0


@pytest.fixture
def engine(monkeypatch) -> Any:
    engine: Any = Parts("decode")
    engine.ranks = Ranks()
    monkeypatch.setattr(update_hooks, "runtime", lambda: engine)
    monkeypatch.setattr(pool_hooks, "runtime_if_up", lambda: engine)
    engine.tree = Tree()
    scheduler = SimpleNamespace(
        tree_cache=engine.tree, _engine_paused=True, is_fully_idle=lambda ignore_waiting: True
    )
    engine.updater = SimpleNamespace(scheduler=scheduler, _session=None)
    return engine


def load(engine: Any, folder: Any, success: bool = True, message: str = "") -> None:
    """SGLang's ``update_weights_from_disk``."""

    def original(updater: Any, request: Any) -> Any:
        if success:
            update_hooks.after_weight_version(None, updater, request.weight_version)
        return SimpleNamespace(success=success, message=message)

    request = SimpleNamespace(model_path=str(folder), weight_version="7")
    update_hooks.around_update_from_disk(original, engine.updater, request)


def digested(engine: Any) -> FolderDigested:
    """The event that the reading thread posts."""
    deadline = 500
    while not engine.ranks.events and deadline:
        deadline -= 1
        time.sleep(0.01)
    return engine.ranks.events.pop()


def test_the_digest_of_a_folder_is_taken_beside_its_load(engine, model):
    load(engine, model)
    assert engine.weights.state.is_digesting and not engine.weights.state.is_named
    engine.weights.heard(digested(engine))
    assert engine.weights.state.is_named and engine.weights.state.version == "7"


def test_a_folder_that_changed_while_it_was_loaded_names_nothing(model):
    said: list[str] = []
    reading = FolderReading(model)
    (model / "model.safetensors").write_bytes(b"v" * 1000)
    reading.loaded(said.append)
    for _ in range(500):
        if said:
            break
        time.sleep(0.01)
    assert said == [""]


def test_a_folder_that_is_none_leaves_the_weights_as_they_were(engine, tmp_path):
    load(engine, tmp_path, False, "Failed to get weights iterator: nothing there")
    assert engine.weights.namespace == NAMESPACE and engine.weights.state.changes == 0


def test_an_update_that_fails_in_its_midst_leaves_weights_that_nobody_names(engine, model):
    load(engine, model, False, "Failed to update weights: ...\nRolling back")
    state = engine.weights.state
    assert state.is_broken and not state.is_named
    load(engine, model)
    engine.weights.heard(digested(engine))
    assert engine.weights.state.is_named and not engine.weights.state.is_broken


def test_in_a_session_weights_have_no_name_whatever_is_said_of_them(engine):
    done = SimpleNamespace(success=True)
    update_hooks.after_begin(done, engine.updater, None)
    assert engine.weights.state.in_session and not engine.weights.state.is_named
    update_hooks.after_end(done, engine.updater, None)
    assert not engine.weights.state.in_session and not engine.weights.state.is_named
    before = engine.weights.digest
    update_hooks.after_begin(SimpleNamespace(success=False), engine.updater, None)
    assert engine.weights.digest == before  # it was refused


def test_a_tree_that_is_not_empty_makes_a_name_end_with_the_flush(engine):
    engine.tree.tokens = 64
    update_hooks.after_version_call(
        None, engine.updater.scheduler, SimpleNamespace(new_version="2")
    )
    assert engine.weights.state.is_doubtful and engine.weights.state.version == "2"
    pool_hooks.after_flush(False, engine.updater.scheduler)
    assert engine.weights.state.is_doubtful  # requests run: it was not flushed
    pool_hooks.after_flush(True, engine.updater.scheduler)
    assert not engine.weights.state.is_doubtful

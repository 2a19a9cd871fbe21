"""Which variant of a namespace an engine's KV goes in, by what agents keep of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import pytest

from common.messages.codec import Message
from common.messages.from_agents import KeptWitness
from common.messages.from_engines import KeepWitness
from engine import witness as witness_module
from engine.witness import (
    PROMPT_TOKENS,
    VARIANTS_MAX,
    Values,
    WitnessCheck,
    distance,
    merged,
    prompt,
    samples_of,
    tolerance,
)
from storage.witnesses import FolderKeeper, Keeper, Witnesses
from tests.engine.parts import NAMESPACE

APART = 1_700_000_000_000
RNG = np.random.default_rng(3)
KV = RNG.normal(size=(3, 2, 128)).astype(np.float32)
OTHER_KV = RNG.normal(size=(3, 2, 128)).astype(np.float32)


class Agents:
    """Real witnesses of some agents; what an engine asks reaches them, and they answer."""

    def __init__(self, **keepers: list[Keeper]) -> None:
        self.agents = {name: Witnesses(places) for name, places in keepers.items()}
        self.silent: set[str] = set()

    def engine(self, values: Values, heard: tuple[str, ...] | None = None) -> Engine:
        return Engine(self, values, tuple(self.agents) if heard is None else heard)


class Engine:
    def __init__(self, agents: Agents, values: Values, heard: tuple[str, ...]) -> None:
        self.agents = agents
        self.taken: list[int] = []
        self.check = WitnessCheck(NAMESPACE, values, APART, self._ask, self.taken.append)
        for agent in heard:
            self.check.greeted(agent)

    def _ask(self, agent: str, message: Message) -> None:
        assert isinstance(message, KeepWitness)
        if agent in self.agents.silent:
            return

        def answer(kept: list[bytes]) -> None:
            self.check.answered(agent, KeptWitness(message.namespace_digest, kept))

        values = message.values if message.may_keep else b""
        self.agents.agents[agent].compare(message.namespace_digest, values, answer)

    def settled(self) -> int:
        self.check.settle(self.agents.agents)
        return self.check.variant


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.001)


def nearly(values: Values) -> Values:
    return values * np.float32(1 + 1e-5)


# ---- values ---------------------------------------------------------------------------------


def test_the_prompt_is_the_same_everywhere_and_within_the_vocabulary():
    assert len(prompt(2048)) == PROMPT_TOKENS and prompt(2048) == prompt(2048)
    assert max(prompt(100)) < 100 and len(set(prompt(32000))) == PROMPT_TOKENS


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_ranks_sample_the_same_numbers_together_as_one_alone(shards):
    rows = RNG.normal(size=(PROMPT_TOKENS, 256)).astype(np.float32)
    whole = samples_of(rows, 0, 1)
    parts = np.split(rows, shards, axis=1)
    of_ranks = [samples_of(part, shard, shards) for shard, part in enumerate(parts)]
    assert np.array_equal(merged(of_ranks), whole) and not np.isnan(whole).any()
    assert len(set(whole.tolist())) == len(whole)


def test_distance_is_that_of_the_worst_layer():
    assert distance(KV, KV) == 0 and distance(KV, nearly(KV)) == pytest.approx(1e-5, rel=0.1)
    moved = KV.copy()
    moved[1, 0] *= 1.5
    assert distance(KV, moved) == pytest.approx(0.333, rel=0.01)
    assert distance(KV, KV[:2]) == np.inf
    broken = KV.copy()
    broken[2, 1, 5] = np.inf
    assert distance(KV, broken) == np.inf
    assert not np.isnan(samples_of(np.full((PROMPT_TOKENS, 64), np.nan, np.float32), 0, 1)).any()


def test_layers_that_were_overwritten_do_not_count():
    window = OTHER_KV.copy()
    window[:2] = np.nan
    window[2] = KV[2]
    assert distance(KV, window) == 0


@pytest.mark.parametrize(
    ("settings", "kv_dtype", "expected"),
    [
        ('{"dtype": "float32"}', "float32", 1e-3),
        ('{"dtype": "float32"}', "bfloat16", 6e-2),
        ('{"dtype": "bfloat16"}', "float8_e4m3fn", 0.25),
    ],
)
def test_the_tolerance_is_that_of_the_coarser_type(settings, kv_dtype, expected):
    space = msgspec.structs.replace(NAMESPACE, settings=settings, kv_dtype=kv_dtype)
    assert tolerance(space) == expected


# ---- variants -------------------------------------------------------------------------------


def test_engines_that_agree_stay_in_the_namespace():
    agents = Agents(a=[], b=[])
    assert agents.engine(KV).settled() == 0
    second = agents.engine(nearly(KV))
    assert second.settled() == 0 and second.taken == [] and second.check.differing_total == 0


def test_engines_of_other_kv_meet_in_the_next_variant(tmp_path):
    agents = Agents(a=[FolderKeeper(tmp_path)], b=[])
    assert agents.engine(KV).settled() == 0
    for values in (OTHER_KV, nearly(OTHER_KV)):
        other = agents.engine(values)
        assert other.settled() == 1 and other.taken == [APART, 1]
    assert agents.engine(-OTHER_KV).settled() == 2
    another_day = Agents(a=[FolderKeeper(tmp_path)])
    assert another_day.engine(KV).settled() == 0
    assert another_day.engine(OTHER_KV).settled() == 1


def started_at_once(agents: Agents, values: list[Values]) -> list[Engine]:
    with ThreadPoolExecutor(len(values)) as pool:
        engines = list(pool.map(agents.engine, values))
    for engine in engines:
        engine.settled()
    return engines


def test_engines_that_start_at_once_never_share_a_variant_if_they_differ():
    for _ in range(6):
        agents = Agents(a=[], b=[])
        engines = started_at_once(agents, [KV, OTHER_KV, nearly(KV), nearly(OTHER_KV)])
        variants = [engine.check.variant for engine in engines]
        assert not {variants[0], variants[2]} & {variants[1], variants[3]}


def test_an_agent_that_comes_later_with_another_store_is_compared_with_too(tmp_path):
    Agents(b=[FolderKeeper(tmp_path)]).engine(OTHER_KV).settled()
    agents = Agents(a=[])
    engine = agents.engine(KV)
    assert engine.settled() == 0
    agents.agents["b"] = Witnesses([FolderKeeper(tmp_path)])
    engine.check.greeted("b")
    until(lambda: engine.check.variant == 1)
    assert engine.taken == [APART, 1] and engine.check.differing_total == 1


def test_an_agent_that_does_not_answer_is_not_waited_for_long(monkeypatch):
    monkeypatch.setattr(witness_module, "ANSWERS_S", 0.05)
    monkeypatch.setattr(witness_module, "GREETING_S", 0.05)
    agents = Agents(a=[], b=[])
    agents.silent.add("b")
    assert agents.engine(KV).settled() == 0
    assert agents.engine(OTHER_KV).settled() == 1
    assert agents.engine(KV, heard=()).settled() == 0


def test_an_engine_with_a_window_compares_and_leaves_the_keeping_to_others():
    agents = Agents(a=[])
    window = KV.copy()
    window[:1] = np.nan
    assert agents.engine(window).settled() == 0
    assert agents.engine(OTHER_KV).settled() == 0, "nothing was kept"
    assert agents.engine(window).settled() == 1


def test_an_engine_for_which_no_variant_is_left_stays_apart():
    agents = Agents(a=[])
    for number in range(VARIANTS_MAX + 1):
        values = RNG.normal(size=KV.shape).astype(np.float32)
        assert agents.engine(values).settled() == number
    assert agents.engine(KV).settled() == APART

"""What is done when hosts are lost, commands end, and more or less is wanted; Ray is a stub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from common.json import JsonObject
from launch.cluster.config import load_config
from launch.ray.commands import Commands, HostCommand
from launch.ray.fleet import BACKOFF_MAX_S, END_MARGIN_S, Fleet, State
from launch.ray.looks import Look, Where
from launch.ray.profile import Pool, Profile, plain_profile

OLD = Look(lost="its worker died")


class StubGroup:
    """Room on hosts that a test gives it, and what was done there."""

    def __init__(self, places: StubPlaces, name: str, hosts: int, apart_from: Sequence[str]):
        self.places, self.name, self.hosts, self.apart_from = places, name, hosts, apart_from
        self.commands: list[HostCommand] = []
        self.ended: list[bool] = []

    def where(self) -> list[Where] | None:
        free = [host for host in self.places.free if host not in self.apart_from]
        return [Where(host, host) for host in free[: self.hosts]] if free else None

    def start(
        self, commands: Sequence[HostCommand], gpus: int, secret: str, environment: dict[str, str]
    ) -> None:
        self.commands = list(commands)

    def adopt(self) -> list[HostCommand]:
        return self.commands

    def end(self, at_once: bool = False) -> None:
        self.ended.append(at_once)

    def remove(self) -> None:
        del self.places.groups[self.name]


class StubPlaces:
    """Ray's hosts."""

    own_address = "10.0.0.1"

    def __init__(self) -> None:
        self.groups: dict[str, StubGroup] = {}
        self.free = ["10.0.0.1", "10.0.0.2"]
        self.pins: dict[str, str] = {}

    def create(
        self, name: str, pool: Pool, address: str = "", apart_from: Sequence[str] = ()
    ) -> StubGroup:
        assert name not in self.groups
        self.groups[name] = StubGroup(self, name, pool.nnodes, apart_from)
        self.pins[name] = address
        return self.groups[name]

    def found(self) -> list[StubGroup]:
        return list(self.groups.values())


class Case:
    """A fleet on a clock of the test's."""

    def __init__(self, profile: Profile, places: StubPlaces | None = None) -> None:
        self.places = places or StubPlaces()
        self.now_s = 1000.0
        self.said: list[str] = []
        self.profile = profile
        commands = Commands(load_config(["--ray"]))
        self.fleet = Fleet(self.places, commands, "secret", self._say, lambda: self.now_s)

    def _say(self, whose: str, line: str) -> None:
        self.said.append(f"{whose}: {line}")

    def step(self, looks: Mapping[str, Mapping[int, Look]] | None = None, times: int = 1) -> None:
        for _ in range(times):
            self.fleet.step(self.profile, looks or {})
            looks = None

    def started(self) -> Case:
        self.step(times=5)
        assert self.fleet.unmet(self.profile) == []
        return self

    @property
    def states(self) -> dict[str, State]:
        return self.fleet.states


@pytest.fixture
def case() -> Case:
    return Case(plain_profile(1, 1)).started()


def wide(hosts: int = 2) -> Profile:
    pools = {
        "gateway": Pool(role="gateway"),
        "prefill": Pool(role="prefill"),
        "decode": Pool(role="decode", nnodes=hosts),
    }
    settings: dict[str, JsonObject] = {pool: {} for pool in pools}
    settings["decode"]["decode_args"] = ("--tp-size", str(hosts))
    return Profile(pools, settings)


def test_the_gateway_is_placed_first_and_nodes_are_told_where(case):
    assert list(case.places.groups) == ["g0", "p0", "d0"]
    assert case.places.pins == {"g0": "10.0.0.1", "p0": "", "d0": ""}
    [command] = case.places.groups["d0"].commands
    assert "--join=http://10.0.0.1:30000" in command.flags


def test_a_standby_is_on_another_host_and_everyone_is_told_of_both():
    profile = plain_profile(1, 1).with_count("gateway", 2)
    case = Case(profile)
    case.places.free = ["10.0.0.1"]
    case.step(times=5)
    assert list(case.places.groups) == ["g0", "g1"] and not case.places.groups["g0"].commands
    case.places.free.append("10.0.0.2")
    case.started()
    urls = "http://10.0.0.1:30000,http://10.0.0.2:30000"
    assert f"--join={urls}" in case.places.groups["d0"].commands[0].flags
    for name in ("g0", "g1"):
        assert f"--standby-of={urls}" in case.places.groups[name].commands[0].flags
    # Either is known by its address, also to the next driver, and comes back there.
    case.step({"g1": {0: OLD}}, times=2)
    second = Case(plain_profile(1, 1), case.places)
    second.profile = second.fleet.adopt(second.profile)
    second.step(times=3)
    assert second.fleet.unmet(second.profile) == []
    assert case.places.pins["g1"] == "10.0.0.2"


def test_nodes_of_one_host_get_other_ports():
    case = Case(plain_profile(2, 1)).started()
    firsts = [case.places.groups[name].commands[0].first_port for name in ("p0", "p1", "d0")]
    assert len(set(firsts)) == 3


def test_an_engine_that_lost_a_host_is_ended_whole_and_begun_anew():
    case = Case(wide()).started()
    group = case.places.groups["d0"]
    assert [command.rank for command in group.commands] == [0, 1]
    case.step({"d0": {1: OLD}})
    assert group.ended == [False] and case.states["d0"] is State.ENDING
    assert any("its worker died" in line for line in case.said)
    case.step(times=3)
    assert case.places.groups["d0"] is group, "its other host has not ended yet"
    case.step({"d0": {0: Look(exit_code=0)}})
    assert "d0" not in case.states
    case.now_s += BACKOFF_MAX_S
    case.step(times=2)
    assert case.places.groups["d0"] is not group and case.states["d0"] is State.RUNNING


def test_one_that_does_not_end_is_killed_after_a_while():
    case = Case(wide()).started()
    case.step({"d0": {1: OLD}})
    group = case.places.groups["d0"]
    case.now_s += END_MARGIN_S + 1
    case.step()
    assert (
        case.places.groups["d0"] is not group and "d0: has not ended in time: killed" in case.said
    )


def test_pauses_grow_while_a_node_fails_and_are_forgotten_when_it_runs(case):
    pauses = []
    for _ in range(6):
        case.step({"d0": {0: Look(exit_code=1)}})
        case.step()
        began = case.now_s
        while "d0" not in case.states:
            case.now_s += 0.5
            case.step()
        pauses.append(case.now_s - began)
        case.step()
    assert pauses == sorted(pauses) and pauses[0] <= 1 and BACKOFF_MAX_S <= pauses[-1] < 20
    case.now_s += 100
    case.step({"d0": {0: Look(exit_code=1)}}, times=2)
    case.now_s += 1
    case.step()
    assert "d0" in case.states


def test_what_cannot_work_is_not_tried_again_before_something_else_is_ordered(case):
    case.step({"d0": {0: Look(said="error: no\n", exit_code=2)}})
    case.now_s += 1000
    case.step(times=3)
    assert "d0" not in case.states and "d0: error: no" in case.said
    case.fleet.changed()
    case.step(times=2)
    assert case.states["d0"] is State.RUNNING


def test_nodes_are_added_and_drained(case):
    case.profile = case.profile.scaled({"decode": "+1"})
    case.step(times=2)
    assert case.states["d1"] is State.RUNNING
    case.profile = case.profile.scaled({"decode": "-1"})
    case.step()
    assert case.places.groups["d1"].ended == [False] and not case.places.groups["d0"].ended
    assert case.fleet.unmet(case.profile) == ["d1 ends"]
    case.now_s += END_MARGIN_S + 60
    case.step()
    assert "d1" in case.states, "it drains for as long as it may"
    case.step({"d1": {0: Look(exit_code=0)}})
    assert case.fleet.unmet(case.profile) == []


def test_one_without_room_waits_and_says_so():
    case = Case(plain_profile(1, 1)).started()
    case.places.free = []
    case.profile = case.profile.scaled({"decode": "+1"})
    case.step(times=2)
    case.now_s += 60
    case.step(times=3)
    assert case.states["d1"] is State.WAITING
    assert sum("waits for hosts" in line for line in case.said) == 1
    case.profile = case.profile.scaled({"decode": "-1"})
    case.step(times=2)
    assert "d1" not in case.places.groups


def test_the_gateway_comes_back_where_nodes_know_it(case):
    case.places.pins.clear()
    case.step({"g0": {0: OLD}}, times=2)
    case.now_s += BACKOFF_MAX_S
    case.step(times=2)
    assert case.places.pins == {"g0": "10.0.0.1"}
    assert case.states["g0"] is State.RUNNING


def test_the_next_driver_goes_on_with_what_there_is():
    first = Case(plain_profile(1, 3)).started()
    first.places.groups["d1"].commands = []  # it was lost meanwhile
    second = Case(plain_profile(1, 1), first.places)
    second.profile = second.fleet.adopt(second.profile)
    assert second.profile.pools["decode"].count == 3
    second.step(times=2)
    second.now_s += BACKOFF_MAX_S
    second.step(times=3)
    assert second.fleet.unmet(second.profile) == []
    firsts = [group.commands[0].first_port for group in second.places.groups.values()]
    assert len(set(firsts)) == 5


def test_the_end_drains_nodes_before_the_gateway(case):
    assert not case.fleet.end_step({})
    ended = {name: group.ended for name, group in case.places.groups.items()}
    assert ended == {"g0": [], "p0": [False], "d0": [False]}
    gone = {0: Look(exit_code=0)}
    assert not case.fleet.end_step({"p0": gone, "d0": gone})
    assert not case.fleet.end_step({})
    assert case.fleet.end_step({"g0": {0: Look(exit_code=-15)}})
    assert case.places.groups == {}


def test_a_host_on_which_ray_was_not_started_well_is_named_once(case):
    for _ in range(2):
        case.step({"d0": {0: Look(unfit="ends all 60 s after Ray's head")}})
    assert sum("ends all 60 s after" in line for line in case.said) == 1


def test_lines_are_whole(case):
    case.step({"p0": {0: Look(said="one\ntw")}})
    case.step({"p0": {0: Look(said="o\n")}})
    assert case.said[-2:] == ["p0: one", "p0: two"]

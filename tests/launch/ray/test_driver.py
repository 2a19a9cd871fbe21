"""What the driver says while Ray's head is away; Ray is a stub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from launch.cluster.config import load_config
from launch.ray.looks import Look
from launch.ray.profile import plain_profile
from tests.launch.ray.test_fleet import StubPlaces

driver = pytest.importorskip("launch.ray.driver", reason="needs the extra `ray`")
places = pytest.importorskip("launch.ray.places", reason="needs the extra `ray`")
ROUNDS = 6


class AwayPlaces(StubPlaces):
    """Of which the head does not answer in some rounds, and ``on_end`` is called after all."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.rounds = 0

    def look(self, names: Sequence[str], wait_s: float) -> Mapping[str, Mapping[int, Look]]:
        self.rounds += 1
        if self.rounds == ROUNDS:
            self.on_end()
        if self.rounds in (3, 4):
            raise driver.RayError("the head is away")
        return {name: {0: Look(exit_code=0)} for name in names} if self.rounds >= ROUNDS else {}

    def on_end(self) -> None:
        raise AssertionError


class StubOrders:
    """None, ever."""

    def take(self, name: str) -> dict[int, bytes]:
        return {}

    def remove(self) -> None: ...


def test_while_the_head_is_away_it_says_once_how_to_bring_one_back(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(driver, "Places", AwayPlaces)
    monkeypatch.setattr(driver, "OrdersTaken", StubOrders)
    monkeypatch.setattr(driver, "LOOK_S", 0.0)
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * 32)
    secret.chmod(0o600)
    config = load_config(["--ray", f"--cluster-secret-file={secret}"])
    running = driver._Driver(config, plain_profile(1, 1), None)
    monkeypatch.setattr(AwayPlaces, "on_end", lambda _: running.on_signal(15, None))
    assert running.run() == 0
    said = capsys.readouterr().out
    assert said.count("the head is away") == 1 and said.count("give it another port") == 1
    assert "as wanted: g0, p0, d0" in said


def test_an_order_of_which_the_driver_has_not_heard_is_given_again():
    board = places._Board()
    first = board.order("a", b"+1")
    assert board.take("one") == {first: b"+1"} == board.take("one")
    second = board.order("b", b"-1")
    board.took(first)
    assert board.take("one") == {second: b"-1"} and board.take("another") is None


def test_an_order_whose_number_was_not_heard_is_one_order():
    board = places._Board()
    first = board.order("a", b"+1")
    board.took(first)
    assert board.order("a", b"+1") == first and not board.take("one")
    others = [board.order(f"{n}", b"+1") for n in range(places._Board.ORDERS_MAX)]
    assert len(set(others)) == len(others) and board.order("one too many", b"+1") == 0

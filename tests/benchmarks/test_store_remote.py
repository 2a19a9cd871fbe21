"""The remote part of the storage benchmark, at a size that takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import tools
from benchmarks.store import remote as store_remote
from benchmarks.store.remote import measure_remote, remote_goals


@pytest.mark.slow
@pytest.mark.skipif(bool(tools.missing(*tools.S3_SERVER)), reason="needs a real S3 server")
def test_clients_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_remote, "BLOCKS", 72)
    monkeypatch.setattr(store_remote, "READ_BLOCKS", 16)
    monkeypatch.setattr(store_remote, "SMALL_BLOCKS", 64)
    monkeypatch.setattr(store_remote, "HEDGED_READS", 60)
    monkeypatch.setattr(store_remote, "SLOW_EVERY", 10)
    monkeypatch.setattr(store_remote, "_in_a_process_of_its_own", lambda folder, rounds: {})
    figures = measure_remote(tmp_path / "remote", 1)
    clients = figures["clients"]
    assert set(clients) == {"remote tier", "obstore", "http.client", "s3fs"}
    assert all(rate > 0 for client in clients.values() for rate in client.values())
    slow = figures["reads with slow answers"]
    assert slow["hedged"]["asked_twice"] and not slow["plain"]["asked_twice"]
    assert slow["hedged"]["p99_ms"] < slow["plain"]["p99_ms"]
    values = {goal.name: goal.value for goal in remote_goals(figures)}
    assert values["remote read / iperf3 on a limited link"] is None
    assert values["remote read / best raw client"]


def test_goals_are_there_without_a_measurement() -> None:
    goals = remote_goals({"not measured": "no server"})
    assert len(goals) == 3 and all(g.value is None and not g.holds for g in goals)


def test_the_best_raw_client_is_the_limit() -> None:
    rates = {"obstore": 1.0, "http.client": 2.0, "s3fs": 0.5, "remote tier": 1.8}
    clients = {name: {"bytes_per_s": r, "cpu_s_per_gb": r} for name, r in rates.items()}
    link = {"iperf3": 100.0, "remote tier": 96.0}
    goals = {g.name: g for g in remote_goals({"clients": clients, "link": link})}
    assert goals["remote read / best raw client"].value == pytest.approx(0.9)
    assert goals["remote read / iperf3 on a limited link"].value == pytest.approx(0.96)
    assert not goals["remote read's CPU seconds a GB / s3fs's"].holds

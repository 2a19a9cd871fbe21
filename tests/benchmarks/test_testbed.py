"""The testbed's arithmetic, its namespaces, and what it does about dead runs."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.goals import Goal, goals_table
from benchmarks.testbed import iperf, machine, report
from benchmarks.testbed.cluster import Gateway, cluster_config, records_on
from benchmarks.testbed.network import (
    Network,
    Rates,
    list_namespaces,
    parse_counters,
    remove_leftovers,
)
from benchmarks.testbed.nic_use import NicUse
from benchmarks.testbed.offline import Plan, rotated
from benchmarks.testbed.results import ARMS, Run, Shape, ShapeResult
from benchmarks.testbed.workload import BLOCK_BYTES, AgentShape, Job, Trajectories, Turn, run_job

RATE = 12e6
BLOCKS = 51


def job(seconds: float) -> Job:
    turn = Turn(
        agent=0,
        turn=0,
        sent_s=100.0,
        done_s=100.0 + seconds,
        prompt_tokens=BLOCKS * 64 + 10,
        hit_bytes=BLOCKS * BLOCK_BYTES,
        read_bytes=BLOCKS * BLOCK_BYTES,
        output=[1],
        trace={"prefill": "p0", "decode": "d0", "readers": {}, "timings_s": {"read": 1.0}},
    )
    return Job(100.0, 100.0 + seconds, [turn])


def run(arm: str, round_: int, seconds: float, shares=(1.0, 0.0), storage_blocks=BLOCKS) -> Run:
    """Nodes receive ``shares`` of RATE all the time."""
    times_s = np.linspace(0, seconds, 101)
    nics = NicUse(["p0", "d0"], times_s, times_s[:, None] * np.array(shares) * RATE)
    return Run(arm, round_, job(seconds), nics, storage_blocks * BLOCK_BYTES, 0, 0.5)


def result(runs: list[Run], long_hit_s=None) -> ShapeResult:
    rates = {"p0": RATE, "d0": RATE}
    return ShapeResult(Shape(1, 1), runs, rates, rates, long_hit_s or {})


def goal(found: ShapeResult, part: str) -> Goal:
    return next(g for g in found.goals() if part in g.name)


# ---- goals ----------------------------------------------------------------------------------


def test_gain_is_the_median_of_the_rounds_own_ratios():
    runs = [run("prefill", n, s) for n, s in enumerate((40, 80, 42))]
    runs += [run("split", n, s) for n, s in enumerate((20, 50, 20))]
    assert result(runs).gain("split") == 2.0


def test_an_io_bound_shape_must_reach_nine_tenths_of_the_pool():
    runs = [run("prefill", 0, 40), run("n-way", 0, 22), run("oracle", 0, 4, (0, 0), 0)]
    found = result(runs)
    assert found.bound == 2.0
    share = goal(found, "gain")
    assert share.at_least == 0.9
    assert share.value == pytest.approx(40 / 22 / 2)
    assert share.holds


def test_where_compute_limits_the_oracle_is_the_bound_and_less_is_wanted():
    runs = [run("prefill", 0, 40), run("n-way", 0, 27), run("oracle", 0, 22, (0, 0), 0)]
    found = result(runs)
    assert found.bound == pytest.approx(40 / 22)
    assert goal(found, "gain").at_least == 0.8
    assert goal(found, "gain").holds  # 27 s of the 22 s that are possible


def test_best_arm_is_never_the_oracle_or_basic():
    runs = [run("prefill", 0, 40), run("split", 0, 50), run("oracle", 0, 4, (0, 0), 0)]
    assert result(runs).best() == ("split", 0.8)


def test_basic_must_keep_its_own_nic_busy():
    busy = result([run("prefill", 0, 40, (0.97, 0))])
    lazy = result([run("prefill", 0, 40, (0.9, 0.07))])
    assert goal(busy, "Basic's").holds
    assert not goal(lazy, "Basic's").holds


def test_slow_begin_and_end_do_not_count_in_the_middle():
    times_s = np.array([0.0, 4.0, 36.0, 40.0])
    nics = NicUse(["p0"], times_s, np.array([[0.0], [0.0], [320.0], [320.0]]))
    assert nics.middle_rates(0.8) == pytest.approx([10.0])
    assert nics.bytes_by_node() == pytest.approx([320.0])


def test_balance_of_n_way():
    even = result([run("n-way", 0, 20, (1.0, 0.95))])
    uneven = result([run("n-way", 0, 20, (1.0, 0.8))])
    assert goal(even, "Max/Avg").value == pytest.approx(1 / 0.975)
    assert goal(even, "Max/Avg").holds
    assert not goal(uneven, "Max/Avg").holds


@pytest.mark.parametrize("n_way_s, holds", [(0.6, True), (0.7, False)])
def test_long_hit_must_be_shared_by_all_nics(n_way_s, holds):
    times = {"prefill": [1.0, 9.0, 1.0], "n-way": [n_way_s, 0.1, n_way_s]}
    assert goal(result([], times), "long hit").holds is holds  # 1.25 / 2 NICs


def test_a_run_that_read_other_bytes_than_its_hits_is_invalid():
    assert run("split", 0, 20).is_valid
    from_dram = run("split", 0, 20, storage_blocks=BLOCKS - 2)
    assert not from_dram.is_valid
    assert not goal(result([run("prefill", 0, 40), from_dram]), "storage bytes").holds
    assert not run("oracle", 0, 4).is_valid
    assert run("oracle", 0, 4, storage_blocks=0).is_valid


def test_every_goal_is_named_and_missed_when_nothing_was_measured():
    goals = result([]).goals()
    assert len(goals) == len({g.name for g in goals}) == 6
    assert all(g.value is None and not g.holds for g in goals)


def test_differing_answers_are_counted_but_not_the_oracles():
    wrong, oracle = run("split", 0, 20), run("oracle", 0, 4, storage_blocks=0)
    wrong.differing, oracle.differing = 1, 18
    assert goal(result([wrong, oracle]), "answers").value == 1


# ---- work -----------------------------------------------------------------------------------


def test_prompts_grow_by_what_was_answered_and_appended():
    shape = AgentShape(turns=2, context_tokens=128, append_tokens=5, generate_tokens=3)
    work, again = Trajectories(2, shape), Trajectories(2, shape)
    first = work.prompt(0, 0)
    work.answers[0].append([7, 8, 9])
    second = work.prompt(0, 1)
    assert len(first) == 133 and second[:136] == [*first, 7, 8, 9] and len(second) == 141
    assert first == again.prompt(0, 0) != work.prompt(1, 0)


class EchoGateway(Gateway):
    """Answers with the prompt's last tokens; two blocks of each were read from storage."""

    def __init__(self) -> None:
        self.salts: set[str] = set()
        self.under_way = self.most_under_way = 0

    async def generate(self, body):
        self.salts.add(body["cache_salt"])
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        await asyncio.sleep(0.01)
        self.under_way -= 1
        prompt, new = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        reader = {"blocks": 2, "read_bytes": {"remote": 2 * BLOCK_BYTES, "ssd": 1}}
        return {"output_ids": prompt[-new:]}, {"hit_blocks": 2, "readers": {"agent-d0": reader}}


async def test_a_job_runs_all_agents_at_once_and_their_turns_in_order():
    work = Trajectories(3, AgentShape(2, 128, 5, 3))
    gateway = EchoGateway()
    done = await run_job(gateway, work, "salt")
    assert gateway.salts == {"salt"} and gateway.most_under_way == 3
    assert len(done.turns) == 6 and done.differing(work.answers) == 0
    for agent in range(3):
        first, second = [turn for turn in done.turns if turn.agent == agent]
        assert first.done_s <= second.sent_s
        assert second.prompt_tokens == first.prompt_tokens + 8
    assert done.hit_bytes == 12 * BLOCK_BYTES == sum(turn.read_bytes for turn in done.turns)
    assert done.hit_rate == pytest.approx(6 * 128 / (3 * 133 + 3 * 141))


async def test_a_later_job_does_not_change_the_reference():
    work = Trajectories(1, AgentShape(2, 128, 5, 3))
    await run_job(EchoGateway(), work, "first")
    work.answers[0][0] = [1, 2, 3]
    assert (await run_job(EchoGateway(), work, "second")).differing(work.answers) == 1
    assert work.answers[0][0] == [1, 2, 3]


def test_answers_are_compared_turn_by_turn():
    answered = job(1.0)
    assert answered.differing([[[1]]]) == 0
    assert answered.differing([[[2]]]) == 1


def test_contexts_are_whole_blocks_and_hits_are_as_in_the_paper():
    shape = AgentShape()
    assert shape.context_tokens % 64 == 0
    last = shape.context_tokens + shape.turns * (shape.append_tokens + shape.generate_tokens)
    assert shape.context_tokens / last > 0.94


def test_another_arm_begins_each_round_and_the_oracle_is_last():
    orders = [rotated(ARMS, by) for by in range(5)]
    assert len({order[0] for order in orders}) == 5
    assert all(order[-1] == "oracle" and sorted(order) == sorted(ARMS) for order in orders)


def test_steps_count_every_job():
    assert Plan([Shape(1, 1), Shape(1, 2)], ["prefill", "n-way"], 3).steps == 2 * (6 + 2)


# ---- report ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_rows_and_picture_are_written(tmp_path: Path):
    import pyarrow.parquet

    found = result([run("prefill", 0, 4.0), run("n-way", 0, 2.0, (1, 1))])
    turns, nics = report.write_parquet(tmp_path, "out", [found])
    assert pyarrow.parquet.read_table(turns).num_rows == 2
    assert pyarrow.parquet.read_table(nics).num_rows == 2 * 101 * 2
    pytest.importorskip("matplotlib")
    assert report.draw(tmp_path, found).read_bytes().startswith(b"\x89PNG")


def test_table_has_a_row_for_each_arm():
    found = result([run("prefill", 0, 4.0), run("oracle", 0, 1.0, (0, 0), 0)])
    assert report.arms_table([found]).row_count == 2
    assert goals_table(found.goals()).row_count == 6


# ---- cluster --------------------------------------------------------------------------------


def test_each_process_runs_on_its_host_and_keeps_nothing(tmp_path: Path):
    network = Network(["p0", "p1", "d0"], Rates(100, 800))
    config = cluster_config(1, 1, 20000, tmp_path, "s3://blocks/kv", {"key": "k"})
    records = {record.name: record for record in records_on(network, config)}
    assert records.keys() == {"agent-p0", "agent-d0", "p0", "d0", "gateway"}
    for name, host in (("agent-d0", "d0"), ("d0", "d0"), ("p0", "p0")):
        assert records[name].argv[:4] == ("ip", "netns", "exec", network.namespace(host))
        assert records[name].host == network.compute_address(host)
    agent = json.loads(records["agent-p0"].env["DUALPATH_AGENT"])
    assert (agent["experiment"]["dram_keep"], agent["ssd_dirs"]) == (False, [])
    engine = json.loads(records["d0"].env["DUALPATH_ENGINE"])
    assert engine["experiment"]["keep_prefixes"] is False
    assert records["gateway"].argv[0] == sys.executable


# ---- machine --------------------------------------------------------------------------------


def test_busy_time_leaves_idle_and_disk_waits_out():
    tick = os.sysconf("SC_CLK_TCK")
    assert machine.busy_seconds("cpu  100 0 50 1000 7 0 0 50 0 0\ncpu0 1\n") == 200 / tick


def test_counters_of_devices():
    text = "Inter-| a\n face | b\n  p0: 11 1 0 0 0 0 0 0 22 2 0 0 0 0 0 0\n"
    found = parse_counters(text)["p0"]
    assert (found.received_bytes, found.sent_bytes) == (11, 22)


def test_iperfs_own_error_is_passed_on():
    with pytest.raises(iperf.IperfFailed, match="unable to connect"):
        iperf.received_bytes_per_s({"error": "unable to connect"})


# ---- namespaces -----------------------------------------------------------------------------

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("iperf3"),
    reason="needs root, iproute2 and iperf3",
)


@pytest.fixture
def network():
    built = Network(["p0", "d0"], Rates(storage_mbit=50, compute_mbit=400))
    if reason := machine._no_limited_links():
        pytest.skip(reason)
    built.build()
    yield built
    built.remove()
    assert not [name for name in list_namespaces() if str(os.getpid()) in name]


@needs_root
@pytest.mark.slow
@pytest.mark.alone
def test_links_are_as_fast_as_asked_and_counted(network: Network):
    with network.entered():
        storage = iperf.storage_rates(network, ["p0"], 1)
        compute = iperf.compute_rates(network, ["p0", "d0"], 1)
        counted = network.storage_counters()
    assert storage["p0"] * 8 / 1e6 == pytest.approx(50, rel=0.15)
    assert min(compute.values()) * 8 / 1e6 == pytest.approx(400, rel=0.15)
    assert counted["p0"].received_bytes > 5e6 > counted["d0"].received_bytes


@needs_root
@pytest.mark.slow
@pytest.mark.alone
def test_opened_links_are_faster_and_closed_again(network: Network):
    with network.entered():
        with network.open_storage():
            open_rate = iperf.storage_rates(network, ["p0"], 1)["p0"]
        closed_rate = iperf.storage_rates(network, ["p0"], 1)["p0"]
    assert open_rate > 5 * closed_rate


@needs_root
@pytest.mark.slow
def test_what_a_killed_run_has_left_is_removed_with_its_processes(tmp_path: Path):
    script = (
        "import os, subprocess, time\n"
        "from benchmarks.testbed.network import Network, Rates, within\n"
        "network = Network(['p0'], Rates(50, 400))\n"
        "network.build()\n"
        "place = within(network.namespace('p0'))\n"
        "print(subprocess.Popen([*place, 'sleep', '300']).pid, flush=True)\n"
        "time.sleep(300)\n"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=root) as dead:
        try:
            sleeper = int(dead.stdout.readline())
            folder = tmp_path / f"dptb{dead.pid}-scratch"
            folder.mkdir()
            # It is alive. What others have left on this machine may go.
            assert not [name for name in remove_leftovers(tmp_path) if str(dead.pid) in name]
        finally:
            dead.kill()
    removed = remove_leftovers(tmp_path)
    assert str(folder) in removed and any(name.endswith("-p0") for name in removed)
    assert not folder.exists()
    assert not Path(f"/proc/{sleeper}").exists() or _is_zombie(sleeper)


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"

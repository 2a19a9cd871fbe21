"""The layer window's benchmark: its goals, and the cores that it gives to its processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

from benchmarks.layer_window import cores
from benchmarks.layer_window.__main__ import make_goals
from benchmarks.layer_window.measure import Results

TREE = """
import subprocess, sys, time
import setproctitle
level = sys.argv[1]
if level == "scheduler":
    setproctitle.setproctitle("sglang::scheduler")
    print("ready", flush=True)
    time.sleep(60)
under = {"launcher": ["engine", "--disaggregation-mode", "prefill"], "engine": ["scheduler"]}
subprocess.run([sys.executable, __file__, *under[level]])
"""


def test_every_goal_is_there_when_nothing_was_measured():
    goals = make_goals(Results())
    assert len(goals) == 8 and len({goal.name for goal in goals}) == 8
    assert all(goal.value is None and not goal.holds for goal in goals)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_forwards_have_a_core_of_their_own(tmp_path):
    script = tmp_path / "tree.py"
    script.write_text(TREE)
    first, *others = sorted(os.sched_getaffinity(0))
    launcher = subprocess.Popen(
        [sys.executable, str(script), "launcher"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "ready\n"
        root = psutil.Process(launcher.pid)
        cores.keep_apart(root, [first, *others])
        (engine,) = root.children()
        (scheduler,) = engine.children()
        assert os.sched_getaffinity(scheduler.pid) == {first}
        assert os.sched_getaffinity(engine.pid) == os.sched_getaffinity(root.pid) == set(others)
    finally:
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.communicate()

"""A benchmark says what it lacks before it measures anything, not minutes later."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

from benchmarks import tools

FLAGS = {
    "elastic": ["--json", "out.json"],
    "faults": ["--json", "out.json"],
    "layer_window": ["--json", "out.json"],
    "models": ["--json", "out.json"],
    "quota": ["--json", "out.json"],
    "replay": [],
    "rollout": [],
    "store": ["--json", "out.json"],
    "testbed": ["offline", "--json", "out.json"],
    "traffic": ["--json", "out.json"],
    "weights": ["--json", "out.json"],
}
"""Of each benchmark that needs more than Python."""


@pytest.mark.parametrize("name", FLAGS)
def test_without_its_tools_a_benchmark_ends_at_once(name, monkeypatch, tmp_path, capsys):
    benchmark = importlib.import_module(f"benchmarks.{name}.__main__")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        benchmark.main(FLAGS[name])
    assert ended.value.code == tools.CANNOT_RUN
    said = capsys.readouterr().err
    assert said.startswith("not found: ") and "`make setup-test` installs" in said
    assert list(tmp_path.iterdir()) == []


def test_no_other_benchmark_looks_for_tools():
    folder = Path(inspect.getfile(tools)).parent
    looking = {
        path.parent.name for path in folder.glob("*/__main__.py") if "need(" in path.read_text()
    }
    assert looking == set(FLAGS)


def test_who_is_not_root_is_told_so(monkeypatch, capsys):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    tools.need("sh")
    with pytest.raises(SystemExit):
        tools.need("sh", root=True)
    assert "run this as root" in capsys.readouterr().err

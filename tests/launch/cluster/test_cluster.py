"""The command line: what it refuses, and how it says so."""

import contextlib
import os
import socket
import tempfile
from pathlib import Path

import pytest

from launch.cluster import __main__ as cluster
from launch.cluster import preflight
from launch.cluster.config import ClusterConfig
from launch.cluster.console import LogFollower, make_summary
from launch.cluster.hardware import Hardware
from launch.cluster.processes import process_records
from launch.models.resolve import resolve_model
from launch.settings import BadConfig
from storage.ssd.folder import FORMAT
from tests.cluster import free_port_block

PORTS = 400
"""Of a small cluster: from its gateway's on."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The user's: the model is built into it once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def refused(monkeypatch, cache, capsys):
    """Runs the command, expects exit code 2, and returns the one sentence on stderr."""

    def must_not_start(*args):
        raise AssertionError("processes were started")

    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(cluster, "supervise", must_not_start)

    def run(*argv: str) -> str:
        port = free_port_block(PORTS, lowest=21000)
        common = ["--device", "cpu", "--dram-bytes", "1MiB", "--port", str(port)]
        assert cluster.main([*common, "--model", "tiny", *argv]) == 2
        sentence = capsys.readouterr().err.strip().splitlines()[-1]
        assert sentence.startswith("error: ")
        return sentence

    return run


def _takes(stack: contextlib.ExitStack, first: int, count: int) -> bool:
    """Whether all of these ports were free; they are taken until the stack is closed."""
    with contextlib.ExitStack() as ports:
        for port in range(first, first + count):
            holder = ports.enter_context(socket.socket())
            try:
                holder.bind(("127.0.0.2", port))
            except OSError:
                return False
            holder.listen()
        stack.enter_context(ports.pop_all())
    return True


def test_a_bad_flag(refused):
    assert "--prefill" in refused("--prefil", "2")


def test_an_unreadable_model(refused, tmp_path):
    assert "config.json" in refused("--model", str(tmp_path))


def test_a_busy_port_is_named_with_the_process_that_needs_it(refused):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        sentence = refused("--port", str(port), "--base-port", "21000")
    assert str(port) in sentence and "gateway" in sentence and "--port" in sentence


def test_a_temporary_folder_of_too_long_a_name(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("long" * 25)))
    assert "TMPDIR" in refused()


def test_ports_of_which_too_few_are_free_are_named(refused):
    """Each process takes some of its block: here another one has most of an agent's, on an address
    that the agent would share."""
    port = str(free_port_block(PORTS, lowest=21000))
    with contextlib.ExitStack() as stack:
        base = next(base for base in range(21500, 30000, 100) if _takes(stack, base + 16, 20))
        sentence = refused("--port", port, "--base-port", str(base))
    assert "agent-p0" in sentence and "20 of them are in use" in sentence
    assert "--base-port" in sentence


def test_an_unwritable_ssd_folder(refused, tmp_path):
    (tmp_path / "file").write_text("")
    sentence = refused("--ssd-dir", str(tmp_path / "file" / "store"))
    assert "--ssd-dir" in sentence and "not writable" in sentence


def test_an_ssd_folder_of_a_running_cluster(refused, tmp_path):
    config = ClusterConfig(dram_bytes=1 << 20, ssd_dir=(tmp_path,), log_dir=str(tmp_path))
    records = process_records(config, Path("/models/tiny"), Hardware("cpu", "tcp", "test"))
    first, second = preflight.check(config, [r for r in records if r.kind == "agent"])
    with first, second:
        assert "another cluster, whose agent-p0" in refused("--ssd-dir", str(tmp_path))


def test_what_a_host_has_is_compared_with_its_own_processes_alone(tmp_path):
    config = ClusterConfig(
        prefill=2, dram_bytes=1 << 20, ssd_dir=(tmp_path,), log_dir=str(tmp_path)
    )
    hosts = {"p0": "127.0.0.2", "p1": "127.0.0.3", "d0": "192.0.2.1"}
    records = process_records(config, Path("/models/tiny"), Hardware("cpu", "tcp", "test"), hosts)
    locks = []
    for host in ("127.0.0.2", "127.0.0.3"):
        here = [record for record in records if record.host == host]
        locks += preflight.check(config, here)  # one disk holds the stores of several agents
    assert len(locks) == 2
    for lock in locks:
        assert os.fstat(lock.fileno()).st_mode & 0o077 == 0
        lock.close()


def test_ssd_folders_of_another_version_are_named_with_what_to_do(refused, tmp_path):
    for agent, left in (("agent-p0", "000000-16384.slots"), ("agent-d0", "blocks")):
        (tmp_path / agent / left).mkdir(parents=True)
    sentence = refused("--ssd-dir", str(tmp_path))
    assert "older version" in sentence and f"this program writes {FORMAT}" in sentence
    assert "delete it" in sentence and "local disk" not in sentence
    assert all(str(tmp_path / agent) in sentence for agent in ("agent-p0", "agent-d0"))


def test_a_new_version_starts_beside_the_default_store_of_an_old_one(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    old = tmp_path / "dualpath" / "store"
    (old / "agent-p0" / "blocks").mkdir(parents=True)
    config = ClusterConfig(dram_bytes=1 << 20)
    hardware = Hardware("cpu", "tcp", "the kernel lists no RDMA device.")
    records = process_records(config, Path("/models/tiny"), hardware)
    preflight.check_formats(config, [record.name for record in records])
    (tmp_path / "dualpath" / f"store-{FORMAT}").mkdir()  # as a start makes it
    table = make_summary(config, hardware, Path("/models/tiny"), records)
    (unused,) = [text for text in table.columns[2].cells if "another version" in str(text)]
    assert f"{old} " in str(unused) and (old / "agent-p0" / "blocks").exists()


@pytest.mark.parametrize("url", ["nosuch://bucket", "file:///proc/no/such"])
def test_a_wrong_remote_url(refused, url):
    assert url in refused("--remote", url)


def test_more_dram_than_there_is():
    config = ClusterConfig(prefill=2, decode=2, dram_bytes=3 << 30)
    with pytest.raises(BadConfig, match="4 agents"):
        preflight.check_memory(config, agents=4, available_bytes=8 << 30)
    preflight.check_memory(config, agents=2, available_bytes=8 << 30)


@pytest.mark.slow
def test_a_process_that_cannot_start_ends_with_its_last_words(monkeypatch, tmp_path, capsys):
    argv = ["--model", str(resolve_model("tiny")), "--device", "cpu"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    argv += ["--dram-bytes", "1MiB", "--ssd-bytes", "1MiB"]
    port = free_port_block(PORTS, lowest=21000)
    argv += ["--port", str(port), "--engine-args", "--no-such-flag 1"]
    assert cluster.main(argv) == 1
    shown = "".join(capsys.readouterr())
    assert "no-such-flag" in shown
    assert "error: p0 exited" in shown or "error: d0 exited" in shown


def test_the_summary_shows_what_was_decided(tmp_path):
    config = ClusterConfig(prefill=1, decode=2, remote="s3://kv", ssd_dir=(tmp_path,))
    hardware = Hardware("cpu", "tcp", "the kernel lists no RDMA device.")
    records = process_records(config, Path("/models/tiny"), hardware)
    table = make_summary(config, hardware, Path("/models/tiny"), records)
    text = " ".join(cell for column in table.columns for cell in map(str, column.cells))
    for part in ("agent-d1", "gateway", "http 30000", "8 GiB", "s3://kv", "shorter-queue"):
        assert part in text
    assert "no RDMA device" in text


def test_the_console_shows_errors_with_what_belongs_to_them(tmp_path):
    log = tmp_path / "p0.log"
    follower = LogFollower(log, "error")
    assert follower.new_lines() == []
    log.write_text(
        "[2026-01-01 00:00:00] loading\n"
        "Traceback (most recent call last):\n"
        '  File "x.py", line 1\n'
        "ValueError: no\n"
        "[2026-01-01 00:00:01] going on\n"
        "unfinished"
    )
    shown = follower.new_lines()
    assert [line.split()[0] for line in shown] == ["Traceback", "File", "ValueError:"]
    with log.open("a") as file:
        file.write(" RuntimeError\n")
    assert follower.new_lines() == ["unfinished RuntimeError"]

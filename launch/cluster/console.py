"""What the launcher shows: one summary, progress, and lines of the processes' logs."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from common.sizes import format_size
from launch.cluster.config import ClusterConfig
from launch.cluster.engine_command import ROLE_FLAG, served_model_name
from launch.cluster.hardware import Hardware
from launch.cluster.process_record import ProcessRecord
from launch.flags.forms import PACE
from launch.flags.node import NodeSettings
from launch.gateway.doors.browsers import is_loopback
from transfer.traffic import cgroup

_LEVELS = ("debug", "info", "warning", "error", "none")
_NEW_ENTRY = re.compile(r"\[?\d{4}-\d\d-\d\d|[A-Z]+:|\[")
_UNUSED = "holds blocks of another version: delete it, unless that version is still used"
_TAIL_PERIOD_S = 0.3
_TAIL_BYTES_MAX = 256 << 10
"""Read of one log in one period; what a process writes beyond it is in its file only."""
_PROGRESS_PERIOD_S = 10


def make_summary(
    config: ClusterConfig, hardware: Hardware, model: Path, records: Sequence[ProcessRecord]
) -> Table:
    """Everything that was decided, in one table."""
    table = _processes(f"DualPath cluster on {gateway_url(config)}", records)
    _add_settings(
        table,
        *_engines_rows(config, hardware, model),
        ("doors", _doors(config)),
        *_host_rows(config),
        ("policy", f"{config.path_policy} reads hit blocks"),
    )
    return table


def make_node_summary(
    title: str,
    config: NodeSettings,
    hardware: Hardware,
    model: Path,
    records: Sequence[ProcessRecord],
) -> Table:
    """Likewise, of one node."""
    table = _processes(title, records)
    _add_settings(table, *_engines_rows(config, hardware, model), *_host_rows(config))
    return table


def _processes(title: str, records: Sequence[ProcessRecord]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("process")
    table.add_column("ports")
    table.add_column("what", overflow="fold")
    for record in records:
        ports = ", ".join(f"{purpose} {port}" for purpose, port in record.ports.items())
        table.add_row(record.name, ports, _role(record))
    table.add_section()
    return table


def _add_settings(table: Table, *rows: tuple[str, str]) -> None:
    for name, text in rows:
        table.add_row(name, "", text)


def _engines_rows(config: NodeSettings, hardware: Hardware, model: Path) -> list[tuple[str, str]]:
    return [
        ("model", f"{served_model_name(config)} from {model}"),
        ("device", hardware.device),
        ("transfer", f"{hardware.transfer}: {hardware.reason}"),
        ("traffic", _traffic(config, hardware)),
    ]


def _host_rows(config: NodeSettings) -> list[tuple[str, str]]:
    return [
        ("ports", _ports(config)),
        ("tiers", _tiers(config)),
        *(("EXPERIMENT", f"not the product: {what}") for what in config.experiment.departures),
        *(("unused", f"{folder} {_UNUSED}") for folder in config.unused_stores),
        ("logs", str(config.log_folder)),
    ]


def gateway_url(config: ClusterConfig) -> str:
    """Where clients connect."""
    scheme = "https" if config.ssl_certfile else "http"
    return f"{scheme}://{config.host}:{config.port}"


def _doors(config: ClusterConfig) -> str:
    """Who may use the gateway."""
    reach = "this host" if is_loopback(config.host) else f"whoever reaches {gateway_url(config)}"
    tenants = len({one.tenant for one in config.api_key})
    generate = f"{tenants} tenants by API key" if tenants else f"{reach}, without a key"
    operators = "by their API key" if config.admin_api_key else "this host only"
    return f"generating: {generate}; operators' routes: {operators}"


def _role(record: ProcessRecord) -> str:
    if record.kind == "agent":
        return f"storage and transfer of node {record.name.removeprefix('agent-')}"
    if record.kind == "gateway":
        return "OpenAI API and scheduler"
    role = record.argv[record.argv.index(ROLE_FLAG) + 1]
    return f"SGLang, {role}"


def _tiers(config: NodeSettings) -> str:
    tiers = [f"DRAM {format_size(config.dram_bytes)} an agent"]
    if config.ssd_bytes:
        folders = ", ".join(map(str, config.ssd_folders))
        tiers.append(f"SSD {format_size(config.ssd_bytes)} an agent in {folders}")
    tiers.append(f"remote {config.remote}" if config.remote else "no remote")
    return "; ".join(tiers)


def _ports(config: NodeSettings) -> str:
    """Who is heard at the ports of agents and engines."""
    if config.peers_from == "any":
        heard = "OPEN to everyone who reaches this host (--peers-from any)"
    else:
        heard = f"the cluster's hosts{config.peers_from and ' and ' + config.peers_from} alone"
    return f"KV movement and ranks hear {heard} (python -m transfer.check --ports)"


def _traffic(config: NodeSettings, hardware: Hardware) -> str:
    """The traffic classes, and by what the network tells them apart."""
    settings = config.traffic
    classes = "agents low, all others high"
    if hardware.transfer == "rdma":
        low, high = (
            f"service level {marks.service_level}, DSCP {marks.dscp}"
            for marks in (settings.low, settings.high)
        )
        return f"{classes}: {low} and {high}"
    with cgroup.entry(settings.cgroup) as entry:
        if entry is not None:
            return f"{classes}: agents start in control group {settings.cgroup}"
    return (
        f"{classes}, but nothing marks them here (python -m transfer.check says more); "
        f"--kv-pace is {PACE.text(config.kv_pace)}"
    )


class ConsoleReporter:
    """The supervisor's reporter: a spinner on a terminal, lines elsewhere."""

    def __init__(self, config: NodeSettings, when_serving: str) -> None:
        width = None if sys.stdout.isatty() else 140
        self.console = Console(highlight=False, soft_wrap=True, width=width)
        self._is_serving = False
        self._config = config
        self._when_serving = when_serving
        self._status = self.console.status("starting")

    def ready(self, name: str, seconds: float) -> None:
        self._say(f"{name} is ready after {seconds:.1f} s")

    def waiting(self, names: Sequence[str], seconds: float) -> None:
        text = f"waiting for {', '.join(names)} ({seconds:.0f} s)"
        if self.console.is_terminal:
            self._status.update(text)
            self._status.start()
        elif seconds >= 1 and round(seconds) % _PROGRESS_PERIOD_S == 0:
            self._say(text)

    def serving(self) -> None:
        self._status.stop()
        self._is_serving = True
        self._say(self._when_serving)

    def restarting(self, name: str, reason: str, delay_s: float) -> None:
        self._say(f"{name} {reason}; it starts again in {delay_s:.1f} s")

    def stopping(self, reason: str) -> None:
        self._status.stop()
        self._say(f"{reason}: ending all processes")

    def failed(self, sentence: str, log: Path, lines_max: int = 25) -> None:
        """The end of a start that did not work, with the culprit's last words."""
        self._status.stop()
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        for line in lines[-lines_max:]:
            self._say(f"  {line}")
        self._say(f"error: {sentence}; the lines above are the end of {log}")

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False)

    async def follow_logs(self, logs: Sequence[Path]) -> None:
        """Show lines from ``--log-level`` on, prefixed with their process's name.

        Errors alone are shown only while serving: SGLang logs harmless ones as it starts,
        and a start that fails shows the end of the culprit's log anyway.
        """
        if self._config.log_level == "none":
            return
        starting_too = self._config.log_level != "error"
        followers = [LogFollower(log, self._config.log_level) for log in logs]
        while True:
            for follower in followers:
                for line in follower.new_lines():
                    if self._is_serving or starting_too:
                        self._say(f"{follower.name:>9} | {line}")
            await asyncio.sleep(_TAIL_PERIOD_S)


class LogFollower:
    """Reads what a growing log gained, and keeps the lines that are important enough."""

    def __init__(self, log: Path, level: str) -> None:
        self.name = log.stem
        self._log = log
        self._level = _LEVELS.index(level)
        self._offset = 0
        self._partial = b""
        self._entry_level = 1

    def new_lines(self) -> list[str]:
        """Lines completed since the last call."""
        try:
            with self._log.open("rb") as file:
                size = file.seek(0, 2)
                if size < self._offset:  # it was put aside (log_files.py)
                    self._offset, self._partial = 0, b""
                self._offset = file.seek(max(self._offset, size - _TAIL_BYTES_MAX))
                data = self._partial + file.read(_TAIL_BYTES_MAX)
                self._offset = file.tell()
        except FileNotFoundError:
            return []
        *lines, self._partial = data.split(b"\n")
        texts = [line.decode(errors="replace").rstrip() for line in lines]
        return [text for text in texts if self._is_shown(text)]

    def _is_shown(self, line: str) -> bool:
        found = level_of(line)
        if found is not None:
            self._entry_level = found
        elif _NEW_ENTRY.match(line):
            self._entry_level = _LEVELS.index("info")
        return bool(line) and self._entry_level >= self._level


def level_of(line: str) -> int | None:
    """Index of the level that a line shows; None where it shows none.

    SGLang's log lines carry no level, so words have to do.
    """
    if re.search(r"\b(ERROR|CRITICAL|FATAL|Traceback|[A-Z]\w*(Error|Exception))\b", line):
        return _LEVELS.index("error")
    if re.search(r"\b(WARN|WARNING|[A-Z]\w*Warning)\b", line):
        return _LEVELS.index("warning")
    if re.search(r"\bDEBUG\b", line):
        return _LEVELS.index("debug")
    return _LEVELS.index("info") if re.search(r"\bINFO\b", line) else None

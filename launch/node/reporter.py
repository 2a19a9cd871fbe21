"""What a node tells whoever has started it: lines on the console, and a file while it serves."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from launch.cluster.console import ConsoleReporter
from launch.node.config import NodeConfig


class NodeReporter(ConsoleReporter):
    """Of a node with these processes."""

    def __init__(self, config: NodeConfig, processes: Iterable[str]) -> None:
        super().__init__(config, f"{config.node} serves; SIGTERM drains and ends it")
        self._file = Path(config.ready_file).expanduser() if config.ready_file else None
        self._missing = set(processes)
        self._show()

    def ready(self, name: str, seconds: float) -> None:
        super().ready(name, seconds)
        self._missing.discard(name)
        self._show()

    def restarting(self, name: str, reason: str, delay_s: float) -> None:
        super().restarting(name, reason, delay_s)
        self._missing.add(name)
        self._show()

    def stopping(self, reason: str) -> None:
        self.console.print(f"{reason}: draining; a second signal ends everything at once")
        self._missing.add(reason)
        self._show()

    def _show(self) -> None:
        if self._file is None:
            return
        if self._missing:
            self._file.unlink(missing_ok=True)
        else:
            self._file.touch()

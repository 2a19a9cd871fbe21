"""A check's findings as a table and sentences, or as JSON; and its exit code."""

from __future__ import annotations

import msgspec
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from transfer.check.findings import Finding, State
from transfer.check.machine import Machine, RdmaPort
from transfer.check.probe import Measured
from transfer.pacing.nics import nearest
from transfer.traffic.classes import CLASS_OF_KIND, TrafficSettings

EXIT_CODES = {State.EFFECT: 0, State.NONE: 1, State.HALF: 2, State.UNPROVEN: 2}
_WORDS = {
    State.EFFECT: "classes take effect",
    State.UNPROVEN: "not proven",
    State.HALF: "half configured",
    State.NONE: "no classes",
}


class Report(msgspec.Struct, frozen=True):
    machine: Machine
    settings: TrafficSettings
    by_device: dict[str, list[Finding]]
    """Of each device that was looked at."""
    notes: list[Finding]
    """Of the machine as a whole."""
    measured: Measured | None = None
    verdict: Finding | None = None
    """Of the measurement."""

    @property
    def state(self) -> State:
        """What was measured, if that says something; else of the device that fares best."""
        if self.verdict is not None and self.verdict.state is not State.UNPROVEN:
            return self.verdict.state
        states = [min(f.state for f in found) for found in self.by_device.values() if found]
        return max(states, default=State.NONE)

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.state]

    def findings(self) -> list[Finding]:
        verdict = [] if self.verdict is None else [self.verdict]
        return [*verdict, *(f for found in self.by_device.values() for f in found), *self.notes]

    def as_json(self) -> str:
        """For scripts."""
        content: dict[str, object] = {
            "state": self.state.name.lower(),
            "exit_code": self.exit_code,
            "network": self.machine.network,
            "class_of_kind": {kind: found.value for kind, found in CLASS_OF_KIND.items()},
            "settings": self.settings,
            "findings": [
                {"state": f.state.name.lower(), "what": f.what, "cost": f.cost}
                for f in self.findings()
            ],
            "measured": self.measured,
            "machine": self.machine,
        }
        return msgspec.json.format(msgspec.json.encode(content), indent=2).decode()

    def show(self, console: Console) -> None:
        """For people."""
        console.print(Group(*_tables(self.machine)))
        if self.measured is not None:
            console.print(_measured_table(self.measured))
        for finding in self.findings():
            console.print(Text(f"[{_WORDS[finding.state]}] {finding.what}."))
            if finding.cost:
                console.print(Text(f"    {finding.cost}."))
        low = [kind for kind, found in CLASS_OF_KIND.items() if found.value == "low"]
        console.print(Text(f"Low: {', '.join(low)}s. All others are high (docs/traffic.md)."))
        console.print(Text(f"Result: {_WORDS[self.state]} (exit code {self.exit_code})."))


def _tables(machine: Machine) -> list[Table]:
    net = Table(title=f"network: {machine.network}", title_justify="left")
    for title in ("device", "link", "Mbit/s", "MTU", "NUMA", "addresses"):
        net.add_column(title, overflow="fold")
    for device in machine.net:
        link = device.link
        rate = str(link.rate_mbit or "?")
        state = "up" if link.is_up else "down"
        numa = str(device.numa_node) if device.numa_node >= 0 else "-"
        net.add_row(device.name, state, rate, str(link.mtu), numa, ", ".join(link.addresses))
    tables = [net]
    if machine.rdma:
        tables.append(_rdma_table(machine))
    return tables


def _rdma_table(machine: Machine) -> Table:
    nics = [device.nic for device in machine.rdma]
    table = Table()
    for title in ("RDMA device", "port", "link", "rate", "GIDs", "net device", "NUMA", "near GPUs"):
        table.add_column(title, overflow="fold")
    near = {gpu.pci_path[-1]: nearest(nics, gpu) for gpu in machine.gpus if gpu.pci_path}
    for device in machine.rdma:
        gpus = ", ".join(gpu for gpu, names in near.items() if device.nic.name in names)
        for port in device.ports:
            numa = str(device.nic.numa_node)
            table.add_row(device.nic.name, *_port_cells(port), numa, gpus or "-")
    return table


def _port_cells(port: RdmaPort) -> tuple[str, ...]:
    kind = "Ethernet" if port.is_ethernet else "InfiniBand"
    state = "up" if port.is_active else "down"
    gids = ", ".join(f"{gid.index}: {gid.kind}" for gid in port.gids)
    return str(port.number), f"{kind}, {state}", port.rate, gids or "-", port.net_device or "-"


def _measured_table(measured: Measured) -> Table:
    table = Table(title="measured", title_justify="left")
    for title in ("", "alone", "side by side"):
        table.add_column(title, justify="right" if title else "left")
    for name, alone, beside in (
        ("high, Mbit/s", measured.high_alone_mbit, measured.high_beside_mbit),
        ("low, Mbit/s", measured.low_alone_mbit, measured.low_beside_mbit),
        (
            "4 KiB of high, p99 in ms",
            measured.message_alone_p99_ms,
            measured.message_beside_p99_ms,
        ),
    ):
        table.add_row(name, f"{alone:.1f}", f"{beside:.1f}")
    return table

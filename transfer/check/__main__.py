"""``python -m transfer.check``: which traffic classes take effect on this machine's network.

Changes nothing. With --peer it measures: both classes at once, into memory of a node on which
``python -m transfer.check --serve --host ADDRESS`` runs (about 15 s). With --ports it lists who
listens where, and is heard by whom (0 if only those whom the configuration names, else 1).

Exit codes: 0 the classes take effect; 1 nothing tells the classes apart; 2 half configured, or
not to be seen from here: measure; 3 the check could not run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from transfer.check import ports, probe
from transfer.check.facts import ethernet_facts, roce_facts
from transfer.check.findings import Finding, judge_ethernet, judge_gpus, judge_rdma
from transfer.check.machine import Machine, read_machine
from transfer.check.probe import Measured, Node, ProbeFailed
from transfer.check.report import Report
from transfer.mooncake import TransferFailed
from transfer.pacing.nics import SYSFS
from transfer.pacing.route import device_to
from transfer.traffic.classes import BadMarks, TrafficSettings, read_settings

COULD_NOT = 3
WIDTH = 140
"""Of tables that go into a file."""


class CannotCheck(Exception):
    """The message says what to do."""


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    arguments = make_parser().parse_args(argv)
    width = None if sys.stdout.isatty() else WIDTH
    console = Console(stderr=arguments.json, highlight=False, soft_wrap=True, width=width)
    try:
        settings = read_settings(arguments.traffic)
        if arguments.serve:
            return _serve(arguments, console)
        if arguments.ports:
            return ports.report(console, arguments.json)
        report = check(arguments, settings, console)
    except (BadMarks, CannotCheck, ProbeFailed, TransferFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return COULD_NOT
    if arguments.json:
        print(report.as_json())
    else:
        report.show(console)
    return report.exit_code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(COULD_NOT, f"error: {message}\n")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = _Parser(prog="python -m transfer.check", description=__doc__)
    add = parser.add_argument
    add("--device", default="", metavar="NAME", help="look at this network or RDMA device only")
    add("--traffic", default="", metavar="JSON", help="the site's marks, as of launch.cluster")
    add("--json", action="store_true", help="for scripts: JSON on stdout")
    add("--peer", default="", metavar="HOST", help="measure towards this node")
    add("--seconds", type=float, default=2.0, metavar="S", help="of each part of a measurement")
    add("--ports", action="store_true", help="list every listener of the clusters that run here")
    add("--serve", action="store_true", help="be the peer of another node's check, until Ctrl-C")
    add("--host", default="", metavar="ADDRESS", help="own address; default: to --peer; loopback")
    add("--port", type=int, default=probe.PORT, help=f"of --serve (default {probe.PORT})")
    add(
        "--transfer",
        choices=("auto", "rdma", "tcp"),
        default="auto",
        help="what is measured; auto is rdma where there is a device for it",
    )
    add("--rdma-devices", default="", metavar="LIST", help="as of launch.cluster")
    add("--sysfs", type=Path, default=SYSFS, metavar="DIR", help="another machine's, recorded")
    return parser


def check(arguments: argparse.Namespace, settings: TrafficSettings, console: Console) -> Report:
    """Raises :class:`CannotCheck` or :class:`ProbeFailed`."""
    machine = read_machine(arguments.sysfs)
    measured = verdict = None
    wanted = arguments.device
    if arguments.peer:
        measured = _measure(arguments, settings, machine, console)
        verdict = probe.judge(measured)
        wanted = wanted or _device_to(arguments.peer, machine)
    by_device = judge_devices(machine, settings, wanted)
    if wanted and wanted not in by_device:
        known = [*(d.name for d in machine.net), *(d.nic.name for d in machine.rdma)]
        raise CannotCheck(f"there is no device {wanted}, but {', '.join(known) or 'none'}")
    return Report(machine, settings, by_device, judge_gpus(machine), measured, verdict)


def judge_devices(
    machine: Machine, settings: TrafficSettings, wanted: str
) -> dict[str, list[Finding]]:
    """Of the devices that KV would move through, or of the one that is wanted."""
    found: dict[str, list[Finding]] = {}
    for device in machine.rdma:
        if wanted in ("", device.nic.name):
            found[device.nic.name] = [
                finding
                for port in device.ports
                for finding in judge_rdma(
                    device,
                    port,
                    roce_facts(port.net_device) if port.is_ethernet else None,
                    machine.net_device(port.net_device),
                    settings,
                )
            ]
    for net in machine.net:
        is_used = net.link.is_up and net.link.addresses and machine.network == "ethernet"
        if wanted == net.name or (is_used and not wanted):
            found[net.name] = judge_ethernet(net, ethernet_facts(net.name, settings), settings)
    return found


def _device_to(peer: str, machine: Machine) -> str:
    """Without RDMA, the network device; "" for all."""
    if machine.network != "ethernet":
        return ""
    try:
        device = device_to(peer)
    except OSError:  # a name: no more than a hint is lost
        return ""
    return "" if device == "lo" else device


def _measure(
    arguments: argparse.Namespace, settings: TrafficSettings, machine: Machine, console: Console
) -> Measured:
    target = probe.ask_target(arguments.peer, arguments.port)
    host = arguments.host or probe.own_address(arguments.peer)
    node = Node(host, _protocol(arguments, machine), arguments.rdma_devices)
    with console.status("measuring") as status:
        return probe.measure(
            target,
            node,
            settings,
            arguments.seconds,
            lambda part: status.update(f"measuring over {node.protocol}: {part}"),
        )


def _protocol(arguments: argparse.Namespace, machine: Machine) -> str:
    if arguments.transfer != "auto":
        return str(arguments.transfer)
    return "tcp" if machine.network == "ethernet" else "rdma"


def _serve(arguments: argparse.Namespace, console: Console) -> int:
    protocol = _protocol(arguments, read_machine(arguments.sysfs))
    node = Node(arguments.host or "127.0.0.1", protocol, arguments.rdma_devices)

    def ready(where: str) -> None:
        console.print(f"serving checks at {where} over {protocol}; Ctrl-C ends it")

    try:
        probe.serve(node, arguments.port, ready)
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

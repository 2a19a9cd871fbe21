"""``python -m transfer.traffic``: the rules that give the traffic classes an effect.

Prints them for InfiniBand (subnet manager), RoCE (host and switch) and Ethernet without
RDMA; these last it also applies and removes.

Exit codes: 0 done; 1 a command failed, and nothing is in force; 2 refused, nothing changed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import psutil

from transfer.traffic import ethernet, infiniband, roce
from transfer.traffic.classes import BadMarks, TrafficSettings, read_settings
from transfer.traffic.ethernet import BadRules, EthernetRules, make_rules
from transfer.traffic.host import CommandFailed, Host, Refused


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    arguments = make_parser().parse_args(argv)
    try:
        settings = read_settings(arguments.traffic)
        if arguments.network == "ethernet":
            return _ethernet(arguments, settings)
        if arguments.apply or arguments.remove:
            raise BadRules("--apply and --remove are for --network ethernet: run what is printed")
        print(_infiniband(settings) if arguments.network == "ib" else _roce(arguments, settings))
    except (BadMarks, BadRules, Refused) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except CommandFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m transfer.traffic", description=__doc__)
    add = parser.add_argument
    add("--network", choices=("ib", "roce", "ethernet"), required=True)
    add("--traffic", default="", metavar="JSON", help="the site's marks, as of launch.cluster")
    add("--device", default="", metavar="NAME", help="network device, such as eth0")
    add("--rdma-device", default="mlx5_0", metavar="NAME", help="RoCE: its RDMA device")
    add("--switch", choices=roce.SWITCHES, help="RoCE: lines for a switch, not the host")
    add("--port", default="", metavar="NAME", help="RoCE: the switch's port")
    add("--rate-mbit", type=float, metavar="MBIT", help="Ethernet: of the link; default: its own")
    add(
        "--match",
        default="cgroup",
        metavar="HOW",
        help="Ethernet: how senders of the low class are known: cgroup, uid:NUMBER, source:ADDRESS",
    )
    add("--receive", action="store_true", help="Ethernet: share what comes in as well")
    add(
        "--store",
        action="append",
        default=[],
        metavar="NETWORK",
        help="Ethernet: of a remote store behind this device; implies --receive",
    )
    add("--apply", action="store_true", help="Ethernet: put in force; needs root")
    add("--remove", action="store_true", help="Ethernet: undo; needs root")
    add("--replace", action="store_true", help="with --apply: in place of queues of someone else")
    return parser


def _infiniband(settings: TrafficSettings) -> str:
    return (
        "# opensm.conf (or the subnet manager's own QoS settings); restart it afterwards.\n"
        f"# engines: service level {settings.high.service_level}; agents: "
        f"{settings.low.service_level}, alone in lane {infiniband.LOW_LANE}.\n"
        + infiniband.opensm(settings)
    )


def _roce(arguments: argparse.Namespace, settings: TrafficSettings) -> str:
    port = arguments.port
    if arguments.switch and not port:
        raise BadRules("--switch needs --port, the switch's name for it")
    match arguments.switch:
        case "sonic":
            return roce.sonic(settings, port)
        case "cumulus":
            return "\n".join(roce.cumulus(settings, port))
        case "arista":
            return "\n".join(roce.arista(settings, port))
    device = _device(arguments)
    return "\n".join(
        [
            "# either, with iproute2:",
            *roce.host_dcb(settings, device),
            "# or, with NVIDIA's tools:",
            *roce.host_mlnx(settings, device, arguments.rdma_device),
        ]
    )


def _ethernet(arguments: argparse.Namespace, settings: TrafficSettings) -> int:
    device = _device(arguments)
    if arguments.remove:
        done = Host().remove(device, settings.cgroup)
        print("\n".join(f"removed: {part}" for part in done) or "nothing of ours was in force")
        return 0
    rules = _rules(arguments, settings, device)
    if not arguments.apply:
        print(ethernet.script(rules), end="")
        return 0
    Host().apply(rules, arguments.replace)
    share = settings.low_share_percent
    print(
        f"{device}: {rules.rate_mbit:g} Mbit/s, of which the low class ({rules.match}) is sure "
        f"of {share} % and gets what the high class leaves; agents are in it from their next start"
    )
    return 0


def _rules(arguments: argparse.Namespace, settings: TrafficSettings, device: str) -> EthernetRules:
    rate_mbit = arguments.rate_mbit
    if rate_mbit is None:
        found = psutil.net_if_stats().get(device)
        rate_mbit = found.speed if found is not None else 0
        if not rate_mbit:
            raise BadRules(f"{device} does not tell its rate (or is not there): give --rate-mbit")
    return make_rules(
        device, rate_mbit, settings, arguments.match, arguments.receive, tuple(arguments.store)
    )


def _device(arguments: argparse.Namespace) -> str:
    if not arguments.device:
        raise BadRules("--device: give the network device of the compute network, such as eth0")
    return str(arguments.device)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

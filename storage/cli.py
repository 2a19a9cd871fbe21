"""``python -m storage.cli``: look into a store of blocks, check it, clean it, copy it.

A store is the folder of one SSD tier's disk, or a remote URL. Exit status: 0; 1 where
something is wrong with the store; 2 where the command cannot be done, with the reason.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.console import Console

from common.sizes import parse_size
from storage.index.owners import BadSelector, Selector
from storage.tools import report
from storage.tools.bench import bench
from storage.tools.copy import copy
from storage.tools.doctor import Expectations, doctor
from storage.tools.finding import Verdict
from storage.tools.look import ls, stats
from storage.tools.stores import open_target, open_view
from storage.tools.verify import verify
from storage.tools.view import StoreUnusable, StoreView

OPTIONS_HELP = "of a remote URL, as launch.cluster's --remote-options"


class Outcome(NamedTuple):
    """Of a command."""

    result: object
    """For JSON."""
    show: Callable[[Console], None]
    """The same for people."""
    is_right: bool = True
    """Is the store all right?"""


Command = Callable[[argparse.Namespace, StoreView], Outcome]


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    view: StoreView | None = None
    try:
        view = open_view(arguments.store, arguments.options)
        outcome: Outcome = arguments.run(arguments, view)
    except (StoreUnusable, OSError) as error:
        print(f"storage.cli: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("storage.cli: cut short; the same command goes on where it can", file=sys.stderr)
        return 130
    finally:
        if view is not None:
            view.close()
    if arguments.json:
        print(json.dumps(msgspec.to_builtins(outcome.result), indent=2))
    else:
        outcome.show(Console())
    return 0 if outcome.is_right else 1


# ---- commands -------------------------------------------------------------------------


def _stats(arguments: argparse.Namespace, view: StoreView) -> Outcome:
    result = stats(view)
    return Outcome(result, lambda console: report.stats(console, result))


def _doctor(arguments: argparse.Namespace, view: StoreView) -> Outcome:
    expected = Expectations(
        arguments.namespace, arguments.expect_bytes_per_s, arguments.min_free_bytes
    )
    findings = doctor(view, expected)
    is_right = not any(finding.verdict is Verdict.BAD for finding in findings)
    return Outcome(findings, lambda console: report.findings(console, findings), is_right)


def _ls(arguments: argparse.Namespace, view: StoreView) -> Outcome:
    blocks = list(ls(view, arguments.namespace, arguments.limit))
    return Outcome(blocks, lambda console: report.blocks(console, blocks))


def _verify(arguments: argparse.Namespace, view: StoreView) -> Outcome:
    result = verify(view, arguments.namespace, arguments.resume)
    return Outcome(result, lambda console: report.verified(console, result), not result.damaged)


def _gc(arguments: argparse.Namespace, view: StoreView) -> Outcome:
    return _mapping(view.collect())


def _drop(arguments: argparse.Namespace, view: StoreView) -> Outcome:
    return _mapping(
        {"dropped": str(arguments.namespace), "outcome": view.drop(arguments.namespace)}
    )


def _copy(arguments: argparse.Namespace, view: StoreView) -> Outcome:
    options = arguments.target_options or arguments.options
    tier = open_target(arguments.target, options, arguments.capacity)
    try:
        result = copy(view, tier, arguments.namespace)
    finally:
        tier.close()
    is_right = not (result.unreadable or result.refused)
    return _mapping(msgspec.structs.asdict(result), is_right)


def _bench(arguments: argparse.Namespace, view: StoreView) -> Outcome:
    return _mapping(msgspec.structs.asdict(bench(view, arguments.seconds)))


def _mapping(result: Mapping[str, object], is_right: bool = True) -> Outcome:
    return Outcome(result, lambda console: report.mapping(console, result), is_right)


# ---- flags ----------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("storage.cli", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Command, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("store", help="folder of an SSD tier's disk, or a remote URL")
        command.add_argument(
            "--options", type=json.loads, default={}, metavar="JSON", help=OPTIONS_HELP
        )
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=run)
        return command

    def add_selector(command: argparse.ArgumentParser, required: bool = False) -> None:
        command.add_argument(
            "--namespace",
            type=_selector,
            required=required,
            metavar="FIELD:VALUE",
            help="only blocks of some owners: namespace, model, version, tenant or "
            "tenant-digest, such as version:step-12 or tenant:*",
        )

    add("stats", _stats, "what a store holds, of whom, how old, and its counters")
    command = add("doctor", _doctor, "why nothing will be read, or not fast")
    add_selector(command)
    command.add_argument("--expect-bytes-per-s", type=parse_size, default=0, metavar="SIZE")
    command.add_argument("--min-free-bytes", type=parse_size, default=1 << 30, metavar="SIZE")
    command = add("ls", _ls, "its blocks, one a line")
    add_selector(command)
    command.add_argument("--limit", type=int, default=0, help="so many at most; 0: all")
    command = add("verify", _verify, "read and check every block")
    add_selector(command)
    command.add_argument(
        "--resume", type=Path, metavar="FILE", help="notes how far it came; goes on from there"
    )
    add("gc", _gc, "give back what no start would find; not on a live store")
    command = add("drop", _drop, "drop the blocks of some owners, also on a live store")
    add_selector(command, required=True)
    command = add("copy", _copy, "copy what the target has not; may be repeated")
    command.add_argument("target", help="folder or URL")
    add_selector(command)
    command.add_argument("--target-options", type=json.loads, default={}, metavar="JSON")
    command.add_argument(
        "--capacity", type=parse_size, default=0, metavar="SIZE", help="of a target folder"
    )
    command = add("bench", _bench, "read its blocks beside a plain reader")
    command.add_argument("--seconds", type=float, default=2.0, help="of each reader")
    return parser


def _selector(text: str) -> Selector:
    try:
        return Selector.parse(text)
    except BadSelector as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""``python -m launch.top``: what a cluster is doing, in a terminal; from ``/admin/cluster``."""

from __future__ import annotations

import argparse
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from common.json import JsonObject
from common.sizes import format_size
from launch.access import NO_KEY, Access
from launch.gateway.doors.keys import read_keys
from launch.gateways import Gateways
from launch.settings import Form, secret, variable

if TYPE_CHECKING:  # which would bring all that the gateway needs
    from launch.gateway.recent_requests import EndedView
    from launch.gateway.services import GatewayView
    from scheduler.cluster_view import AgentView, EngineView

FETCH_TIMEOUT_S = 5.0
ADMIN_KEY, API_KEY = variable("admin_api_key"), variable("api_key")
BAR_CELLS = 10
ACTIVE = "active"
RECENT_ROWS = 8
RID_CHARS = 16
EXIT_UNREACHABLE = 1


class Unreachable(Exception):
    """No cluster answers there; the text says why."""


def fetch(url: str, access: Access = NO_KEY) -> GatewayView:
    """The state of the cluster whose gateway is at ``url``; raises :class:`Unreachable`."""
    address = url.rstrip("/") + "/admin/cluster"
    try:
        asked = urllib.request.Request(address, headers=access.headers)
        tls = access.tls()
        with urllib.request.urlopen(asked, timeout=FETCH_TIMEOUT_S, context=tls) as answer:
            return cast("GatewayView", msgspec.json.decode(answer.read(), type=JsonObject))
    except urllib.error.HTTPError as error:
        raise Unreachable(f"{address}: {_told(error)}") from error
    except (OSError, ValueError) as error:  # ValueError: no URL, or no JSON
        raise Unreachable(f"{address}: {error}") from error


def fetch_active(gateways: Gateways, access: Access = NO_KEY) -> GatewayView:
    """Likewise, of the active one of them; of a standby, while no active one answers."""
    views, troubles = [], []
    for url in gateways:
        try:
            view = fetch(url, access)
        except Unreachable as error:
            troubles.append(str(error))
            continue
        if view["standing"] == ACTIVE:
            gateways.answered(url)
            return view
        views.append(view)
    if not views:
        raise Unreachable("; ".join(troubles))
    return views[0]


class _Error(msgspec.Struct):
    message: str


class _Answer(msgspec.Struct):
    error: _Error


def _told(error: urllib.error.HTTPError) -> str:
    """The gateway's own words, if it has any."""
    try:
        return msgspec.json.decode(error.read(), type=_Answer).error.message
    except (OSError, msgspec.DecodeError):
        return str(error)


def _key(given: str) -> str:
    """The first of those given."""
    given = given or os.environ.get(ADMIN_KEY) or os.environ.get(API_KEY) or ""
    return secret(Form(read_keys)).parse(given)[0].key if given else ""


# ---- the picture ----------------------------------------------------------------------------


def render(view: GatewayView, before: GatewayView | None = None) -> RenderableType:
    """Tables of one state. Reads are shared out since ``before``, or since the start."""
    return Group(
        _headline(view),
        "",
        _engines(view["engines"]),
        "",
        _agents(view["agents"], before["agents"] if before else []),
        "",
        _requests(view["requests"]["recent"][:RECENT_ROWS]),
    )


def _headline(view: GatewayView) -> Text:
    requests = view["requests"]
    return Text.assemble(
        ("DualPath ", "bold"),
        "" if view["standing"] == ACTIVE else f"{view['standing']} | ",
        f"reads {view['policy']}, loads {view['load_policy']}",
        f" | requests {requests['admitted']}/{requests['admitted_max']}",
        f", {requests['queued']} queued of {requests['tenants_queued']} tenants",
        f", {requests['displaced_total']} displaced",
        f" | {view['directory_blocks']:,} blocks known",
    )


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < 2 else "right", no_wrap=True)
    return table


def _engines(engines: Sequence[EngineView]) -> Table:
    table = _table("engine", "state", "sequences", "pending", "held", "free", "prefill/s")
    for engine in sorted(engines, key=lambda e: (e["role"] != "prefill", e["name"])):
        speed = engine["prefill_tokens_per_s"]
        table.add_row(
            f"{engine['name']} ({engine['role']})",
            _state(engine),
            str(engine["load_sequences"]),
            f"{engine['load_tokens']:,}",
            f"{engine['context_tokens']:,}",
            f"{engine['free_tokens']:,}",
            f"{speed:,.0f}" if speed else "-",
        )
    return table


def _agents(agents: Sequence[AgentView], before: Sequence[AgentView]) -> Table:
    table = _table("agent", "state", "to read", "backlog", "ssd/s", "remote/s", "DRAM", "reads")
    earlier = {agent["name"]: agent["share_bytes_total"] for agent in before}
    given = {a["name"]: a["share_bytes_total"] - earlier.get(a["name"], 0) for a in agents}
    total = sum(given.values())
    for agent in sorted(agents, key=lambda a: a["name"]):
        rates, slots = agent["read_bytes_per_s"], agent["dram_slots"]
        used = 1 - agent["dram_slots_free"] / slots if slots else 0.0
        table.add_row(
            agent["name"],
            _state(agent),
            format_size(agent["backlog_bytes"]),
            f"{agent['backlog_s']:.2f} s",
            format_size(int(rates["ssd"])),
            format_size(int(rates["remote"])),
            f"{used:.0%}",
            _bar(given[agent["name"]] / total if total > 0 else 0.0),
        )
    return table


def _requests(recent: Sequence[EndedView]) -> Table:
    table = _table("request", "outcome", "engines", "prompt", "hit", "total", "ago")
    table.add_column("readers")  # the one that folds in a narrow terminal
    for ended in recent:
        table.add_row(
            ended["rid"][:RID_CHARS],
            ended["outcome"],
            f"{ended['prefill']} {ended['decode']}",
            f"{ended['prompt_tokens']:,}",
            f"{ended['hit_tokens']:,}",
            f"{ended['timings_s']['total']:.2f} s",
            f"{ended['age_s']:.0f} s",
            " ".join(f"{name}:{blocks}" for name, blocks in ended["readers"].items()),
        )
    return table


def _state(process: EngineView | AgentView) -> Text:
    if not process["alive"]:
        return Text("silent", "red")
    if process["draining"]:
        return Text("drained" if process["idle"] else "draining", "yellow")
    return Text("idle", "dim") if process["idle"] else Text("busy", "green")


def _bar(share: float) -> Text:
    filled = round(share * BAR_CELLS)
    return Text.assemble(("█" * filled, "cyan"), "░" * (BAR_CELLS - filled), f" {share:4.0%}")


# ---- the program ----------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.top", description=__doc__)
    parser.add_argument(
        "--url",
        metavar="URLS",
        default="http://127.0.0.1:30000",
        help="the gateway, or several, comma-separated",
    )
    parser.add_argument("--interval-s", type=float, default=1.0, help="between two looks")
    parser.add_argument("--once", action="store_true", help="print one state and end")
    parser.add_argument(
        "--api-key",
        metavar="KEY|@FILE",
        default="",
        help=f"an operator's key; also from {ADMIN_KEY} or {API_KEY} of the environment",
    )
    parser.add_argument(
        "--ssl-ca-certs", default="", metavar="PATH", help="CA certificates (PEM) of the gateway"
    )
    arguments = parser.parse_args(argv)
    console = Console()
    try:
        access = Access(_key(arguments.api_key), arguments.ssl_ca_certs)
        look = partial(fetch_active, Gateways(arguments.url.split(",")), access)
        if arguments.once:
            console.print(render(look()))
        else:
            _follow(console, look, arguments.interval_s)
    except (Unreachable, ValueError, OSError) as error:  # the last two: of the key, the CA's file
        console.print(f"no cluster: {error}", style="red", highlight=False)
        return EXIT_UNREACHABLE
    except KeyboardInterrupt:
        pass
    return 0


def _follow(console: Console, look: Callable[[], GatewayView], interval_s: float) -> None:
    """Until interrupted; a gateway that restarts is waited for."""
    view = look()
    with Live(render(view), console=console, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval_s)
            try:
                before, view = view, look()
            except Unreachable as error:
                live.update(Text(f"no answer: {error}", "red"), refresh=True)
                continue
            live.update(render(view, before), refresh=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

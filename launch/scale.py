"""``python -m launch.scale``: more or fewer nodes of a cluster that Ray has started.

Exit codes: 0 once they are started, or have drained and ended; 1 when that takes too long; 2 for
what cannot be (the reason is one sentence on stderr).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from launch.flags.ray import RayAddress, check_installed
from launch.ray.orders import Answer, Order, Outcome
from launch.ray.profile import read_pools
from launch.settings import (
    SECONDS,
    BadConfig,
    help_markdown,
    load_file,
    load_settings,
    make_parser,
    require,
    setting,
    text,
)

ASK_S = 0.5
UNTAKEN_S = 15.0
"""An order that no driver has taken for so long is said to wait."""
NUMBER = text("N|+N|-N")


@dataclass(frozen=True)
class ScaleSettings(RayAddress):
    """What is wanted."""

    prefill: str = setting("", "Prefill engines, or so many more or fewer.", NUMBER)
    decode: str = setting("", "Decode engines, likewise.", NUMBER)
    reader: str = setting("", "Readers, likewise.", NUMBER)
    pool: str = setting(
        "", "A pool of another name, such as wide=+1, or several, comma-separated.", text("LIST")
    )
    hosts: str = setting(
        "", "File of pools that the cluster is to be like from now on.", text("FILE")
    )
    timeout_s: float = setting(
        900.0, "So long the command waits until it is done, which it is without it, too.", SECONDS
    )

    def order(self) -> Order:
        """Raises :class:`BadConfig`."""
        roles = {"prefill": self.prefill, "decode": self.decode, "reader": self.reader}
        changes = {role: amount for role, amount in roles.items() if amount}
        for each in filter(None, self.pool.split(",")):
            pool, equals, amount = each.partition("=")
            require(bool(equals), f"--pool {each}: give a pool and a number, such as wide=+1.")
            changes[pool.strip()] = amount.strip()
        require(bool(changes or self.hosts), "nothing is asked for: give --decode +1, or --hosts.")
        if not self.hosts:
            return Order(changes)
        sections = load_file(Path(self.hosts).expanduser(), "--hosts")
        read_pools(sections, f"--hosts {self.hosts}").scaled(changes)
        return msgspec.convert({"changes": changes, "profile": sections}, Order)


def main(argv: Sequence[str]) -> int:
    """Order it, and wait; returns the exit code."""
    if "--help-markdown" in argv:
        print(help_markdown(ScaleSettings))
        return 0
    parser = make_parser(
        ScaleSettings, "python -m launch.scale", "More or fewer nodes, where Ray starts them."
    )
    try:
        settings = load_settings(ScaleSettings, parser, argv)
        return _ordered(settings, settings.order())
    except BadConfig as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _ordered(settings: ScaleSettings, order: Order) -> int:
    check_installed()
    from launch.ray.places import Orders, connect  # takes a second, and needs the extra `ray`

    connect(settings.ray_address)
    orders, began = Orders(), time.monotonic()
    number = orders.order(msgspec.json.encode(order), settings.timeout_s)
    require(number > 0, "too many orders wait for the driver: is `launch.cluster --ray` running?")
    said = ""
    while (waited_s := time.monotonic() - began) < settings.timeout_s:
        encoded = orders.answer(number)
        answer = msgspec.json.decode(encoded, type=Answer) if encoded else None
        if answer is not None and answer.outcome is Outcome.REFUSED:
            raise BadConfig(answer.text)
        if answer is not None and answer.text != said:
            print(f"{answer.outcome.value}: {answer.text}", flush=True)
            said = answer.text
        if answer is not None and answer.outcome is Outcome.DONE:
            return 0
        if answer is None and not said and waited_s > UNTAKEN_S:
            said = "waits for a driver: is `launch.cluster --ray` running?"
            print(said, file=sys.stderr)
        time.sleep(ASK_S)
    print("error: not done in time; the driver goes on with it, if one runs", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""When a standby takes over, on a clock that the test turns."""

from __future__ import annotations

import pytest

from common.cluster.membership import EXPIRY_S
from launch.gateway.standby.copy import Copy
from launch.gateway.standby.leadership import Standing
from launch.gateway.standby.watch import TAKEOVER_S, Peers, Watch

OWN, LESS, MORE = "m" * 32, "a" * 32, "z" * 32
NOBODY_KNOWN = Peers(0, 0, 0)


def other(standing: Standing, session: str = MORE, term: int = 7) -> Copy:
    return Copy(session, standing, term)


def followed(now: float = 100.0) -> Watch:
    """The watch of a standby that has heard the active gateway a moment ago."""
    watch = Watch(OWN, now)
    leader = other(Standing.ACTIVE)
    assert watch.heard([leader], now) is leader and not watch.is_silent()
    return watch


def test_silence_is_counted_from_the_first_question_without_an_answer() -> None:
    watch = followed(100.0)
    now = 5000.0  # this gateway itself was suspended meanwhile
    assert watch.heard([], now) is None and watch.is_silent()
    assert not watch.is_due([], now, NOBODY_KNOWN)
    assert not watch.is_due([], now + TAKEOVER_S - 0.01, NOBODY_KNOWN)
    assert watch.heard([], now + 1) is None
    assert watch.is_due([], now + TAKEOVER_S, NOBODY_KNOWN)
    watch.heard([other(Standing.ACTIVE)], now + TAKEOVER_S)
    assert not watch.is_due([], now + 2 * TAKEOVER_S, NOBODY_KNOWN)


@pytest.mark.parametrize(
    ("rival", "is_due"),
    [
        (other(Standing.STANDBY, MORE, term=7), False),
        (other(Standing.STANDBY, LESS, term=7), True),
        (other(Standing.STANDBY, LESS, term=8), False),  # it knows more
        (other(Standing.STANDBY, MORE, term=0), True),  # it has just begun
        (other(Standing.SUPERSEDED, MORE, term=9), True),
    ],
)
def test_of_several_standbys_one_takes_over(rival: Copy, is_due: bool) -> None:
    watch = followed(100.0)
    watch.heard([rival], 101.0)
    assert watch.is_due([rival], 101.0 + TAKEOVER_S, NOBODY_KNOWN) is is_due


@pytest.mark.parametrize(
    ("peers", "is_due"),
    [
        (Peers(known=4, heard=4, led=0), True),
        (Peers(known=4, heard=4, led=2), True),
        (Peers(known=4, heard=4, led=3), False),  # the active one serves
        (Peers(known=4, heard=1, led=0), True),
        (Peers(known=4, heard=0, led=0), False),  # this one may be cut off
        (NOBODY_KNOWN, True),
    ],
)
def test_those_that_are_served_have_a_say(peers: Peers, is_due: bool) -> None:
    watch = followed(100.0)
    watch.heard([], 101.0)
    assert watch.is_due([], 101.0 + TAKEOVER_S, peers) is is_due


def test_one_that_hears_nobody_takes_over_when_a_node_comes_to_it() -> None:
    watch, silent = followed(100.0), Peers(known=4, heard=0, led=0)
    watch.heard([], 101.0)
    watch.asked_s = 200.0
    assert watch.is_due([], 200.0 + EXPIRY_S - 0.1, silent)
    assert not watch.is_due([], 200.0 + EXPIRY_S, silent)

"""Keys that are made of the cluster's secret."""

from __future__ import annotations

from transfer.control.keys import Keys, derived

SECRET = "0" * 32


def test_derived_keys_are_equal_on_all_hosts_and_say_nothing_of_one_another():
    assert derived(SECRET, "join") == derived(SECRET, "join")
    others = {derived(SECRET, "engine-http"), derived("1" * 32, "join")}
    assert derived(SECRET, "join") not in others
    assert Keys("join", SECRET).private.decode() not in derived(SECRET, "join")

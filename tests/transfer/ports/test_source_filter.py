"""A process that listens on every address is heard from its cluster's hosts alone."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from transfer.ports.member_hosts import MemberHosts
from transfer.ports.source_filter import (
    LOOPBACK,
    CannotFilter,
    admit_only,
    admitted,
    filter_of,
    parse,
    program,
)


@pytest.fixture(params=["0.0.0.0", "::"])
def listener(request) -> Iterator[socket.socket]:
    """As Mooncake and torch have them: on every address, of IPv4 or of both."""
    family = socket.AF_INET if request.param == "0.0.0.0" else socket.AF_INET6
    with socket.socket(family) as server:
        if family == socket.AF_INET6:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        server.bind((request.param, 0))
        server.listen()
        yield server


def is_heard(listener: socket.socket, source: str) -> bool:
    """Whether a connection from an address of the loopback (all of 127.0.0.0/8 are) comes about
    and carries bytes."""
    port = listener.getsockname()[1]
    with socket.socket(socket.AF_INET6 if ":" in source else socket.AF_INET) as client:
        client.settimeout(0.2)
        client.bind((source, 0))
        try:
            client.connect(("::1" if ":" in source else "127.0.0.1", port))
        except TimeoutError:
            return False
        with listener.accept()[0] as accepted:
            client.sendall(b"word")
            accepted.settimeout(0.3)
            return accepted.recv(4) == b"word"


@pytest.mark.parametrize(
    ("networks", "heard", "unheard"),
    [
        (LOOPBACK, ["127.0.0.1", "127.1.2.3", "::1"], []),
        (["127.0.0.2", "127.7.0.0/16"], ["127.0.0.2", "127.7.255.1"], ["127.0.0.3", "127.8.0.1"]),
        (["10.0.0.0/8", "::/0"], ["::1"], ["127.0.0.1"]),
        (["0.0.0.0/0", "fd00::/64", "2001:db8::7"], ["127.0.0.1"], ["::1"]),
    ],
)
def test_packets_are_taken_by_where_they_come_from(listener, networks, heard, unheard):
    if listener.family == socket.AF_INET:
        heard, unheard = ([s for s in each if ":" not in s] for each in (heard, unheard))
    admit_only(networks)
    assert filter_of(listener) == program(parse(networks))
    assert set(admitted(filter_of(listener))) == set(parse(networks))
    assert [source for source in heard + unheard if is_heard(listener, source)] == heard


def test_what_was_accepted_before_is_filtered_too(listener):
    with socket.create_connection(("127.0.0.1", listener.getsockname()[1])) as client:
        with listener.accept()[0] as accepted:
            admit_only(["10.0.0.0/8"])
            client.sendall(b"word")
            accepted.settimeout(0.3)
            with pytest.raises(TimeoutError):
                accepted.recv(4)


def test_ports_of_the_loopback_and_of_a_process_that_is_open_to_all_are_left_alone(listener):
    with socket.create_server(("127.0.0.1", 0)) as local:
        admit_only([])
        assert filter_of(listener) == filter_of(local) == b""
        admit_only(["10.0.0.0/8"])
        assert filter_of(local) == b"" != filter_of(listener)


def test_hosts_of_members_are_heard_while_they_are_members(listener):
    if listener.family == socket.AF_INET6:
        pytest.skip("alike")
    hosts = MemberHosts(["10.0.0.0/8"])
    admit_only(["10.0.0.0/8"])
    hosts.meet(["127.0.0.2", "10.1.2.3"], are_all=False)
    assert [str(n) for n in admitted(filter_of(listener))] == ["10.0.0.0/8", "127.0.0.2/32"]
    assert is_heard(listener, "127.0.0.2") and not is_heard(listener, "127.0.0.3")
    hosts.meet(["127.0.0.3"], are_all=False)
    assert is_heard(listener, "127.0.0.2") and is_heard(listener, "127.0.0.3")
    hosts.meet(["127.0.0.3"], are_all=True)
    assert is_heard(listener, "127.0.0.3") and not is_heard(listener, "127.0.0.2")
    hosts.meet(["127.0.0.2"] + [f"11.0.{n // 256}.{n % 256}" for n in range(1500)], are_all=True)
    assert is_heard(listener, "127.0.0.3"), "too many: all stays as it was"


def test_a_port_that_was_opened_for_everyone_stays_open(listener):
    """The control port: the gateway is no member."""
    admit_only(["10.0.0.0/8"])
    with socket.create_server(("0.0.0.0", 0)) as control:
        MemberHosts(["10.0.0.0/8"]).meet(["127.0.0.2"], are_all=True)
        assert filter_of(control) == b"" and is_heard(control, "127.0.0.1")
    assert is_heard(listener, "127.0.0.2")


def test_who_hears_everyone_goes_on_to(listener):
    MemberHosts([]).meet(["127.0.0.2"], are_all=True)
    assert filter_of(listener) == b""


def test_a_filter_of_somebody_else_is_not_taken_for_ours():
    good = program(parse(["127.0.0.2", "fd00::/64"]))
    for code in (b"", good[:8], good[:-8], good[8:], bytes(64)):
        with pytest.raises(ValueError, match="filter of ours"):
            admitted(code)


def test_too_many_networks_are_refused():
    with pytest.raises(CannotFilter, match="too many"):
        program(parse(f"10.0.{n // 256}.{n % 256}" for n in range(1500)))

"""Printed rules for InfiniBand and RoCE, parsed as their readers would."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from transfer.traffic import __main__ as command
from transfer.traffic import roce
from transfer.traffic.classes import CONTROL_DSCP, Marks, TrafficSettings
from transfer.traffic.infiniband import opensm

SITE = TrafficSettings()
OTHER = TrafficSettings(high=Marks(5, 34), low=Marks(7, 40), low_share_percent=3)
BOTH = pytest.mark.parametrize("settings", [SITE, OTHER])


def table(text: str) -> dict[int, int]:
    """``0:192,1:4`` or ``0:192 1:4``."""
    return {int(a): int(b) for a, b in (pair.split(":") for pair in re.split("[, ]", text))}


# ---- InfiniBand -------------------------------------------------------------------------------


def options_of(text: str) -> dict[str, str]:
    return dict(line.split(" ", 1) for line in text.splitlines() if not line.startswith("#"))


def test_the_papers_table_is_the_default():
    options = options_of(opensm(SITE))
    assert options["qos"] == "TRUE"
    assert (options["qos_max_vls"], options["qos_high_limit"]) == ("4", "240")
    assert table(options["qos_vlarb_high"]) == {0: 192, 1: 192, 2: 0, 3: 192}
    assert table(options["qos_vlarb_low"]) == {0: 192, 1: 192, 2: 64, 3: 192}


@BOTH
def test_the_low_service_level_alone_has_the_low_lane(settings):
    lanes = [int(lane) for lane in options_of(opensm(settings))["qos_sl2vl"].split(",")]
    assert len(lanes) == 16 and set(lanes) <= {0, 1, 2, 3}
    assert [level for level, lane in enumerate(lanes) if lane == 2] == [settings.low.service_level]
    assert lanes[settings.high.service_level] == 1


# ---- RoCE, host -------------------------------------------------------------------------------


def words_of(line: str) -> dict[str, list[str]]:
    """Option -> its values, of dcb and mlnx_qos alike."""
    found: dict[str, list[str]] = {}
    option = ""
    for word in shlex.split(line):
        if re.fullmatch("--?[a-z].*|dev|[a-z]+-[a-z]+", word) and ":" not in word:
            option = word
            found[option] = []
        elif option:
            found[option].append(word)
    return found


@BOTH
def test_dcb_gives_each_class_a_lossless_queue(settings):
    app, pfc, ets = map(words_of, roce.host_dcb(settings, "eth0"))
    assert app["dev"] == pfc["dev"] == ets["dev"] == ["eth0"]
    high, low = settings.high, settings.low
    assert table(" ".join(app["dscp-prio"])) == {high.dscp: high.dscp // 8, low.dscp: low.dscp // 8}
    assert pfc["prio-pfc"][0] == "all:off"
    assert {word for word in pfc["prio-pfc"][1:]} == {f"{high.priority}:on", f"{low.priority}:on"}
    queues = table(" ".join(ets["prio-tc"]))
    assert len({queues[high.priority], queues[low.priority], queues[CONTROL_DSCP // 8]}) == 3
    assert ets["tc-bw"][0] == "all:0"
    shares = table(" ".join(ets["tc-bw"][1:]))
    assert sum(shares.values()) == 100
    assert shares[queues[low.priority]] == settings.low_share_percent
    assert shares[queues[high.priority]] > 80


@BOTH
def test_mlnx_qos_says_the_same_as_dcb(settings):
    *_, ets = map(words_of, roce.host_dcb(settings, "eth0"))
    lines = roce.host_mlnx(settings, "eth0", "mlx5_3")
    options: dict[str, list[str]] = {}
    for line in lines[:-1]:
        for name, values in words_of(line).items():
            options.setdefault(name, []).extend(values)
    assert set(options["-i"]) == {"eth0"} and options["--trust"] == ["dscp"]
    mapped = [tuple(map(int, value.split(",")[1:])) for value in options["--dscp2prio"]]
    assert mapped == [(m.dscp, m.priority) for m in (settings.high, settings.low)]
    [pfc] = options["--pfc"]
    on = [priority for priority, flag in enumerate(pfc.split(",")) if flag == "1"]
    assert on == sorted((settings.high.priority, settings.low.priority))
    [queues], [shares] = options["--prio_tc"], options["--tcbw"]
    assert dict(enumerate(map(int, queues.split(",")))) == table(" ".join(ets["prio-tc"]))
    assert sum(map(int, shares.split(","))) == 100
    marks = words_of(lines[-1])
    assert marks == {"-d": ["mlx5_3"], "-t": [str(settings.high.traffic_class)]}


# ---- RoCE, switches ---------------------------------------------------------------------------


def by_switch(settings: TrafficSettings) -> dict[str, tuple[dict[int, int], set[int], int]]:
    """Switch -> DSCP to priority, priorities with flow control, the low class's percent."""
    low = settings.low.priority
    tables = json.loads(roce.sonic(settings, "Ethernet0"))
    port = tables["PORT_QOS_MAP"]["Ethernet0"]
    classes = tables["DSCP_TO_TC_MAP"][port["dscp_to_tc_map"]]
    scheduler = tables["QUEUE"][f"Ethernet0|{low}"]["scheduler"]
    sonic = (
        {int(dscp): int(found) for dscp, found in classes.items() if found != "0"},
        set(map(int, port["pfc_enable"].split(","))),
        int(tables["SCHEDULER"][scheduler]["weight"]),
    )
    nvue = "\n".join(roce.cumulus(settings, "swp1"))
    eos = "\n".join(roce.arista(settings, "Ethernet1"))
    return {
        "sonic": sonic,
        "cumulus": (
            pairs(r"dscp (\d+) switch-priority (\d+)", nvue),
            set(map(int, re.findall(r"qos pfc \w+ switch-priority (\d+)", nvue))),
            pairs(r"traffic-class (\d+) bw-percent (\d+)", nvue)[low],
        ),
        "arista": (
            pairs(r"qos map dscp (\d+) to traffic-class (\d+)", eos),
            set(map(int, re.findall(r"priority-flow-control priority (\d+) no-drop", eos))),
            pairs(r"tx-queue (\d+)\n\s+no priority\n\s+bandwidth percent (\d+)", eos)[low],
        ),
    }


def pairs(pattern: str, text: str) -> dict[int, int]:
    return {int(a): int(b) for a, b in re.findall(pattern, text)}


@BOTH
@pytest.mark.parametrize("switch", roce.SWITCHES)
def test_switches_know_both_classes_and_hold_low_to_its_share(settings, switch):
    dscp, lossless, low_percent = by_switch(settings)[switch]
    marks = (settings.high, settings.low)
    assert dscp == {mark.dscp: mark.priority for mark in marks}
    assert lossless == {mark.priority for mark in marks}
    assert low_percent == settings.low_share_percent


def test_a_sonic_port_names_tables_that_exist():
    tables = json.loads(roce.sonic(SITE, "Ethernet0"))
    maps = tables["PORT_QOS_MAP"]["Ethernet0"]
    for key, of in (
        ("dscp_to_tc_map", "DSCP_TO_TC_MAP"),
        ("tc_to_pg_map", "TC_TO_PRIORITY_GROUP_MAP"),
        ("tc_to_queue_map", "TC_TO_QUEUE_MAP"),
        ("pfc_to_queue_map", "MAP_PFC_PRIORITY_TO_QUEUE"),
    ):
        assert maps[key] in tables[of]
    assert {queue["scheduler"] for queue in tables["QUEUE"].values()} == set(tables["SCHEDULER"])


# ---- the command ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--network ib", "qos_high_limit 240"),
        ("--network roce --device eth0", "dcb pfc set dev eth0"),
        ("--network roce --switch arista --port Ethernet1", "service-profile"),
        ("--network ethernet --device eth0 --rate-mbit 25000", "24750mbit"),
    ],
)
def test_rules_are_printed(capsys, line, words):
    assert command.main(line.split()) == 0
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--network ethernet", "--device"),
        ("--network ethernet --device eth0", "--rate-mbit"),
        ("--network ethernet --device eth0 --rate-mbit 10 --match port:1", "uid:NUMBER"),
        ("--network ib --apply", "run what is printed"),
        ("--network roce --switch sonic", "--port"),
        ("--network ib --traffic {", "traffic settings"),
    ],
)
def test_what_cannot_be_printed_is_said(capsys, monkeypatch, line, words):
    monkeypatch.setattr(command.psutil, "net_if_stats", dict)
    assert command.main(line.split()) == 2
    assert words in capsys.readouterr().err


def test_applying_takes_root(capsys, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    line = "--network ethernet --device eth0 --rate-mbit 10 --apply"
    assert command.main(line.split()) == 2
    assert "run this as root" in capsys.readouterr().err

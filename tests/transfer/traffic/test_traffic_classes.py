import msgspec
import pytest

from transfer.traffic.classes import (
    CLASS_OF_KIND,
    CONTROL_DSCP,
    BadMarks,
    TrafficClass,
    TrafficSettings,
    rdma_env,
    read_settings,
)

SITE = TrafficSettings()


def test_agents_are_low_and_all_others_high():
    low = {kind for kind, found in CLASS_OF_KIND.items() if found is TrafficClass.LOW}
    assert low == {"agent"}


def test_mooncake_is_told_the_class_of_its_process():
    assert rdma_env("agent", SITE, {}) == {"MC_IB_SL": "2", "MC_IB_TC": "32"}
    engine = rdma_env("engine", SITE, {})
    assert (engine["MC_IB_SL"], engine["MC_IB_TC"]) == ("1", "104")


def test_collectives_of_an_engine_are_in_its_class_unless_the_operator_says_otherwise():
    engine = rdma_env("engine", SITE, {"NCCL_IB_TC": "106"})
    assert "NCCL_IB_SL" not in engine and "NCCL_IB_TC" not in engine
    assert engine["NVSHMEM_IB_SL"] == "1" and engine["NVSHMEM_IB_TRAFFIC_CLASS"] == "104"
    assert not [name for name in rdma_env("agent", SITE, {}) if "NCCL" in name]


@pytest.mark.parametrize("name", ["MC_IB_SL", "MC_IB_TC"])
def test_one_mark_for_all_processes_is_refused(name):
    with pytest.raises(BadMarks, match=f"{name}.*--traffic"):
        rdma_env("engine", SITE, {name: "3"})


def test_a_site_names_only_what_differs():
    settings = read_settings('{"low": {"service_level": 4, "dscp": 10}}')
    assert settings.low.service_level == 4 and settings.low.traffic_class == 40
    assert settings.high == SITE.high
    assert read_settings("") == SITE
    assert read_settings(msgspec.json.encode(settings).decode()) == settings


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "traffic settings"),
        ('{"middle": {}}', "middle"),
        ('{"low": {"service_level": 1, "dscp": 8}}', "one service_level"),
        ('{"low": {"service_level": 2, "dscp": 24}}', "one priority"),
        ('{"low": {"service_level": 15, "dscp": 8}}', "0 to 14"),
        ('{"low": {"service_level": 2, "dscp": 64}}', "0 to 63"),
        (f'{{"low": {{"service_level": 2, "dscp": {CONTROL_DSCP + 2}}}}}', "control"),
        ('{"low": {"service_level": 0, "dscp": 8}}', "unmarked"),
        ('{"low_share_percent": 0}', "1 to 50"),
        ('{"cgroup": "../all"}', "dualpath-low"),
        ('{"cgroup": "/all"}', "dualpath-low"),
    ],
)
def test_marks_that_cannot_work_are_refused(text, words):
    with pytest.raises(BadMarks, match=words):
        read_settings(text)

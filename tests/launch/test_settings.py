"""What is written becomes a value once, and that value reaches the process that it is for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import pytest

from common.process_settings import SECRETS
from common.sizes import parse_size
from engine.config import EngineConfig
from launch.cluster.config import ClusterConfig, load_config, make_parser
from launch.cluster.hardware import Hardware
from launch.cluster.processes import process_records
from launch.gateway.config import GatewayConfig
from launch.settings import BadConfig, flags_of, load_settings, secrets_of, settings_of
from scheduler.options import SchedulerOptions
from storage.index.owners import read_quotas
from storage.remote.settings import RemoteSettings
from transfer.agent.config import AgentConfig
from transfer.traffic.classes import Marks, TrafficSettings

CERTIFICATE = Path(__file__)
"""Any file that is there."""
WRITTEN = {
    "rdma-devices": "mlx5_0,mlx5_1",
    "traffic": '{"low": {"service_level": 4, "dscp": 10}}',
    "kv-pace": "200MB",
    "nic-bytes-per-s": "3GB",
    "dram-bytes": "1234567",
    "ssd-dir": "/disks/a,/disks/b",
    "ssd-bytes": "2TiB",
    "ssd-min-free-bytes": "0",
    "ssd-quotas": "tenant:*=20GiB,version:step-1=5GB",
    "write-policy": "reused",
    "promotion-policy": "never",
    "remote": "memory://kv",
    "remote-options": '{"a": [1, null], "secret": "hush-1"}',
    "api-key": '{"alice": ["hush-2", "hush-3"], "bob": "hush-4"}',
    "admin-api-key": "hush-5",
    "allowed-hosts": "kv.example",
    "allowed-origins": "https://chat.example",
    "ssl-certfile": str(CERTIFICATE),
    "ssl-keyfile": str(CERTIFICATE),
    "ssl-ca-certs": str(CERTIFICATE),
    "ssl-keyfile-password": "hush-6",
    "remote-bytes": "1.5TB",
    "remote-ttl-s": "60",
    "remote-hedge-s": "0.2",
    "path-policy": "split",
    "load-policy": "never",
    "alpha-bytes": "3MiB",
    "beta-tokens": "500",
    "prefill-quota-ms": "250",
    "prefill-layer-window": "4",
    "engine-args": "--tp-size 2 --x 'a b'",
    "max-total-tokens": "4096",
    "requests-max": "7",
    "body-bytes-max": "1MiB",
    "json-depth-max": "8",
    "choices-max": "9",
    "stop-strings-max": "10",
    "tools-max": "11",
    "logprobs-max": "12",
    "grammar-bytes-max": "13KiB",
    "read-timeout-s": "3",
    "deliver-timeout-s": "4",
    "request-timeout-s": "5",
    "engine-wait-s": "6",
    "otlp-traces-endpoint": "collector:4317",
    "client-stall-s": "7",
}
CONFIG = load_config(
    [
        *("--poison-kv", "--share-cache", "--stop-regex"),
        *(f"--{name}={value}" for name, value in WRITTEN.items()),
    ]
)


def test_fields_hold_values():
    assert CONFIG.traffic == TrafficSettings(low=Marks(service_level=4, dscp=10))
    assert (CONFIG.kv_pace, CONFIG.prefill_layer_window, CONFIG.prefill_quota_ms) == (2e8, 4, 250)
    assert CONFIG.ssd_dir == (Path("/disks/a"), Path("/disks/b"))
    assert CONFIG.ssd_quotas == tuple(read_quotas("tenant:*=20GiB,version:step-1=5GB"))
    assert [key.tenant for key in CONFIG.api_key] == ["alice", "alice", "bob"]
    assert CONFIG.engine_args == ("--tp-size", "2", "--x", "a b")


def test_the_flags_of_a_config_give_it_again():
    flags, secrets = flags_of(CONFIG, ClusterConfig), secrets_of(CONFIG, ClusterConfig)
    assert not any("hush" in word for word in flags)
    parser = make_parser()
    assert load_settings(ClusterConfig, parser, flags, secrets) == CONFIG
    assert secrets == {}, "secrets are taken out of the environment"
    assert flags_of(ClusterConfig(), ClusterConfig) == []
    for name, declared in settings_of(ClusterConfig).items():
        if not declared.is_switch:
            again = declared.form.parse(declared.form.text(getattr(CONFIG, name)))
            assert again == getattr(CONFIG, name), name


def test_each_process_is_told_what_was_asked_for(tmp_path):
    # CONFIG's windows and quotas are of prefill engines: so p0.
    records = process_records(CONFIG, Path("/models/tiny"), Hardware("cpu", "tcp", "test"))
    env = {record.name: {**record.env, SECRETS: str(tmp_path / record.name)} for record in records}
    for record in records:
        (tmp_path / record.name).write_bytes(record.secrets or b"{}")
    agent, engine = AgentConfig.from_env(env["agent-p0"]), EngineConfig.from_env(env["p0"])
    gateway = GatewayConfig.from_env(env["gateway"])
    of_gateway = (gateway.scheduler, gateway.limits, gateway.doors, gateway.keys)
    told = (agent, agent.remote, engine, gateway, *of_gateway)
    by_struct: dict[type[msgspec.Struct], msgspec.Struct] = {type(s): s for s in told}
    owned = {name: s for name, s in settings_of(ClusterConfig).items() if s.owner is not None}
    assert {s.owner[0] for s in owned.values() if s.owner} == by_struct.keys()
    for name, declared in owned.items():
        assert declared.owner is not None
        struct, field = declared.owner
        assert getattr(by_struct[struct], field) == getattr(CONFIG, name) != declared.default, name
    assert (engine.layer_window, engine.prefill_quota_s) == (4, 0.25)


def test_secrets_are_read_from_where_no_other_user_looks(tmp_path, caplog):
    file, parser = tmp_path / "keys", make_parser()
    file.write_text("# rotated in May\nalice: hush-1\nhush-2\n")
    argv = [f"--api-key=@{file}", "--remote=memory://kv"]
    environ = {"DUALPATH_REMOTE_OPTIONS": '{"secret": "hush-3"}', "OTHER": "x"}
    config = load_settings(ClusterConfig, parser, argv, environ)
    assert [key.key for key in config.api_key] == ["hush-1", "hush-2"]
    assert config.api_key[0].tenant == "alice" and "hush" not in config.api_key[1].tenant
    assert config.remote_options == {"secret": "hush-3"}
    assert environ == {"OTHER": "x"} and not caplog.records
    load_settings(ClusterConfig, parser, ["--admin-api-key=hush-4"], {})
    assert "--admin-api-key" in caplog.text and "hush" not in caplog.text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--api-key=@/no/such"], "cannot read"),
        (["--api-key=hush hush"], "ASCII"),
        (["--api-key="], "there is no key in it"),
        (["--api-key={}"], "there is no key in it"),
        (["--admin-api-key=# hush"], "there is no key in it"),
        (["--api-key=hush\nhush"], "the same"),
        (['--api-key={"a": 1}'], "quotes"),
        (["--remote-options=hush"], "JSON"),
        (["--ssl-certfile", __file__], "both"),
        (["--ssl-ca-certs=/no/such"], "is there"),
        (["--engine-args=--api-key hush"], "engines' flags"),
        (["--remote=ftp://me:hush@host/kv"], "--remote-options"),
    ],
)
def test_wrong_secrets_are_not_shown(argv, words):
    with pytest.raises(BadConfig, match=words) as error:
        load_config(argv)
    assert "hush" not in str(error.value)


def test_a_default_stands_in_the_struct_that_has_the_setting():
    config = ClusterConfig()
    for name, (struct, field) in {
        "remote_hedge_s": (RemoteSettings(), "hedge_after_s"),
        "beta_tokens": (SchedulerOptions(), "beta_tokens"),
    }.items():
        assert getattr(config, name) == getattr(struct, field)
    assert config.dram_bytes == parse_size("1GiB") and config.ssd_bytes == parse_size("8GiB")
    assert dataclasses.replace(config, remote="s3://kv").remote_options == {}

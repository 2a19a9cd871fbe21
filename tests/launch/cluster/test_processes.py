import json
from dataclasses import replace
from pathlib import Path

import pytest

from engine.config import EngineConfig
from launch.cluster.config import ClusterConfig
from launch.cluster.hardware import Hardware, choose_transfer
from launch.cluster.layout import Layout, places_of
from launch.cluster.ports import respawn
from launch.cluster.process_record import ProcessRecord
from launch.cluster.processes import process_records
from launch.gateway.config import GatewayConfig
from launch.settings import BadConfig
from transfer.agent.config import AgentConfig

CPU = Hardware("cpu", "tcp", "test")
MODEL = Path("/models/tiny")


def records_of(config: ClusterConfig, **more) -> dict[str, ProcessRecord]:
    return {record.name: record for record in process_records(config, MODEL, CPU, **more)}


def words(flags: str) -> tuple[str, ...]:
    return tuple(flags.split())


def settings_of(monkeypatch, record: ProcessRecord, variable: str, kind):
    assert kind.VARIABLE == variable
    return kind.from_env(record.env)


def flag_value(record: ProcessRecord, flag: str) -> str:
    """What argparse would take: the last one."""
    return record.argv[len(record.argv) - 1 - record.argv[::-1].index(flag) + 1]


def test_each_engine_gets_an_agent_and_there_is_one_gateway():
    records = records_of(ClusterConfig(prefill=2, decode=3))
    engines = ["p0", "p1", "d0", "d1", "d2"]
    assert list(records) == [*(f"agent-{name}" for name in engines), *engines, "gateway"]


@pytest.mark.parametrize("engine_args", ["", "--tp 8"])
def test_no_port_is_used_twice(engine_args):
    records = records_of(
        ClusterConfig(prefill=3, decode=4, decode_args=words(engine_args))
    ).values()
    ports: list[int] = [port for record in records for port in record.ports.values()]
    for record in records:
        ports += mooncake_ports(record)
        for restart in range(1, 8):
            again = respawn(record, restart)
            ports += mooncake_ports(again) if restart < 4 else []
            ports += [again.ports["bootstrap"]] if "bootstrap" in again.ports else []
    assert len(ports) == len(set(ports))


def mooncake_ports(record: ProcessRecord) -> range:
    if "MC_MIN_RPC_PORT" not in record.env:
        return range(0)
    return range(int(record.env["MC_MIN_RPC_PORT"]), int(record.env["MC_MAX_RPC_PORT"]) + 1)


def test_every_process_is_told_the_same_addresses(monkeypatch):
    records = records_of(ClusterConfig(prefill=1, decode=2))
    gateway = settings_of(monkeypatch, records["gateway"], "DUALPATH_GATEWAY", GatewayConfig)
    for address in gateway.engines:
        record = records[address.name]
        engine = settings_of(monkeypatch, record, "DUALPATH_ENGINE", EngineConfig)
        agent = settings_of(monkeypatch, records[address.agent], "DUALPATH_AGENT", AgentConfig)
        assert (engine.name, engine.role, engine.agent) == (address.name, address.role, agent.name)
        assert engine.agents == gateway.agents
        assert engine.agents[agent.name] == agent.control == records[agent.name].alive.target
        assert engine.controls == [address.control] == [record.alive.target]
        assert address.http == f"http://127.0.0.1:{flag_value(record, '--port')}"
        assert flag_value(record, "--disaggregation-mode") == address.role


def test_agents_share_nothing_on_disk(monkeypatch, tmp_path):
    disks = [tmp_path / "a", tmp_path / "b"]
    records = records_of(ClusterConfig(prefill=1, decode=1, ssd_dir=tuple(disks)))
    for name in ("agent-p0", "agent-d0"):
        settings = settings_of(monkeypatch, records[name], "DUALPATH_AGENT", AgentConfig)
        assert settings.ssd_dirs == [str(disk / name) for disk in disks]


def test_no_ssd_bytes_means_no_ssd_tier(monkeypatch):
    record = records_of(ClusterConfig(ssd_bytes=0))["agent-p0"]
    assert settings_of(monkeypatch, record, "DUALPATH_AGENT", AgentConfig).ssd_dirs == []


def test_the_users_engine_flags_come_last_and_so_win():
    config = ClusterConfig(
        decode=1,
        engine_args=words("--dtype bfloat16 --page-size 32"),
        prefill_args=words("--chunked-prefill-size 1024"),
        decode_args=words("--dtype float16"),
    )
    records = records_of(config)
    assert flag_value(records["p0"], "--dtype") == "bfloat16"
    assert flag_value(records["d0"], "--dtype") == "float16"
    assert flag_value(records["d0"], "--page-size") == "32"
    assert "--chunked-prefill-size" not in records["d0"].argv


def test_a_prefill_engine_loads_blocks_through_our_linker():
    record = records_of(ClusterConfig())["p0"]
    linker = json.loads(flag_value(record, "--unified-cache-external-linker-config"))
    assert linker["linker_module_path"] == "engine.sglang.prefill.linker"
    assert "--enable-unified-cache-external-linker" in record.argv


def test_only_prefill_engines_get_a_quota(monkeypatch):
    records = records_of(ClusterConfig(prefill_quota_ms=250.0))
    quotas_s = [
        settings_of(monkeypatch, records[name], "DUALPATH_ENGINE", EngineConfig).prefill_quota_s
        for name in ("p0", "d0")
    ]
    assert quotas_s == [0.25, None]


def test_a_restarted_prefill_engine_changes_its_bootstrap_port():
    record = records_of(ClusterConfig())["p0"]
    seen = [respawn(record, count).ports["bootstrap"] for count in range(9)]
    assert len(set(seen[:8])) == 8 and seen[8] == seen[0] == record.ports["bootstrap"]
    again = respawn(record, 3)
    assert flag_value(again, "--disaggregation-bootstrap-port") == str(seen[3])
    assert replace(again, argv=record.argv, ports=record.ports, env=record.env) == record


@pytest.mark.parametrize("name", ["agent-p0", "d0", "gateway"])
def test_other_processes_come_back_as_they_were_but_for_mooncakes_ports(name):
    record = records_of(ClusterConfig())[name]
    assert respawn(record, 0) == record
    assert replace(respawn(record, 1), env=record.env) == record
    changed = dict(respawn(record, 1).env.items() - record.env.items())
    wanted = set() if name == "gateway" else {"MC_MIN_RPC_PORT", "MC_MAX_RPC_PORT"}
    assert changed.keys() == wanted


def test_nodes_can_live_on_different_hosts():
    records = records_of(ClusterConfig(), hosts={"p0": "10.0.0.1", "d0": "10.0.0.2"})
    assert records["agent-d0"].host == "10.0.0.2"
    assert records["p0"].env["SGLANG_HOST_IP"] == "10.0.0.1"
    assert records["p0"].alive.target.startswith("tcp://10.0.0.1:")


def test_an_engine_that_has_lost_a_process_is_not_kept_for_a_look_into_it():
    engine = records_of(ClusterConfig())["p0"]
    assert engine.env["SGLANG_PYSPY_DUMP_BEFORE_CRASH"] == "0"
    assert engine.env["SGLANG_CUDA_COREDUMP_BEFORE_CRASH"] == "0"


def test_a_hub_name_keeps_the_hub_reachable():
    local = process_records(ClusterConfig(), MODEL, CPU)[1]
    hub = process_records(ClusterConfig(), Path("org/name"), CPU)[1]
    assert local.env["HF_HUB_OFFLINE"] == "1" and "HF_HUB_OFFLINE" not in hub.env


def test_on_cuda_each_engine_has_its_own_gpus_and_no_cpu_platform():
    config = ClusterConfig(prefill=1, decode=1, engine_args=words("--tp-size 4"))
    cuda = Hardware("cuda", "rdma", "test")
    records = {r.name: r for r in process_records(config, MODEL, cuda)}
    assert flag_value(records["d0"], "--base-gpu-id") == "4"
    assert "SGLANG_PLATFORM" not in records["d0"].env
    assert "MC_FORCE_TCP" not in records["agent-d0"].env


@pytest.mark.parametrize(
    ("asked", "device", "devices", "chosen"),
    [
        ("auto", "cpu", [], "tcp"),
        ("auto", "cpu", ["mlx5_0"], "tcp"),
        ("auto", "cuda", [], "tcp"),
        ("auto", "cuda", ["mlx5_0"], "rdma"),
        ("tcp", "cuda", ["mlx5_0"], "tcp"),
        ("rdma", "cpu", ["mlx5_0"], "rdma"),
    ],
)
def test_the_transport_is_chosen_and_explained(asked, device, devices, chosen):
    hardware = choose_transfer(asked, device, devices)
    assert hardware.transfer == chosen
    assert hardware.reason.endswith(".")


def test_rdma_without_a_device_is_refused():
    with pytest.raises(BadConfig, match="--transfer tcp"):
        choose_transfer("rdma", "cpu", [])


def test_nothing_is_compiled_on_a_cpu_unless_it_is_asked_for():
    asked = records_of(ClusterConfig(prefill_args=words("--enable-torch-compile")))
    for variable in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"):
        assert variable not in asked["p0"].env
        assert asked["d0"].env[variable] == "1"


def test_ranks_share_a_machine_and_unlike_sizes_stage_their_heads():
    unlike = records_of(ClusterConfig(prefill_args=words("--tp 2"), decode_args=words("--tp=1")))
    assert unlike["p0"].env["SGLANG_CPU_OMP_THREADS_BIND"].count("|") == 1
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in unlike["d0"].env
    assert len(mooncake_ports(unlike["p0"])) == 2 * len(mooncake_ports(unlike["d0"]))
    for engine in ("p0", "d0"):
        assert unlike[engine].env["SGLANG_DISAGG_STAGING_BUFFER"] == "1"
    alike = records_of(ClusterConfig(engine_args=words("--tensor-parallel-size 2")))
    assert "SGLANG_DISAGG_STAGING_BUFFER" not in alike["p0"].env


def test_latent_kv_is_not_staged(tmp_path):
    (tmp_path / "config.json").write_text('{"kv_lora_rank": 64}')
    config = ClusterConfig(decode_args=words("--tp 2"))
    records = {record.name: record for record in process_records(config, tmp_path, CPU)}
    assert "SGLANG_DISAGG_STAGING_BUFFER" not in records["d0"].env


def test_engines_of_unlike_sizes_take_their_gpus_in_turn():
    config = ClusterConfig(prefill=2, decode=2, decode_args=words("--tp 4"))
    gpus = Hardware("cuda", "rdma", "test")
    records = {record.name: record for record in process_records(config, MODEL, gpus)}
    first = [flag_value(records[name], "--base-gpu-id") for name in ("p0", "p1", "d0", "d1")]
    assert first == ["0", "1", "2", "6"]


def test_gpus_are_counted_on_each_host():
    config = ClusterConfig(prefill=2, decode=2, engine_args=words("--tp-size 8"))
    hosts = {"p0": "10.0.0.1", "p1": "10.0.0.2", "d0": "10.0.0.1", "d1": "10.0.0.2"}
    layout = Layout(
        config, MODEL, Hardware("cuda", "rdma", "test", gpus=16), places_of(config, hosts)
    )
    assert [layout.gpus(node)[0] for node in layout.nodes] == [0, 0, 8, 8]


def test_ports_are_numbered_on_each_host():
    config = ClusterConfig(prefill=40, decode=40)
    hosts = {f"{role}{n}": f"10.0.0.{n}" for role in "pd" for n in range(40)}
    records = records_of(config, hosts=hosts)
    assert {records[f"p{n}"].ports["http"] for n in range(40)} == {records["p0"].ports["http"]}
    for host in hosts.values():
        here = [port for r in records.values() if r.host == host for port in r.ports.values()]
        assert len(here) == len(set(here)) and max(here) < 32768


@pytest.mark.parametrize(
    ("flags", "fits"),
    [("--tp-size 2", True), ("--tp-size 4", False), ("--tp-size 4 --base-gpu-id 0", True)],
)
def test_more_gpus_than_the_machine_has_are_refused_before_anything_starts(flags, fits):
    config = ClusterConfig(prefill=1, decode=1, engine_args=words(flags))
    gpus = Hardware("cuda", "rdma", "test", gpus=4)
    if fits:
        assert process_records(config, MODEL, gpus)
    else:
        with pytest.raises(BadConfig, match="2 engines need 8 GPUs, and this machine shows 4"):
            process_records(config, MODEL, gpus)


def test_agents_see_no_gpu():
    records = {
        r.name: r for r in process_records(ClusterConfig(), MODEL, Hardware("cuda", "tcp", ""))
    }
    assert records["agent-p0"].env["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in records["p0"].env


def test_a_layer_window_on_gpus_runs_without_prefill_graphs():
    config = ClusterConfig(prefill_layer_window=2)
    records = {r.name: r for r in process_records(config, MODEL, Hardware("cuda", "rdma", ""))}
    assert flag_value(records["p0"], "--cuda-graph-backend-prefill") == "disabled"
    assert "--cuda-graph-backend-prefill" not in records["d0"].argv


@pytest.mark.parametrize(
    "flags",
    [
        "--enable-two-batch-overlap",
        "--enable-pdmux --tp 1",
        "--cuda-graph-backend-prefill full",
        "--cuda-graph-backend-prefill=full",
        "--speculative-algorithm NGRAM",
        "--enable-multi-layer-eagle",
        "--optimistic-prefill-attempts 2",
    ],
)
def test_flags_of_sglang_that_would_make_wrong_tokens_are_refused(flags):
    flag = flags.split()[0].partition("=")[0]
    with pytest.raises(BadConfig, match=f"{flag}.* is not supported: .*take it out"):
        records_of(ClusterConfig(prefill_args=words(flags)))


def test_their_harmless_values_are_not():
    harmless = "--cuda-graph-backend-prefill breakable --optimistic-prefill-attempts 0 "
    harmless += "--speculative-algorithm nextn"
    assert records_of(ClusterConfig(prefill_args=words(harmless)))


def test_a_layer_window_is_refused_where_ranks_have_no_peers(tmp_path):
    def records_with(model, **flags):
        return process_records(ClusterConfig(prefill_layer_window=2, **flags), model, CPU)

    assert records_with(MODEL, engine_args=words("--tp 2"))
    for flags in ({"prefill_args": words("--tp 2")}, {"decode_args": words("--tp 2")}):
        with pytest.raises(BadConfig, match="same --tp"):
            records_with(MODEL, **flags)
    (tmp_path / "config.json").write_text('{"kv_lora_rank": 64}')
    assert records_with(tmp_path, decode_args=words("--tp 2"))  # MLA: the one rank has all there is
    with pytest.raises(BadConfig, match="same --tp"):
        records_with(tmp_path, prefill_args=words("--tp 2"))


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--pp-size 2", "--pp-size"),
        ("--tp 2 --attn-cp-size 2", "--attn-cp-size"),
        ("--dp-size=2", "more engines"),
        ("--tp 2 --attn-dp-size 3", "divide"),
        ("--attn-dp-size 2", "divide"),
    ],
)
def test_other_kinds_of_parallel_engines_are_refused(flags, reason):
    with pytest.raises(BadConfig, match=reason):
        process_records(ClusterConfig(prefill_args=words(flags)), MODEL, CPU)
    assert process_records(ClusterConfig(prefill_args=words("--pp-size 1 --dp 1")), MODEL, CPU)


@pytest.mark.parametrize("flags", ["--attn-dp-size 2", "--dp-size 2 --enable-dp-attention"])
def test_each_attention_group_is_an_engine_to_the_gateway(monkeypatch, flags):
    hosts = {"p0": "10.0.0.1", "d0": "10.0.0.1"}
    records = records_of(ClusterConfig(prefill_args=words(f"--tp 4 {flags}")), hosts=hosts)
    gateway = settings_of(monkeypatch, records["gateway"], "DUALPATH_GATEWAY", GatewayConfig)
    groups, decode = gateway.engines[:2], gateway.engines[2]
    assert [(group.name, group.group) for group in groups] == [("p0.0", 0), ("p0.1", 1)]
    assert (decode.name, decode.group) == ("d0", None)
    assert groups[0].http == groups[1].http and groups[0].agent == groups[1].agent == "agent-p0"
    assert "--sleep-on-idle" in records["d0"].argv and "--sleep-on-idle" not in records["p0"].argv
    assert "--no-enable-tp-lm-head-all-to-all" in records["p0"].argv
    engine = settings_of(monkeypatch, records["p0"], "DUALPATH_ENGINE", EngineConfig)
    assert engine.name == "p0"
    assert engine.controls == [group.control for group in groups]
    assert {check.target for check in records["p0"].ready} > set(engine.controls)
    # KV heads are split over the two ranks of a group, and at D over one.
    assert records["d0"].env["SGLANG_DISAGG_STAGING_BUFFER"] == "1"
    ports = [port for record in records.values() for port in record.ports.values()]
    ports += [port for record in records.values() for port in mooncake_ports(record)]
    ports.append(int(groups[1].control.rpartition(":")[2]))
    first = int(flag_value(records["p0"], "--dist-init-addr").rpartition(":")[2])
    ports += range(first, first + 14)
    assert len(ports) == len(set(ports))


def test_kv_of_two_types_is_refused_before_anything_starts():
    float8 = ("--kv-cache-dtype", "fp8_e4m3")
    told = r"prefill engines have --kv-cache-dtype auto, decode engines fp8_e4m3.*--engine-args"
    with pytest.raises(BadConfig, match=told):
        records_of(ClusterConfig(decode_args=float8))
    records_of(ClusterConfig(engine_args=float8))
    same = words("--kv-cache-dtype=fp8_e4m3")
    records_of(ClusterConfig(prefill_args=float8, decode_args=same))

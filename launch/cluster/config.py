"""Every setting of ``python -m launch.cluster``, each declared once (:mod:`launch.settings`)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from common.experiment import Experiment
from common.json import JsonObject
from common.user_files import cache_folder
from engine.config import EngineConfig
from launch import settings
from launch.gateway.config import LOGPROBS_MAX, GatewayConfig, RequestLimits
from launch.gateway.doors.keys import ApiKey, keys_text, read_keys
from launch.gateway.doors.settings import DoorKeys, DoorSettings
from launch.settings import (
    ARGUMENTS,
    JSON_OBJECT,
    SECONDS,
    SIZE,
    SWITCH,
    Form,
    check_choices,
    choice,
    flag,
    integer,
    load_settings,
    near,
    owned,
    require,
    secret,
    setting,
    settings_of,
    text,
)
from scheduler.options import LOAD_POLICIES, SchedulerOptions
from scheduler.policies import POLICY_NAMES, UnknownPolicy, experiment_of, read_policy
from storage.index.owners import Quota, read_quotas
from storage.remote.settings import RemoteSettings
from storage.ssd import folder as ssd_folder
from storage.write_behind import PROMOTION_POLICIES, WRITE_POLICIES
from transfer.agent.config import AgentConfig
from transfer.pacing.pacer import Pace, read_pace
from transfer.traffic.classes import TrafficSettings, read_settings

DEFAULT_STORE = f"store-{ssd_folder.FORMAT}"
"""A new format begins in a folder of its own: an update does not stop at the old blocks."""


# ---- forms ------------------------------------------------------------------------------


def _quota_ms(value: object) -> float | None:
    if value in ("off", False):  # YAML reads a bare `off` as false
        return None
    quota_ms = settings.number(value)
    if not quota_ms > 0:
        raise ValueError("give milliseconds greater than 0, or off")
    return quota_ms


def _policy(value: object) -> str:
    """A policy is made where it plans: here its name is the value."""
    name = str(value)
    try:
        read_policy(name)
    except UnknownPolicy as error:
        raise ValueError(f"{error}.{near(name, POLICY_NAMES)}") from error
    return name


def _window(value: object) -> int | None:
    if value == "all":
        return None
    if str(value).isdigit() and int(str(value)) >= 2:
        return int(str(value))
    raise ValueError(f"{value!r} is neither `all` nor a number of layers from 2 on")


def _pace(value: object) -> Pace:
    if isinstance(value, bool):  # as YAML reads a bare `on` and `off`
        return "on" if value else "off"
    return read_pace(str(value))


def _traffic(value: object) -> TrafficSettings:
    return read_settings(json.dumps(value) if isinstance(value, dict) else str(value))


def _traffic_text(traffic: TrafficSettings) -> str:
    return "" if traffic == TrafficSettings() else msgspec.json.encode(traffic).decode()


def _quotas(value: object) -> tuple[Quota, ...]:
    return tuple(read_quotas(str(value)))


def _folders(value: object) -> tuple[Path, ...]:
    return tuple(Path(folder).expanduser() for folder in str(value).split(",") if folder)


def _comma_separated(values: tuple[object, ...]) -> str:
    return ",".join(map(str, values))


def _names(value: object) -> tuple[str, ...]:
    written = value if isinstance(value, list) else str(value).split(",")
    return tuple(str(name).strip() for name in written if str(name).strip())


KEYS = secret(Form(read_keys, "KEY", keys_text))
NAMES = Form(_names, "LIST", _comma_separated)
QUOTA_MS = Form(_quota_ms, "MS|off", lambda value: "off" if value is None else str(value))
POLICY = Form(_policy, "NAME")
WINDOW = Form(_window, "W|all", lambda value: "all" if value is None else str(value))
PACE = Form(_pace, "auto|on|off|RATE")
TRAFFIC = Form(_traffic, "JSON", _traffic_text)
QUOTAS = Form(_quotas, "LIST", _comma_separated)
FOLDERS = Form(_folders, "DIRS", _comma_separated)


# ---- settings ---------------------------------------------------------------------------


@dataclass(frozen=True)
class ClusterConfig:
    """What the user asked for. Build with :func:`load_config`, which also checks it."""

    model: str = setting(
        "default",
        "Folder of a model, name on a hub (org/name), `tiny` (random, for tests) or `default` "
        "(SmolLM2-135M-Instruct, built at set-up).",
        text("PATH|NAME"),
    )
    prefill: int = setting(1, "Number of prefill engines.", integer("N"))
    decode: int = setting(1, "Number of decode engines.", integer("M"))
    host: str = setting(
        "127.0.0.1", "Address of the gateway; everything else stays on the loopback.", text()
    )
    api_key: tuple[ApiKey, ...] = owned(DoorKeys, "api_keys", KEYS)
    admin_api_key: tuple[ApiKey, ...] = owned(DoorKeys, "admin_api_keys", KEYS)
    share_cache: bool = owned(DoorSettings, "share_cache", SWITCH)
    allowed_hosts: tuple[str, ...] = owned(DoorSettings, "allowed_hosts", NAMES)
    allowed_origins: tuple[str, ...] = owned(DoorSettings, "allowed_origins", NAMES)
    ssl_certfile: str = owned(DoorSettings, "ssl_certfile", text("PATH"))
    ssl_keyfile: str = owned(DoorSettings, "ssl_keyfile", text("PATH"))
    ssl_ca_certs: str = owned(DoorSettings, "ssl_ca_certs", text("PATH"))
    ssl_keyfile_password: str = owned(DoorKeys, "ssl_keyfile_password", secret(text("PASSWORD")))
    port: int = setting(30000, "Port of the gateway: the OpenAI API.", integer())
    base_port: int = setting(
        0,
        "First port of the other processes, 48 for each, best below 32768 (Mooncake takes fixed "
        "ports only there); 0 means --port + 100.",
        integer(),
    )
    cluster_secret_file: str = setting(
        "",
        "File (mode 0600) with the secret of which the keys of control connections are made; empty "
        "means a new one at each start (docs/security.md).",
        text("FILE"),
    )
    peers_from: str = setting(
        "",
        "Networks, comma-separated, from which the ports of KV movement and of ranks take "
        "connections, besides the cluster's own hosts; any: from everywhere (docs/security.md).",
        text("NETWORKS"),
    )
    device: str = setting(
        "auto",
        "Where engines compute; auto is cuda if torch has it.",
        choice(("auto", "cuda", "cpu")),
    )
    transfer: str = setting(
        "auto",
        "How KV moves between nodes; auto is rdma where there is a device for it.",
        choice(("auto", "rdma", "tcp")),
    )
    rdma_devices: str = owned(AgentConfig, "rdma_devices", text("LIST"))
    traffic: TrafficSettings = setting(
        TrafficSettings(),
        "Marks of the two traffic classes where the site's are not the defaults, such as "
        '\'{"low": {"service_level": 4, "dscp": 10}}\' (docs/traffic.md).',
        TRAFFIC,
    )
    kv_pace: Pace = owned(AgentConfig, "pace", PACE)
    nic_bytes_per_s: int = owned(AgentConfig, "nic_bytes_per_s", SIZE)
    dram_bytes: int = owned(AgentConfig, "dram_bytes", SIZE)
    ssd_dir: tuple[Path, ...] = setting(
        (),
        "Folder of the SSD tier, or one a disk, separated by commas; empty means "
        f"dualpath/{DEFAULT_STORE} in the user's cache.",
        FOLDERS,
    )
    ssd_bytes: int = owned(AgentConfig, "ssd_bytes", SIZE)
    ssd_min_free_bytes: int = owned(AgentConfig, "ssd_min_free_bytes", SIZE)
    ssd_quotas: tuple[Quota, ...] = owned(AgentConfig, "ssd_quotas", QUOTAS)
    write_policy: str = owned(AgentConfig, "write_policy", choice(WRITE_POLICIES))
    promotion_policy: str = owned(AgentConfig, "promotion_policy", choice(PROMOTION_POLICIES))
    remote: str = owned(AgentConfig, "remote_url", text("URL"))
    remote_options: JsonObject = owned(AgentConfig, "remote_options", secret(JSON_OBJECT))
    remote_bytes: int = owned(RemoteSettings, "capacity_bytes", SIZE)
    remote_ttl_s: float = owned(RemoteSettings, "ttl_s", SECONDS)
    remote_hedge_s: float = owned(RemoteSettings, "hedge_after_s", SECONDS)
    path_policy: str = owned(GatewayConfig, "path_policy", POLICY)
    load_policy: str = owned(SchedulerOptions, "load_policy", choice(LOAD_POLICIES))
    alpha_bytes: int = owned(SchedulerOptions, "alpha_bytes", SIZE)
    beta_tokens: int = owned(SchedulerOptions, "beta_tokens", integer("N"))
    prefill_quota_ms: float | None = setting(
        None,
        "Estimated attention time of each prefill batch (paper: 300): prompts are cut to it; off "
        "cuts them by --chunked-prefill-size alone.",
        QUOTA_MS,
    )
    prefill_layer_window: int | None = setting(
        None,
        "Layers whose KV a prefill engine holds at a time (2 or more); all is every layer. Fewer "
        "make room for larger batches: a prompt's KV comes when its layer does (docs/prefill.md).",
        WINDOW,
    )
    served_model_name: str = setting(
        "", "Model name in the API; empty means the model's own.", text("NAME")
    )
    log_dir: str = setting(
        "",
        "Folder of the logs, one file for each process; empty means dualpath/logs/PORT in the "
        "user's cache.",
        text("DIR"),
    )
    log_level: str = setting(
        "error",
        "Lines of the processes' logs from this level on are shown on the console too.",
        choice(("debug", "info", "warning", "error", "none")),
    )
    log_bytes: int = setting(
        64 << 20, "A log of this size is put aside, and a new one begun; 0: never.", SIZE
    )
    log_files: int = setting(
        3, "Logs of each process that are kept when put aside, NAME.log.1 the latest.", integer("N")
    )
    engine_args: tuple[str, ...] = setting(
        (),
        "SGLang server flags for all engines, such as '--tp-size 2'; they win over ours.",
        ARGUMENTS,
    )
    prefill_args: tuple[str, ...] = setting(
        (), "SGLang server flags for the prefill engines.", ARGUMENTS
    )
    decode_args: tuple[str, ...] = setting(
        (), "SGLang server flags for the decode engines.", ARGUMENTS
    )
    max_total_tokens: int = setting(
        0,
        "Tokens in the KV pool of each engine; 0 means 65536 on CPU, SGLang's choice on CUDA.",
        integer("N"),
    )
    requests_max: int = owned(GatewayConfig, "requests_max", integer("N"))
    body_bytes_max: int = owned(RequestLimits, "body_bytes_max", SIZE)
    json_depth_max: int = owned(RequestLimits, "json_depth_max", integer("N"))
    choices_max: int = owned(RequestLimits, "choices_max", integer("N"))
    stop_strings_max: int = owned(RequestLimits, "stop_strings_max", integer("N"))
    tools_max: int = owned(RequestLimits, "tools_max", integer("N"))
    logprobs_max: int = owned(RequestLimits, "logprobs_max", integer("N"))
    grammar_bytes_max: int = owned(RequestLimits, "grammar_bytes_max", SIZE)
    stop_regex: bool = owned(RequestLimits, "stop_regex", SWITCH)
    read_timeout_s: float = owned(GatewayConfig, "read_timeout_s", SECONDS)
    deliver_timeout_s: float = owned(EngineConfig, "deliver_timeout_s", SECONDS)
    request_timeout_s: float = owned(GatewayConfig, "request_timeout_s", SECONDS)
    engine_wait_s: float = owned(GatewayConfig, "engine_wait_s", SECONDS)
    client_stall_s: float = owned(GatewayConfig, "client_stall_s", SECONDS)
    start_timeout_s: float = setting(
        600.0, "Longest time from the start of a process until it is ready.", SECONDS
    )
    restart_backoff_max_s: float = setting(
        15.0, "Longest pause before a process that died is started again.", SECONDS
    )
    poison_kv: bool = setting(
        False,
        "For tests: fill the engines' KV pools with noise at start and after each flush.",
        SWITCH,
    )

    def __post_init__(self) -> None:
        _check(self)

    @property
    def experiment(self) -> Experiment:
        """Of every engine."""
        return Experiment(poison_kv=self.poison_kv, zero_io=self.is_zero_io)

    @property
    def is_zero_io(self) -> bool:
        """The path policy is one for measurements, whose plans read nothing."""
        return experiment_of(read_policy(self.path_policy)).zero_io

    @property
    def first_port(self) -> int:
        return self.base_port or self.port + 100

    @property
    def ssd_folders(self) -> list[Path]:
        return list(self.ssd_dir) or [cache_folder() / DEFAULT_STORE]

    def ssd_folders_of(self, agent: str) -> list[Path]:
        """One a disk; none without an SSD tier."""
        return [folder / agent for folder in self.ssd_folders] if self.ssd_bytes else []

    @property
    def unused_stores(self) -> list[Path]:
        """Default SSD folders of other versions."""
        if self.ssd_dir or not self.ssd_bytes:
            return []
        return sorted(set(cache_folder().glob("store*")) - set(self.ssd_folders))

    @property
    def log_folder(self) -> Path:
        return (
            Path(self.log_dir).expanduser()
            if self.log_dir
            else cache_folder() / "logs" / str(self.port)
        )


_MAY_BE_ZERO = ("remote_ttl_s", "remote_hedge_s", "nic_bytes_per_s")
"""Where zero means never, or not known."""


def _check(config: ClusterConfig) -> None:
    check_choices(config)
    names = list(settings_of(ClusterConfig))
    for name in names:
        value = getattr(config, name)
        if name.endswith(("_s", "_max")) and name not in _MAY_BE_ZERO:
            require(value > 0, f"{flag(name)} {value}: give a number greater than 0.")
    for name in ("prefill", "decode"):
        require(getattr(config, name) >= 1, f"{flag(name)}: at least 1 engine is needed.")
    for name, low in (("port", 1), ("base_port", 0)):
        value = getattr(config, name)
        require(low <= value <= 65535, f"{flag(name)} {value}: give a port from {low} to 65535.")
    sizes = [name for name in names if name.endswith("_bytes")]
    for name in (*sizes, *_MAY_BE_ZERO, "max_total_tokens", "beta_tokens"):
        require(getattr(config, name) >= 0, f"{flag(name)}: give 0 or more.")
    require(
        config.logprobs_max <= LOGPROBS_MAX,
        f"--logprobs-max {config.logprobs_max}: SGLang hands {LOGPROBS_MAX} to decode at most.",
    )
    require(
        config.dram_bytes > 0,
        "--dram-bytes 0: every block passes through DRAM; give at least what two requests need.",
    )
    require(
        ":" not in config.served_model_name,
        f"--served-model-name {config.served_model_name}: SGLang refuses a colon in it.",
    )
    require(config.log_files >= 1, f"--log-files {config.log_files}: give 1 or more.")
    _check_doors(config)
    require(
        not config.remote_options or bool(config.remote),
        "--remote-options without --remote: give the URL of the remote tier as well.",
    )


def _check_doors(config: ClusterConfig) -> None:
    has_certificate, has_key = bool(config.ssl_certfile), bool(config.ssl_keyfile)
    require(has_certificate == has_key, "--ssl-certfile and --ssl-keyfile: give both, or neither.")
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        path = getattr(config, name)
        require(
            not path or Path(path).is_file(), f"{flag(name)} {path}: give a file that is there."
        )
    passed = (*config.engine_args, *config.prefill_args, *config.decode_args)
    for word in passed:
        require(
            not word.startswith(("--api-key", "--admin-api-key", "--ssl-")),
            f"{word.partition('=')[0]} among the engines' flags: only the gateway calls them, with "
            "a key of its own; clients' keys and TLS are flags of the cluster itself.",
        )
    require(
        "@" not in config.remote.partition("://")[2].partition("/")[0],
        "--remote with a user and password in the URL: put them into --remote-options.",
    )


def load_config(argv: Sequence[str]) -> ClusterConfig:
    """Flags over file over defaults; raises :class:`~launch.settings.BadConfig`."""
    return load_settings(ClusterConfig, make_parser(), argv)


def make_parser() -> argparse.ArgumentParser:
    """The command line of ``python -m launch.cluster``."""
    return settings.make_parser(
        ClusterConfig,
        "python -m launch.cluster",
        "Serve a model from prefill and decode engines with a shared KV store.",
    )

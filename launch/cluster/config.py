"""Every setting of ``python -m launch.cluster``, each declared once (:mod:`launch.settings`)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.experiment import Experiment
from common.sizes import parse_size
from common.user_cache import cache_folder
from launch import settings
from launch.settings import (
    check_choices,
    fields_of,
    flag,
    load_settings,
    near,
    parse_arguments,
    parse_json_object,
    parse_switch,
    require,
    setting,
)
from scheduler.policies import POLICY_NAMES, UnknownPolicy, read_policy
from storage.index.owners import parse_quotas
from storage.ssd import folder as ssd_folder
from storage.write_behind import PROMOTION_POLICIES, WRITE_POLICIES
from transfer.pacing.pacer import read_pace
from transfer.traffic.classes import TrafficSettings, read_settings

DEFAULT_STORE = f"store-{ssd_folder.FORMAT}"
"""A new format begins in a folder of its own: an update does not stop at the old blocks."""


def _parse_quota(value: str | float | bool) -> float | None:
    if value in ("off", False):  # YAML reads a bare `off` as false
        return None
    quota_ms = float(value)
    if not quota_ms > 0:
        raise ValueError("give milliseconds greater than 0, or off")
    return quota_ms


def _parse_policy(value: str) -> str:
    try:
        read_policy(value)
    except UnknownPolicy as error:
        raise ValueError(f"{error}.{near(value, POLICY_NAMES)}") from error
    return value


def _parse_window(value: str | int) -> str:
    if str(value) == "all" or (str(value).isdigit() and int(value) >= 2):
        return str(value)
    raise ValueError(f"{value!r} is neither `all` nor a number of layers from 2 on")


def _parse_pace(value: str | float | bool) -> str:
    text = {False: "off", True: "on"}[value] if isinstance(value, bool) else str(value)
    read_pace(text)  # raises ValueError
    return text


def _parse_traffic(value: str | dict[str, Any]) -> str:
    text = json.dumps(value) if isinstance(value, dict) else value
    read_settings(text)  # raises ValueError
    return text


@dataclass(frozen=True)
class ClusterConfig:
    """What the user asked for. Build with :func:`load_config`, which also checks it."""

    model: str = setting(
        "default",
        "Folder of a model, name on a hub (org/name), `tiny` (random, for tests) or `default` "
        "(SmolLM2-135M-Instruct, built at set-up).",
        metavar="PATH|NAME",
    )
    prefill: int = setting(1, "Number of prefill engines.", int, metavar="N")
    decode: int = setting(1, "Number of decode engines.", int, metavar="M")
    host: str = setting(
        "127.0.0.1", "Address of the gateway; everything else stays on the loopback."
    )
    port: int = setting(30000, "Port of the gateway: the OpenAI API.", int)
    base_port: int = setting(
        0,
        "First port of the other processes, 48 for each, best below 32768 (Mooncake takes fixed "
        "ports only there); 0 means --port + 100.",
        int,
    )
    device: str = setting(
        "auto",
        "Where engines compute; auto is cuda if torch has it.",
        choices=("auto", "cuda", "cpu"),
    )
    transfer: str = setting(
        "auto",
        "How KV moves between nodes; auto is rdma where there is a device for it.",
        choices=("auto", "rdma", "tcp"),
    )
    rdma_devices: str = setting(
        "",
        "RDMA devices that KV moves through, such as mlx5_0,mlx5_1; empty means all.",
        metavar="LIST",
    )
    traffic: str = setting(
        "",
        "Marks of the two traffic classes where the site's are not the defaults, such as "
        '\'{"low": {"service_level": 4, "dscp": 10}}\' (docs/traffic.md).',
        _parse_traffic,
        metavar="JSON",
    )
    kv_pace: str = setting(
        "auto",
        "Rate at most with which each agent sends KV through a NIC, in bytes a second; on is what "
        "other traffic leaves, auto is on where no traffic classes are in force (docs/pacing.md).",
        _parse_pace,
        metavar="auto|on|off|RATE",
    )
    nic_bytes_per_s: int = setting(
        0,
        "Rate of a node's compute NIC, such as 3GB, for --kv-pace; 0 means what its driver says.",
        parse_size,
        metavar="SIZE",
    )
    dram_bytes: int = setting(
        parse_size("1GiB"), "DRAM tier of each agent, such as 64GiB.", parse_size, metavar="SIZE"
    )
    ssd_dir: str = setting(
        "",
        "Folder of the SSD tier, or one a disk, separated by commas; empty means "
        f"dualpath/{DEFAULT_STORE} in the user's cache.",
        metavar="DIRS",
    )
    ssd_bytes: int = setting(
        parse_size("8GiB"), "SSD tier of each agent; 0 switches it off.", parse_size, metavar="SIZE"
    )
    ssd_min_free_bytes: int = setting(
        parse_size("1GiB"), "SSD tier: what stays free on each disk.", parse_size, metavar="SIZE"
    )
    ssd_quotas: str = setting(
        "",
        "Quotas of each agent's SSD tier as FIELD:VALUE=SIZE, comma-separated; such as "
        "'tenant:*=20GiB' (docs/storage.md).",
        parse_quotas,
        metavar="LIST",
    )
    write_policy: str = setting(
        "everywhere",
        "Where new blocks are written: to SSD and remote; or to remote only when used again.",
        choices=WRITE_POLICIES,
    )
    promotion_policy: str = setting(
        "always",
        "When a block that was read from remote is kept on SSD: the first time or the second.",
        choices=PROMOTION_POLICIES,
    )
    remote: str = setting(
        "",
        "Remote tier, any fsspec URL such as s3://bucket/prefix; empty means none.",
        metavar="URL",
    )
    remote_options: dict[str, Any] = setting(
        {}, "Options of the remote tier's fsspec filesystem.", parse_json_object, metavar="JSON"
    )
    remote_bytes: int = setting(
        0,
        "Remote tier: bound of all that lies below the URL, whoever wrote it; 0 means none.",
        parse_size,
        metavar="SIZE",
    )
    remote_ttl_s: float = setting(
        0.0, "Remote tier: blocks go so long after they were written; 0: never.", float, metavar="S"
    )
    remote_hedge_s: float = setting(
        0.0,
        "Remote tier: a read with no answer by then is asked for a second time; 0: never.",
        float,
        metavar="S",
    )
    path_policy: str = setting(
        "shorter-queue",
        f"Which agent reads a hit block: {', '.join(POLICY_NAMES)}, or a class of your own as "
        "module:Class (docs/scheduler.md).",
        _parse_policy,
        metavar="NAME",
    )
    load_policy: str = setting(
        "auto",
        "Whether a hit is loaded or computed again; auto is whatever gives the first token sooner.",
        choices=("auto", "always", "never"),
    )
    alpha_bytes: int = setting(
        0,
        "A node's read queue is short up to here; 0 means what its storage NIC reads in 3 s.",
        parse_size,
        metavar="SIZE",
    )
    beta_tokens: int = setting(
        0,
        "Prompt tokens that may wait at a prefill engine; 0 means what it computes in 5 s.",
        int,
        metavar="N",
    )
    prefill_quota_ms: float | None = setting(
        None,
        "Estimated attention time of each prefill batch (paper: 300): prompts are cut to it; off "
        "cuts them by --chunked-prefill-size alone.",
        _parse_quota,
        metavar="MS|off",
    )
    prefill_layer_window: str = setting(
        "all",
        "Layers whose KV a prefill engine holds at a time (2 or more); all is every layer. Fewer "
        "make room for larger batches: a prompt's KV comes when its layer does (docs/prefill.md).",
        _parse_window,
        metavar="W|all",
    )
    served_model_name: str = setting(
        "", "Model name in the API; empty means the model's own.", metavar="NAME"
    )
    log_dir: str = setting(
        "",
        "Folder of the logs, one file for each process; empty means dualpath/logs/PORT in the "
        "user's cache.",
        metavar="DIR",
    )
    log_level: str = setting(
        "error",
        "Lines of the processes' logs from this level on are shown on the console too.",
        choices=("debug", "info", "warning", "error", "none"),
    )
    engine_args: str = setting(
        "",
        "SGLang server flags for all engines, such as '--tp-size 2'; they win over ours.",
        parse_arguments,
        metavar="FLAGS",
    )
    prefill_args: str = setting(
        "", "SGLang server flags for the prefill engines.", parse_arguments, metavar="FLAGS"
    )
    decode_args: str = setting(
        "", "SGLang server flags for the decode engines.", parse_arguments, metavar="FLAGS"
    )
    max_total_tokens: int = setting(
        0,
        "Tokens in the KV pool of each engine; 0 means 65536 on CPU, SGLang's choice on CUDA.",
        int,
        metavar="N",
    )
    requests_max: int = setting(
        256,
        "Requests in flight or queued; beyond it the tenant that holds most gets 429.",
        int,
        metavar="N",
    )
    read_timeout_s: float = setting(
        20.0,
        "A storage read that is not done by then is given up, its blocks recomputed.",
        float,
        metavar="S",
    )
    deliver_timeout_s: float = setting(
        20.0, "A delivery into an engine that is not done by then fails.", float, metavar="S"
    )
    request_timeout_s: float = setting(600.0, "Longest life of a request.", float, metavar="S")
    start_timeout_s: float = setting(
        600.0, "Longest time from the start of a process until it is ready.", float, metavar="S"
    )
    restart_backoff_max_s: float = setting(
        15.0, "Longest pause before a process that died is started again.", float, metavar="S"
    )
    poison_kv: bool = setting(
        False,
        "For tests: fill the engines' KV pools with noise at start and after each flush.",
        parse_switch,
    )

    def __post_init__(self) -> None:
        _check(self)

    @property
    def experiment(self) -> Experiment:
        """Of every engine."""
        return Experiment(poison_kv=self.poison_kv)

    @property
    def layer_window(self) -> int:
        """Layers; 0 for all."""
        return 0 if self.prefill_layer_window == "all" else int(self.prefill_layer_window)

    @property
    def traffic_settings(self) -> TrafficSettings:
        return read_settings(self.traffic)

    @property
    def first_port(self) -> int:
        return self.base_port or self.port + 100

    @property
    def ssd_folders(self) -> list[Path]:
        folders = [Path(folder).expanduser() for folder in self.ssd_dir.split(",") if folder]
        return folders or [cache_folder() / DEFAULT_STORE]

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
    names = list(fields_of(ClusterConfig))
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
        config.dram_bytes > 0,
        "--dram-bytes 0: every block passes through DRAM; give at least what two requests need.",
    )
    require(
        ":" not in config.served_model_name,
        f"--served-model-name {config.served_model_name}: SGLang refuses a colon in it.",
    )
    require(
        not config.remote_options or bool(config.remote),
        "--remote-options without --remote: give the URL of the remote tier as well.",
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

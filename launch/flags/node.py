"""Settings of what runs on a host: engines, agents and the supervisor of both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.experiment import Experiment
from common.json import JsonObject
from common.user_files import cache_folder
from engine.config import EngineConfig
from launch.flags.forms import FOLDERS, PACE, QUOTA_MS, QUOTAS, TRAFFIC, WINDOW
from launch.flags.shared import ModelSettings, SharedSettings, check_tracing
from launch.settings import (
    ARGUMENTS,
    JSON_OBJECT,
    SECONDS,
    SIZE,
    SWITCH,
    choice,
    integer,
    owned,
    require,
    secret,
    setting,
    text,
)
from storage.index.owners import Quota
from storage.remote.settings import RemoteSettings
from storage.ssd import folder as ssd_folder
from storage.write_behind import PROMOTION_POLICIES, WRITE_POLICIES
from transfer.agent.config import AgentConfig
from transfer.pacing.pacer import Pace
from transfer.traffic.classes import TrafficSettings

DEFAULT_STORE = f"store-{ssd_folder.FORMAT}"
"""A new format begins in a folder of its own: an update does not stop at the old blocks."""


DEFAULT_BASE_PORT = 30100


@dataclass(frozen=True)
class NodeSettings(SharedSettings, ModelSettings):
    """The hardware, the tiers, the engines, the logs."""

    base_port: int = setting(
        0,
        "First port of the other processes, 48 for each, best below 32768 (Mooncake takes fixed "
        "ports only there); 0 means --port + 100, or 30100 of launch.node.",
        integer(),
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
    deliver_timeout_s: float = owned(EngineConfig, "deliver_timeout_s", SECONDS)
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

    @property
    def is_whole_cluster(self) -> bool:
        """Whether one command starts all there is, so that hosts need not be told of others."""
        return True

    @property
    def experiment(self) -> Experiment:
        """Of every engine."""
        return Experiment(poison_kv=self.poison_kv, zero_io=self.is_zero_io)

    @property
    def is_zero_io(self) -> bool:
        """Plans read nothing, in measurements."""
        return False

    @property
    def first_port(self) -> int:
        return self.base_port or DEFAULT_BASE_PORT

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
        own = cache_folder() / "logs" / self.log_name
        return Path(self.log_dir).expanduser() if self.log_dir else own

    @property
    def log_name(self) -> str:
        """Of the default folder of logs."""
        return str(self.first_port)


def check_node(config: NodeSettings) -> None:
    """Raises :class:`~launch.settings.BadConfig`."""
    check_tracing(config)
    port = config.base_port
    require(0 <= port <= 65535, f"--base-port {port}: give a port from 0 to 65535.")
    require(
        config.dram_bytes > 0,
        "--dram-bytes 0: every block passes through DRAM; give at least what two requests need.",
    )
    require(
        ":" not in config.served_model_name,
        f"--served-model-name {config.served_model_name}: SGLang refuses a colon in it.",
    )
    require(config.log_files >= 1, f"--log-files {config.log_files}: give 1 or more.")
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
    require(
        not config.remote_options or bool(config.remote),
        "--remote-options without --remote: give the URL of the remote tier as well.",
    )

"""Settings of the front door and its scheduler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.cluster.membership import EngineAddress
from launch.flags.forms import KEYS, NAMES, POLICY, URLS
from launch.flags.shared import SharedSettings, check_numbers, check_tracing, cluster_secret
from launch.gateway.config import LOGPROBS_MAX, GatewayConfig, RequestLimits
from launch.gateway.doors.keys import ApiKey
from launch.gateway.doors.settings import DoorKeys, DoorSettings
from launch.settings import (
    SECONDS,
    SIZE,
    SWITCH,
    check_choices,
    choice,
    filled,
    flag,
    integer,
    load_settings,
    make_parser,
    owned,
    require,
    secret,
    setting,
    text,
)
from scheduler.options import LOAD_POLICIES, SchedulerOptions
from transfer.control.keys import ENGINE_HTTP, derived


@dataclass(frozen=True)
class GatewaySettings(SharedSettings):
    """Where clients connect, who they may be, what they may ask for; which agent reads what."""

    host: str = setting(
        "127.0.0.1",
        "Address of the gateway; where one command starts everything, the rest stays on the "
        "loopback.",
        text(),
    )
    port: int = setting(30000, "Port of the gateway: the OpenAI API.", integer())
    api_key: tuple[ApiKey, ...] = owned(DoorKeys, "api_keys", KEYS)
    admin_api_key: tuple[ApiKey, ...] = owned(DoorKeys, "admin_api_keys", KEYS)
    share_cache: bool = owned(DoorSettings, "share_cache", SWITCH)
    allowed_hosts: tuple[str, ...] = owned(DoorSettings, "allowed_hosts", NAMES)
    allowed_origins: tuple[str, ...] = owned(DoorSettings, "allowed_origins", NAMES)
    ssl_certfile: str = owned(DoorSettings, "ssl_certfile", text("PATH"))
    ssl_keyfile: str = owned(DoorSettings, "ssl_keyfile", text("PATH"))
    ssl_keyfile_password: str = owned(DoorKeys, "ssl_keyfile_password", secret(text("PASSWORD")))
    path_policy: str = owned(GatewayConfig, "path_policy", POLICY)
    load_policy: str = owned(SchedulerOptions, "load_policy", choice(LOAD_POLICIES))
    alpha_bytes: int = owned(SchedulerOptions, "alpha_bytes", SIZE)
    beta_tokens: int = owned(SchedulerOptions, "beta_tokens", integer("N"))
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
    request_timeout_s: float = owned(GatewayConfig, "request_timeout_s", SECONDS)
    engine_wait_s: float = owned(GatewayConfig, "engine_wait_s", SECONDS)
    client_stall_s: float = owned(GatewayConfig, "client_stall_s", SECONDS)


def check_gateway(config: GatewaySettings) -> None:
    """Raises :class:`~launch.settings.BadConfig`."""
    check_tracing(config)
    require(1 <= config.port <= 65535, f"--port {config.port}: give a port from 1 to 65535.")
    require(
        config.logprobs_max <= LOGPROBS_MAX,
        f"--logprobs-max {config.logprobs_max}: SGLang hands {LOGPROBS_MAX} to decode at most.",
    )
    has_certificate, has_key = bool(config.ssl_certfile), bool(config.ssl_keyfile)
    require(has_certificate == has_key, "--ssl-certfile and --ssl-keyfile: give both, or neither.")
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        path = getattr(config, name)
        require(
            not path or Path(path).is_file(), f"{flag(name)} {path}: give a file that is there."
        )


def gateway_settings(
    config: GatewaySettings,
    secret: str,
    agents: Mapping[str, str],
    engines: list[EngineAddress],
) -> GatewayConfig:
    """Of a gateway that knows these from the start."""
    settings = GatewayConfig(
        host=config.host,
        port=config.port,
        agents=dict(agents),
        control_secret=secret,
        engines=engines,
        scheduler=filled(SchedulerOptions(), config),
        doors=filled(DoorSettings(), config),
        keys=filled(DoorKeys(engine_key=derived(secret, ENGINE_HTTP)), config),
        limits=filled(RequestLimits(), config),
    )
    return filled(settings, config)


@dataclass(frozen=True)
class GatewayCommand(GatewaySettings):
    """Of ``python -m launch.gateway``, which others join."""

    standby_of: tuple[str, ...] = owned(GatewayConfig, "standby_of", URLS)
    state_dir: str = owned(GatewayConfig, "state_dir", text("DIR"))

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(self)
        check_gateway(self)
        require(
            bool(self.cluster_secret_file),
            "--cluster-secret-file is needed: by its secret the gateway knows who may join. Make "
            "one with `(umask 077; openssl rand -hex 32 > FILE)`, for all hosts alike.",
        )


def lone_gateway(argv: Sequence[str]) -> GatewayConfig:
    """From the command line; raises :class:`~launch.settings.BadConfig`."""
    parser = make_parser(
        GatewayCommand, "python -m launch.gateway", "The front door of a cluster that nodes join."
    )
    config = load_settings(GatewayCommand, parser, argv)
    return gateway_settings(config, cluster_secret(config), agents={}, engines=[])

"""Settings of the gateway process (environment variable ``DUALPATH_GATEWAY``)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from common.process_settings import ProcessSettings
from launch.gateway.doors.settings import DoorKeys, DoorSettings
from scheduler.options import SchedulerOptions
from scheduler.policies import POLICY_NAMES


class EngineAddress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where an engine is reached, or an attention group of one."""

    name: str
    role: str
    """"prefill" or "decode"."""
    agent: str
    """The agent of the engine's node."""
    http: str
    """e.g. ``http://127.0.0.1:31011``."""
    control: str
    """zmq endpoint, such as ``run://p0``."""
    bootstrap_host: str
    group: int | None = None
    """Which attention group of its engine it is; None: its engine has one."""


class GatewayConfig(ProcessSettings, frozen=True):
    """The OpenAI-compatible front door and its scheduler."""

    VARIABLE: ClassVar[str] = "DUALPATH_GATEWAY"
    SECRET: ClassVar[tuple[str, ...]] = ("keys", "control_secret")

    host: str
    port: int
    agents: dict[str, str]
    """Every agent's name and control endpoint."""
    engines: list[EngineAddress]
    model: str
    control_secret: str = ""
    """Of which the keys of control connections are made (:mod:`transfer.control.keys`)."""
    path_policy: Annotated[
        str,
        Meta(
            description=f"Which agent reads a hit block: {', '.join(POLICY_NAMES)}, or a class of "
            "your own as module:Class (docs/scheduler.md)."
        ),
    ] = "shorter-queue"
    scheduler: SchedulerOptions = SchedulerOptions()
    doors: DoorSettings = DoorSettings()
    keys: DoorKeys = DoorKeys()
    requests_max: Annotated[
        int,
        Meta(
            description="Requests in flight or queued; beyond it the tenant that holds most gets "
            "429."
        ),
    ] = 256
    read_timeout_s: Annotated[
        float,
        Meta(
            description="A storage read that is not done by then is given up, its blocks "
            "recomputed."
        ),
    ] = 20.0
    request_timeout_s: Annotated[float, Meta(description="Longest life of a request.")] = 600.0
    client_stall_s: Annotated[
        float,
        Meta(description="A client that reads nothing of its answer for so long is cut off."),
    ] = 60.0

"""Settings of the gateway process (environment variable ``DUALPATH_GATEWAY``)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from common.cluster.membership import EngineAddress
from common.process_settings import ProcessSettings
from launch.gateway.doors.settings import DoorKeys, DoorSettings
from scheduler.options import SchedulerOptions
from scheduler.policies import POLICY_NAMES

LOGPROBS_MAX = 128
"""Places in what SGLang hands from a prefill to a decode engine; one more ends the scheduler."""


class RequestLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much one request may hold."""

    body_bytes_max: Annotated[
        int, Meta(description="Bytes of a request's body; the rest is not read, the answer is 413.")
    ] = 32 << 20
    json_depth_max: Annotated[
        int, Meta(description="Depth of nested JSON in a request: messages, tools, schemas.")
    ] = 64
    choices_max: Annotated[int, Meta(description="Choices of a request (`n`) for each prompt.")] = (
        128
    )
    stop_strings_max: Annotated[
        int, Meta(description="Stop strings of a request; SGLang takes 32 at most.")
    ] = 32
    tools_max: Annotated[int, Meta(description="Tools of a request.")] = 128
    logprobs_max: Annotated[
        int,
        Meta(
            description="Log-probabilities a token that a request may ask for; SGLang hands 128 "
            "from prefill to decode at most."
        ),
    ] = LOGPROBS_MAX
    grammar_bytes_max: Annotated[
        int, Meta(description="Size of a JSON schema, regex, EBNF or structural tag.")
    ] = 32 << 10
    stop_regex: Annotated[
        bool,
        Meta(
            description="Let requests have `stop_regex`, which SGLang matches in its scheduler: "
            "one that backtracks for long stops the engine."
        ),
    ] = False


class GatewayConfig(ProcessSettings, frozen=True):
    """The OpenAI-compatible front door and its scheduler."""

    VARIABLE: ClassVar[str] = "DUALPATH_GATEWAY"
    SECRET: ClassVar[tuple[str, ...]] = ("keys", "control_secret")

    host: str
    port: int
    agents: dict[str, str]
    """Every agent's name and control endpoint."""
    engines: list[EngineAddress]
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
    limits: RequestLimits = RequestLimits()
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
    engine_wait_s: Annotated[
        float,
        Meta(
            description="Requests wait so long for an engine to come back while none of a role "
            "lives; then 503."
        ),
    ] = 30.0
    otlp_traces_endpoint: Annotated[
        str,
        Meta(
            description="Collector of OpenTelemetry traces, such as localhost:4317, for gateway, "
            "agents and engines; empty means no traces (docs/operations.md)."
        ),
    ] = ""
    standby_of: Annotated[
        tuple[str, ...],
        Meta(
            description="URL of another gateway, or URLs of several, comma-separated: while one of "
            "them is active, this one knows what it knows, and takes over when it is silent. Its "
            "own may be among them, so that all are started alike (docs/deploy.md)."
        ),
    ] = ()
    state_dir: Annotated[
        str,
        Meta(
            description="Folder in which operators' orders (a drain, a policy) outlast the "
            "gateway; empty means memory."
        ),
    ] = ""
    client_stall_s: Annotated[
        float,
        Meta(description="A client that reads nothing of its answer for so long is cut off."),
    ] = 60.0

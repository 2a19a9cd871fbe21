"""Settings of the plugin inside one SGLang engine (environment variable ``DUALPATH_ENGINE``).

Absent variable: the plugin does nothing, and SGLang is plain SGLang.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from common.experiment import NO_EXPERIMENT, Experiment
from common.process_settings import ProcessSettings

CPU_GROUPS_VARIABLE = "DUALPATH_CPU_GROUPS"
"""Set ("1"): an engine on a CPU has attention groups
(:mod:`engine.sglang.cpu.attention_groups`)."""
CPU_SPARSE_VARIABLE = "DUALPATH_CPU_SPARSE"
"""The same: its model has sparse attention (:mod:`engine.sglang.cpu.sparse`)."""
CPU_COMPRESSED_VARIABLE = "DUALPATH_CPU_COMPRESSED"
"""The same: it has compressed attention (:mod:`engine.sglang.cpu.compressed`)."""
CPU_DRAFT_VARIABLE = "DUALPATH_CPU_DRAFT"
"""The same: it has a draft (:mod:`engine.sglang.cpu.speculative`)."""
CPU_RECURRENT_VARIABLE = "DUALPATH_CPU_RECURRENT"
"""The same: it has recurrent layers (:mod:`engine.sglang.cpu.recurrent`)."""


class EngineConfig(ProcessSettings, frozen=True):
    """One engine and its way to the agents."""

    VARIABLE: ClassVar[str] = "DUALPATH_ENGINE"
    SECRET: ClassVar[tuple[str, ...]] = ("control_secret", "http_key")

    name: str
    role: str
    """"prefill" or "decode"."""
    controls: list[str]
    """zmq endpoint to bind, such as ``run://p0``: one for each attention group, at the first rank
    that it has on this host."""
    agent: str
    """Name of the node's own agent, which persists this engine's blocks."""
    agents: dict[str, str]
    """Every agent's name and control endpoint."""
    heard: list[str] = []
    """Networks from which its ports take connections (:mod:`transfer.ports.source_filter`); empty:
    from everywhere."""
    control_secret: str = ""
    """Of which the keys of control connections are made (:mod:`transfer.control.keys`)."""
    deliver_timeout_s: Annotated[
        float,
        Meta(description="A delivery into an engine that is not done by then fails."),
    ] = 20.0
    """Its pages go to quarantine."""
    pull_timeout_s: float = 30.0
    quarantine_fraction_max: float = 0.25
    """Share of the KV pool in quarantine at which the engine ends itself to be restarted, if no
    fence brings pages back in time."""
    prefill_quota_s: float | None = None
    """Estimated attention time of each prefill batch; None: SGLang's fixed chunks."""
    layer_window: int | None = None
    """Layers of KV that the pool of a prefill engine holds; None: all."""
    promise_planned_only: bool = False
    """A decode engine promises P no prefix of its own that the plan lacks: a prefill engine
    with a layer window brings a prefix from nowhere else."""
    experiment: Experiment = NO_EXPERIMENT
    spanned_from: str = ""
    """This host's address, of an engine over several hosts; empty: there is one."""
    http_key: str = ""
    """Without it nobody may call the engine's HTTP port; empty: anybody may."""

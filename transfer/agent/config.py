"""Settings of one agent process (environment variable ``DUALPATH_AGENT``)."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from common.experiment import NO_EXPERIMENT, Experiment
from common.json import JsonObject
from common.process_settings import ProcessSettings
from storage.index.owners import Quota
from storage.remote.settings import RemoteSettings
from transfer.pacing.pacer import Pace


class AgentConfig(ProcessSettings, frozen=True):
    """One agent a node. An empty name or list switches a tier off. (Sentences are the launcher's
    flags': :func:`launch.settings.owned`.)"""

    VARIABLE: ClassVar[str] = "DUALPATH_AGENT"
    SECRET: ClassVar[tuple[str, ...]] = ("remote_options", "control_secret")

    name: str
    control: str
    """zmq endpoint to bind, e.g. ``tcp://10.0.0.1:31010``, or ``run://agent-p0``: a unix socket in
    the run folder."""
    host: str
    """Address that Mooncake advertises for this node."""
    protocol: str
    """"tcp" or "rdma"."""
    engines: list[str] = []
    """Names of those that may register here."""
    heard: list[str] = []
    """Networks from which its ports take connections (:mod:`transfer.ports.source_filter`); empty:
    from everywhere."""
    control_secret: str = ""
    """Of which the keys of control connections are made (:mod:`transfer.control.keys`)."""
    rdma_devices: Annotated[
        str,
        Meta(
            description="RDMA devices that KV moves through, such as mlx5_0,mlx5_1; empty means "
            "all."
        ),
    ] = ""
    gpus: list[int] = []
    """Of the node's engine, in order of PCI addresses: NICs near them are used first."""
    pace: Annotated[
        Pace,
        Meta(
            description="Rate at most with which each agent sends KV through a NIC, in bytes a "
            "second; on is what other traffic leaves, auto is on where no traffic classes are in "
            "force (docs/pacing.md)."
        ),
    ] = "auto"
    nic_bytes_per_s: Annotated[
        int,
        Meta(
            description="Rate of a node's compute NIC, such as 3GB, for --kv-pace; 0 means what "
            "its driver says."
        ),
    ] = 0
    dram_bytes: Annotated[int, Meta(description="DRAM tier of each agent, such as 64GiB.")] = (
        1 << 30
    )
    ssd_dirs: list[str] = []
    """One folder a disk; no folders switch the tier off."""
    ssd_bytes: Annotated[int, Meta(description="SSD tier of each agent; 0 switches it off.")] = (
        8 << 30
    )
    """Of all its folders together, each of which gets an equal part."""
    ssd_min_free_bytes: Annotated[
        int, Meta(description="SSD tier: what stays free on each disk.")
    ] = 1 << 30
    """Whoever else fills it."""
    ssd_quotas: Annotated[
        tuple[Quota, ...],
        Meta(
            description="Quotas of each agent's SSD tier as FIELD:VALUE=SIZE, comma-separated; "
            "such as 'tenant:*=20GiB' (docs/storage.md)."
        ),
    ] = ()
    write_policy: Annotated[
        str,
        Meta(
            description="Where new blocks are written: to SSD and remote; or to remote only when "
            "used again."
        ),
    ] = "everywhere"
    promotion_policy: Annotated[
        str,
        Meta(
            description="When a block that was read from remote is kept on SSD: the first time or "
            "the second."
        ),
    ] = "always"
    """Both of :mod:`storage.write_behind`."""
    remote_url: Annotated[
        str,
        Meta(
            description="Remote tier, any fsspec URL such as s3://bucket/prefix; empty means none."
        ),
    ] = ""
    remote_options: Annotated[
        JsonObject, Meta(description="Options of the remote tier's fsspec filesystem.")
    ] = {}
    remote: RemoteSettings = RemoteSettings()
    otlp_traces_endpoint: str = ""
    """Collector of OpenTelemetry traces, HOST:PORT; empty: no traces."""
    read_threads: int = 16
    deliver_threads: int = 4
    cgroup: str = ""
    """Control group of the low traffic class, in which this process should be where it exists."""
    experiment: Experiment = NO_EXPERIMENT

"""Settings of one agent process (environment variable ``DUALPATH_AGENT``)."""

from __future__ import annotations

from typing import ClassVar

from common.experiment import NO_EXPERIMENT, Experiment
from common.process_settings import ProcessSettings
from storage.index.owners import Quota
from storage.remote.settings import RemoteSettings


class AgentConfig(ProcessSettings, frozen=True):
    """One agent a node. Zero bytes or an empty name switch a tier off."""

    VARIABLE: ClassVar[str] = "DUALPATH_AGENT"

    name: str
    control: str
    """zmq endpoint to bind, e.g. ``tcp://127.0.0.1:31010``."""
    host: str
    """Address that Mooncake advertises for this node."""
    protocol: str
    """"tcp" or "rdma"."""
    rdma_devices: str = ""
    gpus: list[int] = []
    """Of the node's engine, in order of PCI addresses: NICs near them are used first."""
    pace: str = "off"
    """How KV movement is held back (:mod:`transfer.pacing.agent_pacing`), and each NIC's rate."""
    nic_bytes_per_s: int = 0
    dram_bytes: int = 0
    ssd_dirs: list[str] = []
    """One folder a disk; no folders switch the tier off."""
    ssd_bytes: int = 0
    ssd_min_free_bytes: int = 0
    """Of each folder's disk, whoever else fills it."""
    ssd_quotas: list[Quota] = []
    write_policy: str = "everywhere"
    promotion_policy: str = "always"
    """Both of :mod:`storage.write_behind`."""
    remote_url: str = ""
    remote_options: dict[str, object] = {}
    remote: RemoteSettings = RemoteSettings()
    read_threads: int = 16
    deliver_threads: int = 4
    cgroup: str = ""
    """Control group of the low traffic class, in which this process should be where it exists."""
    experiment: Experiment = NO_EXPERIMENT

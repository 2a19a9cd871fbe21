"""Every metric of agents, engines and the gateway: declared once, here.

From this table come the samples (:mod:`common.samples`), the text at the gateway's ``/metrics``
and the tables in docs/operations.md. ``python -m common.metrics docs/operations.md`` writes those
anew.
"""

from __future__ import annotations

import re
import sys
from enum import Enum
from itertools import groupby
from pathlib import Path

import msgspec

PREFIX = "dualpath:"
"""Of every name, where users see it."""

LATENCY_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
_TTFT_BUCKETS_S = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 120)
_QUEUE_BUCKETS_S = (0.001, 0.01, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)
_RATIO_BUCKETS = (0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 4, 10)


class Kind(str, Enum):
    """Prometheus's words."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Metric(msgspec.Struct, frozen=True):
    """A row of the table. What agents and engines report gets the process's name as one more
    label, ``agent`` or ``engine``, from the gateway."""

    name: str
    """Without PREFIX; of a counter with ``_total``."""
    kind: Kind
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Of a histogram: upper bounds, without infinity."""

    @property
    def reporter(self) -> str:
        """ "agent" or "engine" where the name begins so, else "gateway"."""
        first = self.name.partition("_")[0]
        return first if first in ("agent", "engine") else "gateway"


# ---- declaring --------------------------------------------------------------------------


def _counter(name: str, unit: str, text: str, *labels: str) -> Metric:
    return Metric(name, Kind.COUNTER, unit, text, labels)


def _gauge(name: str, unit: str, text: str, *labels: str) -> Metric:
    return Metric(name, Kind.GAUGE, unit, text, labels)


def _histogram(name: str, unit: str, buckets: tuple[float, ...], text: str, *labels: str) -> Metric:
    return Metric(name, Kind.HISTOGRAM, unit, text, labels, buckets)


_TABLE = (
    # ---- gateway: requests
    _counter(
        "requests_total",
        "requests",
        "Client requests that ended: ok, client_error, client_gone, client_stalled (did not read), "
        "refused (429), unavailable (503), poison (ended an engine), poison_refused (came again), "
        "failed.",
        "endpoint",
        "outcome",
    ),
    _counter(
        "refused_total",
        "requests",
        "Refused at the door (key, host, origin, content_type, operator).",
        "reason",
    ),
    _counter("retries_total", "attempts", "Attempts after a failed one."),
    _counter("hit_tokens_total", "tokens", "Prompt tokens whose KV was in DRAM."),
    _counter("recomputed_tokens_total", "tokens", "Prompt tokens without such KV."),
    _counter("lacking_tokens_total", "tokens", "Held, but without this part of the state.", "part"),
    _counter("planned_read_bytes_total", "bytes", "Read for plans.", "agent", "tier"),
    _gauge("gateway_active", "bool", "1 of the gateway that plans, 0 of a standby."),
    _gauge("gateway_term", "plan number", "First number of the active gateway's plans."),
    _counter(
        "gateway_takeovers_total", "takeovers", "From a gateway that was silent, by this one."
    ),
    _gauge("requests_in_flight", "requests", "Admitted parts of requests, now."),
    _gauge("requests_queued", "requests", "Those that wait for an engine."),
    _gauge("requests_without_engine", "requests", "Those that wait for one to come back."),
    _gauge("tenants_queued", "tenants", "Whose requests wait; tenants have no label."),
    _counter(
        "requests_displaced_total",
        "requests",
        "Turned away while queued, for a tenant that held less.",
    ),
    _histogram("queue_time_seconds", "s", _QUEUE_BUCKETS_S, "Wait for an engine, of each attempt."),
    _histogram(
        "time_to_first_token_seconds",
        "s",
        _TTFT_BUCKETS_S,
        "From arrival to the first token (not streamed: to P's answer).",
    ),
    _histogram(
        "read_time_ratio",
        "ratio",
        _RATIO_BUCKETS,
        "Time until a plan's reads were done, measured / estimated; above 1: slower than thought.",
    ),
    _histogram(
        "first_token_time_ratio",
        "ratio",
        _RATIO_BUCKETS,
        "Time from the plan to the first token, measured / what the choice to load or to "
        "recompute was made by.",
    ),
    # ---- gateway: processes
    _gauge("peer_up", "0 or 1", "Whether the process gives signs of life.", "agent", "engine"),
    _gauge("peer_draining", "0 or 1", "Whether it gets nothing new.", "agent", "engine"),
    _gauge("nodes", "nodes", "That serve, drain, or are gone (no lease).", "role", "state"),
    _gauge("node_lease_age_seconds", "s", "Since its last renewal.", "node"),
    _counter("node_changes_total", "changes", "Of who is there, seen from here.", "role", "change"),
    _counter("node_refusals_total", "nodes", "Not taken: settings, unreachable, name.", "reason"),
    _counter(
        "malformed_messages_total",
        "messages",
        "Dropped messages from the process.",
        "agent",
        "engine",
    ),
    _gauge(
        "read_backlog_seconds",
        "s",
        "Bytes promised and not yet read, at the rate reckoned with.",
        "agent",
    ),
    # ---- agent: DRAM and plans
    _gauge("agent_dram_slots", "slots", "Blocks that DRAM has room for."),
    _gauge("agent_dram_slots_available", "slots", "Those that are free or evictable now."),
    _gauge("agent_resident_blocks", "blocks", "Blocks in DRAM."),
    _gauge(
        "agent_blocks",
        "blocks",
        "Held: in DRAM only (volatile), on SSD or remote or both (durable).",
        "state",
    ),
    _gauge(
        "agent_persisting_blocks", "blocks", "Being pulled out of an engine, or written behind."
    ),
    _gauge(
        "agent_plans",
        "plans",
        "Shares of plans: waiting for slots, reading, or pinning what was read.",
        "state",
    ),
    _counter(
        "agent_hits_total", "blocks", "Blocks of plans, by the tier where they were found.", "tier"
    ),
    _counter(
        "agent_joined_reads_total",
        "blocks",
        "Blocks of plans that were being read for another plan, or pulled, already.",
    ),
    _counter(
        "agent_unavailable_blocks_total",
        "blocks",
        "Blocks of plans that no tier could give, or that exceed DRAM as a whole.",
    ),
    _counter("agent_expired_plans_total", "plans", "Settled by their deadline."),
    _counter(
        "agent_forgotten_plans_total", "plans", "Released by the store because nobody else did."
    ),
    _counter(
        "agent_refused_plans_total",
        "plans",
        "Not queued: the queue was full, or the plan was known already.",
    ),
    _counter(
        "agent_skipped_persists_total",
        "blocks",
        "Not pulled or not written for want of a slot or of room in the write queue.",
    ),
    _counter(
        "agent_failed_persists_total", "blocks", "Writes to SSD or remote that ended with an error."
    ),
    # ---- agent: each tier
    _gauge("agent_tier_bytes", "bytes", "Room that its blocks take.", "tier"),
    _gauge("agent_tier_capacity_bytes", "bytes", "What the tier may come to hold.", "tier"),
    _gauge("agent_tier_blocks", "blocks", "Blocks that it holds.", "tier"),
    _gauge(
        "agent_tier_blocks_in_flight",
        "blocks",
        "Whose read or write was asked for and has not ended.",
        "tier",
        "kind",
    ),
    _counter("agent_tier_hits_total", "blocks", "Blocks that were read, whole.", "tier"),
    _counter(
        "agent_evicted_blocks_total",
        "blocks",
        "That went, by cause: capacity, quota, slot-size, disk-space, dropped.",
        "tier",
        "cause",
    ),
    _gauge("agent_read_queue_bytes", "bytes", "Promised to plans and not read yet.", "tier"),
    _gauge("agent_read_queue_seconds", "s", "The same at the measured rate.", "tier"),
    _gauge(
        "agent_read_bytes_per_second",
        "bytes/s",
        "Measured while reads were outstanding; 0 until then.",
        "tier",
    ),
    _gauge("agent_tier_write_queue_bytes", "bytes", "To be written yet.", "tier"),
    _counter("agent_storage_read_bytes_total", "bytes", "Read from the tier.", "tier"),
    _counter("agent_storage_write_bytes_total", "bytes", "Written to the tier.", "tier"),
    _histogram(
        "agent_storage_read_seconds",
        "s",
        LATENCY_BUCKETS_S,
        "From submission to the end, of blocks read whole.",
        "tier",
    ),
    _histogram(
        "agent_storage_write_seconds",
        "s",
        LATENCY_BUCKETS_S,
        "From submission to the end, of blocks written.",
        "tier",
    ),
    _counter("agent_storage_read_errors_total", "blocks", "Reads that failed.", "tier"),
    _counter("agent_storage_write_errors_total", "blocks", "Writes that failed.", "tier"),
    _counter("agent_storage_retries_total", "calls", "Made once more after an error.", "tier"),
    _counter("agent_corrupt_blocks_total", "blocks", "Found damaged.", "tier"),
    _counter("agent_missing_blocks_total", "blocks", "Gone when they were to be read.", "tier"),
    _counter(
        "agent_other_version_blocks_total",
        "blocks",
        "Missing because they have another format version.",
        "tier",
    ),
    _gauge("agent_ssd_devices", "disks", "In use (used), or taken out (failed).", "state"),
    _gauge("agent_remote_packs", "objects", "Objects of the remote tier that are known."),
    _counter(
        "agent_remote_unreadable_packs_total",
        "objects",
        "Damaged beyond use, or of another format version.",
    ),
    _counter(
        "agent_remote_hedged_reads_total",
        "reads",
        "Asked for a second time because the first answer was late.",
    ),
    # ---- agent: transfers
    _gauge("agent_jobs", "jobs", "Deliveries and pulls, queued or under way.", "kind"),
    _gauge("agent_deliver_queue_bytes", "bytes", "Of accepted deliveries, not written yet."),
    _gauge(
        "agent_deliver_bytes_per_second",
        "bytes/s",
        "Measured while there was something to write; 0: not measured.",
    ),
    _counter("agent_deliveries_total", "jobs", "That ended: ok, failed, cancelled.", "outcome"),
    _counter("agent_delivered_bytes_total", "bytes", "Written into an engine.", "engine"),
    _counter("agent_pulls_total", "jobs", "That ended: ok, failed.", "outcome"),
    _counter("agent_pulled_bytes_total", "bytes", "Read out of engines."),
    _gauge("agent_quarantined_slots", "slots", "Out of use since bytes may still land in them."),
    _gauge("agent_landing_jobs", "jobs", "That failed, and whose bytes may be on their way."),
    _counter("agent_fences_total", "fences", "That passed: nothing failed was under way any more."),
    _counter("agent_malformed_messages_total", "messages", "Dropped, as they did not decode."),
    _counter(
        "agent_moved_bytes_total",
        "bytes",
        "Payload written to, or read from, each address; nic `lo` stays on the node.",
        "class",
        "operation",
        "nic",
        "peer",
    ),
    # ---- agent: pacing of each NIC
    _gauge("agent_pacer_bytes_per_second", "bytes/s", "The rate now.", "nic"),
    _gauge("agent_pacer_floor_bytes_per_second", "bytes/s", "The floor now.", "nic"),
    _gauge(
        "agent_pacer_others_bytes_per_second",
        "bytes/s",
        "What others send, as the pacer sees it.",
        "nic",
    ),
    _gauge("agent_pacer_waiting", "transfers", "That wait for their turn.", "nic"),
    _counter("agent_pacer_wait_seconds_total", "s", "What transfers have waited.", "nic"),
    _counter("agent_pacer_bytes_total", "bytes", "That were paced.", "nic"),
    _counter(
        "agent_pacer_floor_hits_total",
        "times",
        "The floor was above what was left, so that KV movement took more.",
        "nic",
    ),
    # ---- engine: transfers
    _gauge("engine_linked_agents", "agents", "That it is registered with: they may deliver to it."),
    _counter("engine_deliveries_total", "deliveries", "Asked for."),
    _counter("engine_deliveries_failed_total", "deliveries", "That failed."),
    _gauge("engine_open_jobs", "jobs", "Of agents, whose end is not known yet."),
    _gauge("engine_quarantined_pages", "pages", "Of jobs that are late or failed, and not over."),
    _counter("engine_fences_total", "fences", "That passed: nothing failed can land any more."),
    _counter("engine_fence_seconds_total", "s", "What they took, from the first question on."),
    _counter("engine_cut_connections_total", "connections", "Ended, as late bytes could come."),
    _counter("engine_blocks_offered_total", "blocks", "Whole blocks offered to the agent."),
    _counter("engine_blocks_stored_total", "blocks", "Those that the agent then held."),
    _counter("engine_offers_deferred_total", "offers", "Put off because too many pulls were open."),
    _counter("engine_snapshots_total", "snapshots", "Of recurrent layers, to store.", "outcome"),
    _counter("engine_witnesses_differing_total", "witnesses", "Kept ones unlike the engine's KV."),
    _gauge("engine_namespace_variant", "number", "Of the namespace its KV goes under; usually 0."),
    # ---- prefill engine: forwards
    _counter("engine_forwards_total", "forwards", "Prefill forwards."),
    _counter("engine_forward_seconds_total", "s", "Their time, without waits for KV."),
    _gauge("engine_forward_requests_max", "requests", "In one forward, at most so far."),
    _counter("engine_kv_wait_seconds_total", "s", "What forwards waited for KV.", "layer"),
    _gauge("engine_kv_bytes", "bytes", "Size of the KV pool."),
    _counter("engine_read_back_pages_total", "pages", "Of earlier chunks, for a layer window."),
    _counter("engine_suffix_sent_bytes_total", "bytes", "New KV sent layer by layer."),
    _counter(
        "engine_kv_checksum_mismatches_total",
        "requests",
        "Requests given up at a decode engine: their KV was not what the prefill engine sent.",
    ),
    _counter(
        "engine_layers_unseen_total",
        "layers",
        "Layers whose KV left only at the end of their forward, as no hook saw their attention.",
    ),
    _counter(
        "engine_suffix_late_seconds_total",
        "s",
        "What chunks waited for their sends after their forward.",
    ),
    _counter(
        "engine_moved_bytes_total",
        "bytes",
        "The same as agent_moved_bytes_total: KV that the engine has computed and sends layer by "
        "layer, and reads back for a layer window.",
        "class",
        "operation",
        "nic",
        "peer",
    ),
    # ---- prefill engine with a quota
    _counter("engine_quota_batches_total", "batches", "Prefill batches packed to a quota."),
    _counter(
        "engine_quota_exceeded_total", "batches", "Whose attention took longer than the quota."
    ),
    _counter("engine_attention_seconds_total", "s", "Attention in those batches, measured."),
    _counter("engine_attention_estimated_seconds_total", "s", "The same as estimated."),
)

METRICS = {metric.name: metric for metric in _TABLE}


# ---- showing ----------------------------------------------------------------------------

_HEADINGS = {
    "gateway": "**Of the gateway**",
    "agent": "**Of agents**; each sample has a label `agent` besides",
    "engine": "**Of engines**; each sample has a label `engine` besides",
}
_BLOCK = re.compile(r"(<!-- metrics: .*? -->\n).*?(<!-- /metrics -->)", re.DOTALL)


def help_markdown() -> str:
    """The tables of docs/operations.md."""
    lines = []
    for reporter, metrics in groupby(METRICS.values(), lambda metric: metric.reporter):
        lines += [f"{_HEADINGS[reporter]}:", ""]
        lines += ["| metric | kind | labels | unit | what |", "| --- | --- | --- | --- | --- |"]
        lines += [
            f"| `{PREFIX}{m.name}` | {m.kind.value} | {', '.join(m.labels) or '-'} | {m.unit} "
            f"| {m.help} |"
            for m in metrics
        ]
        lines.append("")
    return "\n".join(lines[:-1])


def main(page: Path) -> None:
    """Write the tables into the page, between its two marks."""
    page.write_text(_BLOCK.sub(lambda m: f"{m[1]}{help_markdown()}\n{m[2]}", page.read_text()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

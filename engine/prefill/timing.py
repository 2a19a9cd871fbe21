"""What a prefill engine knows of its own speed: clock, fits, and the quota built on them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import msgspec
import torch

from common.prefill_cost import PrefillCost
from common.samples import Sample, sample
from common.user_files import keep
from engine.prefill.cost_fit import CostFit, relative
from engine.prefill.forward_clock import ForwardClock, ForwardSample, Waits
from engine.prefill.quota_chunking import QuotaChunking
from engine.sglang.views import Scheduler
from engine.streams import Device

log = logging.getLogger(__name__)

T = TypeVar("T")


class QuotaUnusable(Exception):
    """The engine cannot pack batches to a quota; the text says what to change."""


class PrefillTiming:
    """Fitted costs of a whole forward, and of the attention in it, which the quota is about.

    The ranks that share requests must pack alike, as SGLang's ranks decide each for itself: all
    reckon with the slowest one's times. Each attention group of an engine packs its own
    requests by its own times, to the same quota; only the profile is taken, forward by
    forward, by all groups together. ``waits`` says what forwards have spent waiting
    for KV so far; ``device`` is one with streams.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        quota_s: float | None,
        waits: Callable[[], Waits] = Waits,
        device: Device | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._quota_s = quota_s
        ranks_pack = quota_s is not None and scheduler.server_args.tp_size > 1
        self._group = scheduler.attn_tp_cpu_group if ranks_pack else None
        self._all_groups = scheduler.tp_cpu_group if ranks_pack else None
        self._window_tokens = scheduler.sliding_window_size or 0
        self.forward, self.attention = self._fit(), self._fit()
        self.quota: QuotaChunking | None = None
        self._forwards = 0
        self._requests_max = 0
        self._forward_s = 0.0
        self.clock = ForwardClock(device, waits, self._slowest, self._note)

    def start_quota(self, model_digest: str, page_tokens: int) -> None:
        """Profile the engine, or read its last profile, and pack to the quota from now on.

        Without a quota, do nothing. Raises :class:`QuotaUnusable`.
        """
        if self._quota_s is None:
            return
        if self._scheduler.chunked_prefill_size is None:
            raise QuotaUnusable(
                "--prefill-quota-ms cuts prompts into chunks, which --chunked-prefill-size -1 "
                "switches off: take one of the two out"
            )
        packing, self._group = self._group, self._all_groups
        samples = self._profile(model_digest)
        self._group = packing
        attention = self._fitted(samples, "attention_s")
        if attention is None:
            raise QuotaUnusable(
                "--prefill-quota-ms: attention inside captured graphs cannot be timed; add "
                "--cuda-graph-backend-prefill disabled to --prefill-args"
            )
        self.forward = self._fit(self._fitted(samples, "forward_s"))
        self.attention = self._fit(attention)
        self.quota = QuotaChunking(self.attention, self._quota_s, page_tokens)
        log.info("prefill batches get quota_s=%g, reckoned by %s", self._quota_s, attention)

    def samples(self) -> Iterator[Sample]:
        """For the metrics. What forwards wait for KV is not in their seconds."""
        yield sample("engine_forwards_total", self._forwards)
        yield sample("engine_forward_requests_max", self._requests_max)
        yield sample("engine_forward_seconds_total", self._forward_s)
        if (quota := self.quota) is not None:
            yield sample("engine_quota_batches_total", quota.batches_total)
            yield sample("engine_quota_exceeded_total", quota.over_quota_total)
            yield sample("engine_attention_seconds_total", quota.attention_s_total)
            yield sample("engine_attention_estimated_seconds_total", quota.estimated_s_total)

    def _profile(self, model_digest: str) -> list[ForwardSample]:
        # Here, since they import parts of SGLang that are not needed without a quota.
        from engine.prefill import profile as prefill_profile
        from engine.sglang.prefill.made_up_forwards import MadeUpForwards

        forwards = MadeUpForwards(self._scheduler)
        path = prefill_profile.profile_path(forwards, model_digest)
        kept = self._of_first_rank(prefill_profile.load(path))
        if kept is not None:
            return kept
        samples = prefill_profile.take(forwards, self.clock)
        if self._group is None or torch.distributed.get_rank(self._group) == 0:
            keep(path, msgspec.json.encode(samples))
        return samples

    def _fit(self, profile: PrefillCost | None = None) -> CostFit:
        return CostFit(profile, self._window_tokens)

    def _fitted(self, samples: Iterable[ForwardSample], measured: str) -> PrefillCost | None:
        fit = self._fit()
        for forward in samples:
            if seconds := getattr(forward, measured):
                fit.note(forward.new_tokens, forward.context_tokens, seconds, relative(seconds))
        return fit.cost()

    def _note(self, sample: ForwardSample) -> None:
        self._forwards += 1
        self._requests_max = max(self._requests_max, len(sample.new_tokens))
        self._forward_s += sample.forward_s
        self.forward.note(sample.new_tokens, sample.context_tokens, sample.forward_s)
        if sample.attention_s:
            self.attention.note(sample.new_tokens, sample.context_tokens, sample.attention_s)
        if self.quota is not None:
            self.quota.took(sample)

    def _slowest(self, seconds: list[float]) -> list[float]:
        if self._group is None:
            return seconds
        of_ranks = torch.tensor(seconds, dtype=torch.float64)
        torch.distributed.all_reduce(of_ranks, torch.distributed.ReduceOp.MAX, self._group)
        return of_ranks.tolist()

    def _of_first_rank(self, value: T) -> T:
        if self._group is None:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, group=self._group, group_src=0)
        return values[0]

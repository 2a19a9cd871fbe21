"""A token is drawn from what a request's grammar leaves."""

from __future__ import annotations

from typing import Any

import torch

from engine.sglang.border import Use

USES = (
    Use(
        "sampling.sampling_batch_info.SamplingBatchInfo.grammar_mask",
        "whether a request of the batch has a grammar",
    ),
)


def after_grammar(result: Any, sampling_info: Any, logits: torch.Tensor, *_: Any) -> None:
    """AFTER ``SamplingBatchInfo._apply_post_grammar_logits_transforms``, which follows the mask of
    the grammars, (requests, vocabulary): where a mask leaves no token at all, each is as good. The
    grammar takes none of them, for which SGLang fails that request alone."""
    if sampling_info.grammar_mask is not None:
        nothing_left = logits.amax(dim=-1, keepdim=True) == -torch.inf
        logits.masked_fill_(nothing_left, 0.0)

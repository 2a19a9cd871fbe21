"""Drafts of one step (EAGLE, MTP) on a CPU: SGLang's own code, some of whose triton kernels are
interpreted (``TRITON_INTERPRET``)."""

from __future__ import annotations

from typing import Any

import torch

from engine.sglang.border import Use
from engine.sglang.cpu.sparse.attention import SparseAttention

USES = (
    Use(
        "speculative.draft_utils.DraftBackendFactory.draft_model_runner",
        "what the attention of a draft is made of",
    ),
)


def build_chain(
    parents: torch.Tensor,
    scores: torch.Tensor,
    seq_lens: torch.Tensor,
    tree_mask: torch.Tensor,
    positions: torch.Tensor,
    index: torch.Tensor,
    next_token: torch.Tensor,
    next_sibling: torch.Tensor,
    topk: int,
    steps: int,
    verified: int,
    mask_mode: object,
) -> None:
    """For ``build_tree_kernel_efficient_func``: of each request ``verified`` tokens follow each
    other. Writes ``positions`` and the links, shape (requests, verified)."""
    if topk != 1:
        raise NotImplementedError("--speculative-eagle-topk above 1: use a GPU")
    order = torch.arange(verified)
    positions.copy_((seq_lens[:, None] + order).flatten())
    index.copy_(torch.arange(index.numel()).view_as(index))
    next_token.copy_(torch.where(order + 1 < verified, order + 1, -1).expand_as(next_token))
    next_sibling.fill_(-1)


def verify_chain(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    target_predict: torch.Tensor,
    **_: object,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For ``verify_tree_greedy_func``: a token of the draft counts if it and all before it are
    the model's. Writes and returns the first three."""
    requests, verified = candidates.shape
    chosen = target_predict.view(requests, verified)
    right = (candidates[:, 1:] == chosen[:, :-1]).long().cumprod(1).sum(1)
    accept_token_num.copy_(right)
    is_kept = torch.arange(verified) <= right[:, None]
    rows = torch.arange(requests * verified).view(requests, verified)
    accept_index[:, :verified] = torch.where(is_kept, rows, -1)
    predicts[rows[is_kept]] = chosen[is_kept].to(predicts.dtype)
    return predicts, accept_index, accept_token_num


def sparse_backend(factory: Any) -> tuple[str, SparseAttention]:
    """For ``DraftBackendFactory._create_dsa_prefill_backend``."""
    return "dsa", SparseAttention(factory.draft_model_runner)


def offer() -> None:
    """What the hooks do not reach."""
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda *_: None

"""The trace's requests as lengths: what of each prompt a perfect cache holds, what is new."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.trace import HASH_BLOCK_TOKENS, PAGE_TOKENS, TraceRequest, load_trace
from scheduler.quota import Chunk

TRACE = Path(__file__).parents[1] / "traces" / "mooncake_conversation_cut.jsonl"


def chunks_of(trace: Sequence[TraceRequest]) -> list[Chunk]:
    """Each request in the trace's order: the leading blocks that an earlier one had are cached,
    in whole pages; at least one token is new."""
    seen: set[int] = set()
    chunks = []
    for request in trace:
        blocks = 0
        while blocks < len(request.hash_ids) and request.hash_ids[blocks] in seen:
            blocks += 1
        seen.update(request.hash_ids)
        cached = _whole_pages(min(blocks * HASH_BLOCK_TOKENS, request.input_tokens - 1))
        chunks.append(Chunk(cached, request.input_tokens - cached))
    return chunks


def trace_chunks() -> list[Chunk]:
    """Of the cut of Mooncake's conversation trace in this repository: 228 requests."""
    return chunks_of(load_trace(TRACE))


def scaled(chunk: Chunk, divisor: int, context_max: int, new_max: int) -> Chunk:
    """For a small model on a slow machine: lengths shrink alike, the longest are clipped."""
    context = _whole_pages(min(chunk.context_tokens // divisor, context_max))
    return Chunk(context, max(1, min(chunk.new_tokens // divisor, new_max)))


def _whole_pages(tokens: int) -> int:
    return tokens // PAGE_TOKENS * PAGE_TOKENS

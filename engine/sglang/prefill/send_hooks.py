"""SGLang's own send of a chunk, which the layers have gone ahead of
(:mod:`engine.prefill.suffix_send`)."""

from __future__ import annotations

from functools import partial
from typing import Any

from engine.prefill.suffix_send import SendsDone
from engine.sglang.prefill.forward_hooks import forwards


def around_add_transfer(
    original: Any,
    manager: Any,
    bootstrap_room: int,
    kv_indices: Any,
    index_slice: slice,
    is_last_chunk: bool,
    aux_index: int | None = None,
    state_indices: Any = None,
    *args: Any,
    wait_event: Any = None,
    **kwargs: Any,
) -> Any:
    """AROUND ``MooncakeKVManager.add_transfer_request``: a chunk whose layers went out by
    themselves has no pages left to send, nor index keys, which SGLang sends with the last chunk,
    as it does windows; its message to the decode engine waits for them. With a layer window
    others have nothing to send any more, so they fail."""
    followed = forwards()
    if followed is not None:
        sends = followed.suffix.claim(bootstrap_room, index_slice.stop, is_last_chunk)
        if sends is not None:
            kv_indices = kv_indices[:0]
            if followed.suffix.sends_index_keys:
                state_indices = None
            wait_event = SendsDone(partial(followed.suffix.settle, bootstrap_room, sends))
        elif followed.window is not None and len(kv_indices):
            reason = "its KV could not leave layer by layer (unlike --tp?)"
            followed.suffix.refuse(bootstrap_room, reason)
            return None
    return original(
        manager,
        bootstrap_room,
        kv_indices,
        index_slice,
        is_last_chunk,
        aux_index,
        state_indices,
        *args,
        wait_event=wait_event,
        **kwargs,
    )


def around_drained_abort(original: Any, manager: Any, room: int) -> None:
    """AROUND ``MooncakeKVManager._maybe_ack_drained_abort``: not while our writes are in
    flight; the last of them asks again."""
    followed = forwards()
    if followed is None or not followed.suffix.is_in_flight(room):
        original(manager, room)

"""Where the events of :mod:`engine.ranks.group` travel: in SGLang's own broadcast."""

from __future__ import annotations

from typing import Any

from engine.runtime import runtime_if_up


def around_broadcast(
    original: Any, receiver: Any, recv_reqs: list[Any] | None, local_reqs: Any = None
) -> list[Any]:
    """AROUND ``SchedulerRequestReceiver._broadcast_reqs_across_ranks``: SGLang broadcasts
    ``local_reqs``, which the leader itself has made, with those that came in."""
    engine = runtime_if_up()
    if engine is None:
        return original(receiver, recv_reqs, local_reqs)
    events = engine.ranks.take() if engine.ranks.is_leader else []
    return engine.ranks.arrived(original(receiver, recv_reqs, [*(local_reqs or []), *events]))

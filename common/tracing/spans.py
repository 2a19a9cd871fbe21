"""What processes say of a request's way. Without a collector it goes nowhere, and nothing of
OpenTelemetry is imported: :mod:`common.tracing.otlp` is, where one is named.

Spans hold sizes, times, outcomes and names of processes; never a word of a prompt or of an answer.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence

TRACEPARENT = "traceparent"
"""W3C's header: trace, span, and whether they are recorded."""
OK = "ok"

Attribute = str | int | float | Sequence[str]
Attributes = Mapping[str, Attribute]
"""By name, without ``dualpath.`` before it."""
NONE: Attributes = {}

_PACKAGES = (
    "opentelemetry.sdk.trace",
    "opentelemetry.exporter.otlp.proto.grpc",
    "opentelemetry.exporter.otlp.proto.http",
)
"""SGLang's own tracing imports them all, whichever protocol is used."""


class Span:
    """One that nobody records."""

    @property
    def headers(self) -> Mapping[str, str]:
        """With which another process goes on in it."""
        return {}

    @property
    def traceparent(self) -> str:
        """The same in a message of ours."""
        return self.headers.get(TRACEPARENT, "")

    def child(self, name: str) -> Span:
        """Begin one inside it."""
        return self

    def note(
        self, name: str, begun_s: float, attributes: Attributes = NONE, error: str = ""
    ) -> None:
        """One inside it that is over by now; ``begun_s``: when it began (monotonic)."""

    def set(self, attributes: Attributes) -> None:
        """Say more of it."""

    def end(self, outcome: str, is_error: bool = False) -> None:
        """It is over; only the first call counts."""


NO_SPAN = Span()


class Tracer:
    """Of a process that tells nobody."""

    def request(self, name: str, headers: Mapping[str, str]) -> Span:
        """Begin a client's request, in the client's trace if its headers name one."""
        return NO_SPAN

    def follow(self, traceparent: str) -> Span:
        """Another process's span, to add to."""
        return NO_SPAN

    def close(self) -> None:
        """What is not told by now has a moment for it."""


def make_tracer(endpoint: str, service: str, process: str) -> Tracer:
    """``endpoint``: of a collector, or empty; ``process``: which one of its service."""
    if not endpoint:
        return Tracer()
    from common.tracing.otlp import CollectorTracer

    return CollectorTracer(endpoint, service, process)


def missing_packages() -> list[str]:
    """Of those that traces need."""
    return [name for name in _PACKAGES if not _is_there(name)]


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # not even what it is in
        return False

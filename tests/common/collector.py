"""A collector of OpenTelemetry traces (OTLP over gRPC) that keeps what it gets in memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Sent
from opentelemetry.proto.trace.v1.trace_pb2 import Status


@dataclass(frozen=True)
class Span:
    """One that has come."""

    name: str
    service: str
    process: str
    trace: str
    id: str
    parent: str
    """Empty: it has none."""
    begun_ns: int
    ended_ns: int
    is_error: bool
    attributes: dict[str, Any]

    @property
    def outcome(self) -> Any:
        return self.attributes.get("dualpath.outcome")


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Every span, in the order in which they came."""

    def __init__(self) -> None:
        self.endpoint = ""
        self._spans: list[Span] = []
        self._came = threading.Condition()

    def Export(self, request: Any, context: Any) -> Any:
        came = []
        for of_process in request.resource_spans:
            resource = _values(of_process.resource.attributes)
            for scope in of_process.scope_spans:
                came += [_read(span, resource) for span in scope.spans]
        with self._came:
            self._spans += came
            self._came.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    @property
    def spans(self) -> list[Span]:
        with self._came:
            return list(self._spans)

    def wait(
        self, matches: Callable[[Span], bool], count: int = 1, timeout_s: float = 60
    ) -> list[Span]:
        """The spans for which ``matches`` holds, once there are ``count``."""
        until = time.monotonic() + timeout_s
        while True:
            with self._came:
                found = [span for span in self._spans if matches(span)]
                if len(found) >= count:
                    return found
                left_s = until - time.monotonic()
                assert left_s > 0, [(s.service, s.process, s.name) for s in self._spans]
                self._came.wait(left_s)

    def named(self, name: str, count: int = 1) -> list[Span]:
        return self.wait(lambda span: span.name == name, count)

    def ancestors(self, span: Span) -> list[Span]:
        """Its parent first; ends at one that was never sent."""
        by_id = {one.id: one for one in self.spans}
        found = []
        while span.parent in by_id:
            span = by_id[span.parent]
            found.append(span)
        return found


def _values(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    return getattr(value, kind) if kind else None


def _read(span: Sent, resource: dict[str, Any]) -> Span:
    return Span(
        name=span.name,
        service=resource.get("service.name", ""),
        process=resource.get("service.instance.id", ""),
        trace=span.trace_id.hex(),
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        begun_ns=span.start_time_unix_nano,
        ended_ns=span.end_time_unix_nano,
        is_error=span.status.code == Status.STATUS_CODE_ERROR,
        attributes=_values(span.attributes),
    )


@contextmanager
def running_collector() -> Iterator[Collector]:
    """Listens on the loopback."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    collector.endpoint = f"127.0.0.1:{port}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(None).wait(5)


TRACE = "0af7651916cd43dd8448eb211c80319c"
CLIENT = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{CLIENT}-01"
"""Of a client that has a span of its own."""
NOT_SAMPLED = f"00-{TRACE}-{CLIENT}-00"

"""Spans to a collector, by OTLP: the only module that imports OpenTelemetry's SDK.

The process's own tracer provider is used, never the global one: FastAPI would make spans of every
request with that. A thread sends; whoever ends a span only appends it to a bounded queue, so a
collector that is slow or away costs spans, never a request.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter
from opentelemetry.sdk.environment_variables import OTEL_EXPORTER_OTLP_TRACES_PROTOCOL
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from common.tracing.spans import NO_SPAN, NONE, TRACEPARENT, Attributes, Span, Tracer

QUEUE_SPANS = 4096
"""Ended and not sent yet; beyond it the oldest go."""
BATCH_SPANS = 512
SEND_EVERY_MS = 500
SEND_TIMEOUT_S = 5.0
CLOSE_S = 0.5
PREFIX = "dualpath."

_W3C = TraceContextTextMapPropagator()


class CollectorTracer(Tracer):
    """Of a process whose spans go to ``endpoint``: HOST:PORT, or with
    OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=http/protobuf a URL, as SGLang has it. Which requests are
    sampled is OpenTelemetry's OTEL_TRACES_SAMPLER: all, unless the client says otherwise."""

    def __init__(self, endpoint: str, service: str, process: str) -> None:
        names = {
            "service.name": service,
            "service.instance.id": process,
            "host.name": socket.gethostname(),
        }
        self._provider = TracerProvider(resource=Resource.create(names), shutdown_on_exit=False)
        self._provider.add_span_processor(
            BatchSpanProcessor(
                _exporter(endpoint),
                max_queue_size=QUEUE_SPANS,
                schedule_delay_millis=SEND_EVERY_MS,
                max_export_batch_size=BATCH_SPANS,
            )
        )
        self._tracer = self._provider.get_tracer("dualpath")

    def request(self, name: str, headers: Mapping[str, str]) -> Span:
        parent = _W3C.extract(headers, Context())
        return _Span(
            self._tracer, self._tracer.start_span(name, parent, SpanKind.SERVER), is_ours=True
        )

    def follow(self, traceparent: str) -> Span:
        parent = trace.get_current_span(_W3C.extract({TRACEPARENT: traceparent}, Context()))
        if not parent.get_span_context().trace_flags.sampled:
            return NO_SPAN
        return _Span(self._tracer, parent, is_ours=False)

    def close(self) -> None:
        # The SDK's own waits last up to half a minute.
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_S)


class _Span(Span):
    def __init__(self, tracer: trace.Tracer, span: trace.Span, is_ours: bool) -> None:
        self._tracer = tracer
        self._span = span
        self._inside = trace.set_span_in_context(span, Context())
        self._is_open = is_ours

    @property
    def headers(self) -> Mapping[str, str]:
        carrier: dict[str, str] = {}
        _W3C.inject(carrier, self._inside)
        return carrier

    def child(self, name: str) -> Span:
        return _Span(self._tracer, self._tracer.start_span(name, self._inside), is_ours=True)

    def note(
        self, name: str, begun_s: float, attributes: Attributes = NONE, error: str = ""
    ) -> None:
        began_ns = time.time_ns() - int((time.monotonic() - begun_s) * 1e9)
        span = self._tracer.start_span(name, self._inside, start_time=began_ns)
        span.set_attributes(_named(attributes))
        if error:
            span.set_status(Status(StatusCode.ERROR, error))
        span.end()

    def set(self, attributes: Attributes) -> None:
        self._span.set_attributes(_named(attributes))

    def end(self, outcome: str, is_error: bool = False) -> None:
        if not self._is_open:
            return
        self._is_open = False
        self.set({"outcome": outcome})
        if is_error:
            self._span.set_status(Status(StatusCode.ERROR, outcome))
        self._span.end()


def _exporter(endpoint: str) -> SpanExporter:
    protocol = os.environ.get(OTEL_EXPORTER_OTLP_TRACES_PROTOCOL, "grpc")
    if protocol == "http/protobuf":
        return HttpExporter(endpoint, timeout=SEND_TIMEOUT_S)
    return GrpcExporter(endpoint, insecure=True, timeout=SEND_TIMEOUT_S)


def _named(attributes: Attributes) -> Attributes:
    return {PREFIX + name: value for name, value in attributes.items()}

"""What a client is told when it does not get an answer: one error for each kind of end.

The body has OpenAI's shape, ``{"error": {message, type, param, code}}``, on every
endpoint, because SGLang's native clients look for ``error`` too.
"""

from __future__ import annotations

import msgspec


class GatewayError(Exception):
    """An end of a request that the gateway words itself."""

    status = 500
    kind = "internal_server_error"
    outcome = "failed"
    """Label of ``dualpath:requests_total``."""
    retry_after_s: int | None = None
    content_type = "application/json"

    def body(self) -> bytes:
        """The JSON body of the HTTP answer."""
        return msgspec.json.encode({"error": self._fields()})

    def event(self) -> bytes:
        """The same inside a stream whose headers are out already."""
        return b"data: " + msgspec.json.encode({"error": self._fields()}) + b"\n\n"

    def headers(self) -> dict[str, str]:
        retry_after_s = self.retry_after_s
        return {} if retry_after_s is None else {"retry-after": str(retry_after_s)}

    def _fields(self) -> dict[str, object]:
        return {"message": str(self), "type": self.kind, "param": None, "code": self.status}


class BadRequest(GatewayError):
    """The request is not one that the cluster can serve; sending it again changes nothing."""

    status = 400
    kind = "invalid_request_error"
    outcome = "client_error"


class NotFound(GatewayError):
    """An operator named something that is not there."""

    status = 404
    kind = "not_found_error"
    outcome = "client_error"


class TooManyRequests(GatewayError):
    """As many requests are in flight as ``requests_max`` admits."""

    status = 429
    kind = "rate_limit_error"
    outcome = "refused"

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(GatewayError):
    """No engine can take the request."""

    status = 503
    kind = "service_unavailable_error"
    outcome = "unavailable"
    retry_after_s = 5
    """As long as a silent engine is waited for; how long a restart takes is not known here."""


class RequestTimeout(GatewayError):
    """The request took longer than ``request_timeout_s``."""

    status = 504
    kind = "timeout_error"


class ClientStalled(GatewayError):
    """The client did not read its answer: said to whoever may still look."""

    status = 408
    kind = "timeout_error"
    outcome = "client_stalled"


class RequestFailed(GatewayError):
    """An engine failed with the request, and trying again was no option or failed too."""

    status = 502
    kind = "engine_error"


class EngineRefused(GatewayError):
    """An engine answered 4xx: the client gets that answer, unchanged."""

    outcome = "client_error"

    def __init__(self, status: int, content_type: str, body: bytes) -> None:
        super().__init__(f"refused by the engine with status {status}")
        self.status = status
        self.content_type = content_type
        self._body = body

    def body(self) -> bytes:
        return self._body

    def _fields(self) -> dict[str, object]:
        try:
            answer = msgspec.json.decode(self._body, type=dict[str, object])
        except (msgspec.DecodeError, msgspec.ValidationError):
            return super()._fields()
        error = answer.get("error", answer)
        return error if isinstance(error, dict) else super()._fields()


class AttemptFailed(Exception):
    """One try at serving a request failed before the client got a byte of an answer.

    ``dead``: engines that must not be tried again with this request.
    """

    def __init__(self, reason: str, dead: frozenset[str] = frozenset()) -> None:
        super().__init__(reason)
        self.dead = dead

"""What a client is told when it does not get an answer: one error for each kind of end.

The body has the shape of OpenAI's and of Anthropic's errors at once, ``{"type": "error",
"error": {message, type, param, code}}``, on every endpoint; SGLang's native clients look for
``error`` too.
"""

from __future__ import annotations

from enum import Enum

import msgspec

FAULTS = ("failed", "unavailable", "poison")
"""Outcomes of requests that are no choice of the client's."""


class GatewayError(Exception):
    """An end of a request that the gateway words itself."""

    status = 500
    kind = "internal_server_error"
    outcome = "failed"
    """Label of ``dualpath:requests_total``."""
    retry_after_s: int | None = None
    content_type = "application/json"
    param: str | None = None
    """The field of the request that was at fault."""

    def body(self) -> bytes:
        """The JSON body of the HTTP answer."""
        return msgspec.json.encode({"type": "error", "error": self._fields()})

    def event(self, named: bool = False) -> bytes:
        """The same inside a stream whose headers are out already. ``named``: where all events
        have names."""
        return (b"event: error\n" if named else b"") + b"data: " + self.body() + b"\n\n"

    def headers(self) -> dict[str, str]:
        retry_after_s = self.retry_after_s
        return {} if retry_after_s is None else {"retry-after": str(retry_after_s)}

    def _fields(self) -> dict[str, object]:
        return {
            "message": str(self),
            "type": self.kind,
            "param": self.param,
            "code": self.status,
        }


class BadRequest(GatewayError):
    """The request is not one that the cluster can serve; sending it again changes nothing."""

    status = 400
    kind = "invalid_request_error"
    outcome = "client_error"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class BodyTooLarge(BadRequest):
    """The body is larger than ``body_bytes_max``; the rest of it is not read."""

    status = 413


class BodyTooSlow(BadRequest):
    """The body did not come in time."""

    status = 408


class NotFound(GatewayError):
    """An operator named something that is not there."""

    status = 404
    kind = "not_found_error"
    outcome = "client_error"


class Conflict(GatewayError):
    """A node cannot be taken into the cluster as it is, or (with ``retry_after_s``) not yet."""

    class Reason(Enum):
        """In a word."""

        SETTINGS = "settings"
        """Unlike those of the others."""
        UNREACHABLE = "unreachable"
        """It could not reach those that are there."""
        NAME = "name"
        """Others have it, or that of one of its processes."""

    status = 409
    kind = "conflict_error"
    outcome = "client_error"

    def __init__(self, message: str, reason: Reason, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


class NoSuchRoute(GatewayError):
    """The path is none of the gateway's, or not with this method; or one of SGLang's that has no
    place here (``why``)."""

    kind = "not_found_error"
    outcome = "client_error"

    def __init__(self, status: int, route: str, why: str = "") -> None:
        super().__init__(f"{route} is not served: {why}." if why else f"There is no route {route}.")
        self.status = status


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

    def __init__(self, message: str, retry_after_s: int = 5) -> None:
        """By default, as long as a silent engine is waited for."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RequestTimeout(GatewayError):
    """The request took longer than ``request_timeout_s``."""

    status = 504
    kind = "timeout_error"


class ClientStalled(GatewayError):
    """The client did not read its answer: said to whoever may still look."""

    status = 408
    kind = "timeout_error"
    outcome = "client_stalled"


class Poisoned(GatewayError):
    """The request has ended an engine, now or before; sending it again would end another."""

    status = 422
    kind = "invalid_request_error"

    def __init__(self, message: str, outcome: str = "poison") -> None:
        super().__init__(message)
        self.outcome = outcome


class RequestFailed(GatewayError):
    """An engine failed with the request, and trying again was no option or failed too."""

    status = 502
    kind = "engine_error"


class EngineRefused(GatewayError):
    """An engine answered 4xx: the client gets its words, in the shape of all errors.

    SGLang has three shapes: flat (``{"object": "error", "message": ...}``), nested under
    ``error``, and FastAPI's ``{"detail": ...}``.
    """

    kind = "invalid_request_error"
    outcome = "client_error"

    def __init__(self, status: int, body: bytes) -> None:
        fields = _error_fields(body)
        super().__init__(str(fields.get("message") or fields.get("detail") or "refused"))
        self.status = status
        param = fields.get("param")
        self.param = param if isinstance(param, str) else None


def _error_fields(body: bytes) -> dict[str, object]:
    try:
        answer = msgspec.json.decode(body, type=dict[str, object])
    except (msgspec.DecodeError, msgspec.ValidationError):
        return {"message": body[:500].decode(errors="replace")}
    error = answer.get("error", answer)
    return error if isinstance(error, dict) else {"message": str(error)}


class AttemptFailed(Exception):
    """One try at serving a request failed."""


class Aborted(AttemptFailed):
    """Engines were told to end the request, and it had no token yet."""


class PlanStale(AttemptFailed):
    """An engine has other weights than the plan was made for, and has computed nothing of it."""

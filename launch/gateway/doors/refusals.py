"""What is answered at the door."""

from __future__ import annotations

from launch.gateway.errors import GatewayError


class Refusal(GatewayError):
    """Nothing of the request was looked at."""

    outcome = "client_error"
    reason = ""
    """Label of ``dualpath:refused_total``."""


class Unauthorized(Refusal):
    """No key, or none that is known."""

    status = 401
    kind = "authentication_error"
    reason = "key"

    def headers(self) -> dict[str, str]:
        return {"www-authenticate": "Bearer"}


class Forbidden(Refusal):
    """Not from there."""

    status = 403
    kind = "permission_error"

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class NotJson(Refusal):
    """A body of another type, such as a form of a web page."""

    status = 415
    kind = "invalid_request_error"
    reason = "content_type"

"""An engine's own HTTP port is the gateway's: SGLang's ``--api-key``, from where no command line
and no log shows it."""

from __future__ import annotations

from typing import Any

import requests

from engine.config import EngineConfig
from engine.sglang.border import Use

USES = (
    Use("server_args.ServerArgs.api_key", "the key that every call must have, as if it were given"),
)


def after_from_cli_args(server_args: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``ServerArgs.from_cli_args``: what was asked for is known, and nothing is made of it
    yet. A key that somebody starts an engine with by hand stays."""
    server_args.api_key = server_args.api_key or EngineConfig.from_env().http_key or None


def after_resolved_dict(resolved: dict[str, Any], server_args: Any) -> dict[str, Any]:
    """AFTER ``ServerArgs.resolved_dict``, which is for logs and for who asks an engine how it was
    started."""
    return resolved | {"api_key": "..."} if resolved.get("api_key") else resolved


def after_recompute_session(
    session: requests.Session, *args: object, **kwargs: object
) -> requests.Session:
    """AFTER ``CommonKVManager._get_prefill_recompute_session``, by which a decode engine asks a
    prefill engine to compute anew what was retracted. One cluster's engines have one key."""
    if key := EngineConfig.from_env().http_key:
        session.headers["authorization"] = f"Bearer {key}"
    return session

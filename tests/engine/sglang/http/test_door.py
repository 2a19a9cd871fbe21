"""An engine's HTTP port takes the gateway's key alone, and no log shows it."""

from __future__ import annotations

import pytest
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.auth import AuthLevel, decide_request_auth

from common.process_settings import SECRETS
from common.user_files import write_private
from engine.config import EngineConfig
from engine.sglang.http.door import after_from_cli_args, after_resolved_dict

ENGINE = EngineConfig("p0", "prefill", [], "agent-p0", {}, http_key="hush")


@pytest.fixture
def started(monkeypatch, tmp_path) -> None:
    """As an engine's process is."""
    write_private(tmp_path / "secrets", ENGINE.secrets())
    for name, value in ENGINE.to_env().items():
        assert "hush" not in value
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(SECRETS, str(tmp_path / "secrets"))


def is_let_in(args: ServerArgs, header: str | None) -> bool:
    """By SGLang itself."""
    return decide_request_auth(
        method="POST",
        path="/generate",
        authorization_header=header,
        api_key=args.api_key,
        admin_api_key=args.admin_api_key,
        auth_level=AuthLevel.ADMIN_OPTIONAL,
    ).allowed


def test_sglang_asks_for_the_gateways_key(started):
    args = ServerArgs(model_path="model")
    after_from_cli_args(args)
    assert is_let_in(args, "Bearer hush") and not is_let_in(args, "Bearer h")
    assert not is_let_in(args, None)
    by_hand = ServerArgs(model_path="model", api_key="mine")
    after_from_cli_args(by_hand)
    assert by_hand.api_key == "mine"


def test_what_is_logged_of_the_flags_shows_no_key():
    assert after_resolved_dict({"api_key": "hush", "port": 1}, None) == {
        "api_key": "...",
        "port": 1,
    }
    assert after_resolved_dict({"api_key": None}, None) == {"api_key": None}

"""A process's secrets are in a private file, not in its environment."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from common.process_settings import SECRETS, BadSettings, ProcessSettings
from common.user_files import write_private


class Settings(ProcessSettings, frozen=True):
    VARIABLE: ClassVar[str] = "TEST_SETTINGS"
    SECRET: ClassVar[tuple[str, ...]] = ("password", "options")

    name: str
    password: str = ""
    options: dict[str, bytes] = {}


def test_secrets_come_from_the_file_alone(tmp_path: Path):
    settings = Settings("p0", "hush", {"token": b"\0hush"})
    env, file = settings.to_env(), tmp_path / "p0.secrets"
    assert "password" not in env["TEST_SETTINGS"] and "token" not in env["TEST_SETTINGS"]
    write_private(file, settings.secrets())
    write_private(file, settings.secrets())  # as at a restart
    assert file.stat().st_mode & 0o777 == 0o600
    assert Settings.from_env({**env, SECRETS: str(file)}) == settings
    assert Settings.from_env(env) == Settings("p0")
    assert Settings("p0").secrets() == b""


def test_a_file_that_is_gone_is_an_error(tmp_path: Path):
    env = {**Settings("p0").to_env(), SECRETS: str(tmp_path / "none")}
    with pytest.raises(BadSettings, match="none"):
        Settings.from_env(env)

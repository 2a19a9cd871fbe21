"""Entry point of the SGLang plugin. What it hooks is listed in :mod:`engine.sglang.hooks`."""

from __future__ import annotations

import os

from engine.config import EngineConfig
from engine.ranks.device import device_of


def register() -> None:
    """Entry point of group ``sglang.srt.plugins``; runs in every SGLang process."""
    from engine.sglang.cpu import platform as cpu_platform

    try:
        if cpu_platform.is_active():
            cpu_platform.register_fixes()
        if EngineConfig.VARIABLE in os.environ:
            _install()
    except Exception as error:  # SGLang would make a line in its log of it, and start without us
        raise SystemExit(f"DualPath's plugin cannot start: {error!r}") from error


def _install() -> None:
    from engine.sglang import border, hooks

    config = EngineConfig.from_env()
    if config.spanned_from:
        # By itself gloo takes what the host's name resolves to, which is often the loopback.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", device_of(config.spanned_from))
    border.install(hooks.OF_ROLE[config.role])

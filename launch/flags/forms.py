"""How the settings of this project are written, beside the forms of :mod:`launch.settings`."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from launch import settings
from launch.gateway.doors.keys import keys_text, read_keys
from launch.settings import Form, near, secret
from scheduler.policies import POLICY_NAMES, UnknownPolicy, read_policy
from storage.index.owners import Quota, read_quotas
from transfer.pacing.pacer import Pace, read_pace
from transfer.traffic.classes import TrafficSettings, read_settings


def _quota_ms(value: object) -> float | None:
    if value in ("off", False):  # YAML reads a bare `off` as false
        return None
    quota_ms = settings.number(value)
    if not quota_ms > 0:
        raise ValueError("give milliseconds greater than 0, or off")
    return quota_ms


def _policy(value: object) -> str:
    """A policy is made where it plans: here its name is the value."""
    name = str(value)
    try:
        read_policy(name)
    except UnknownPolicy as error:
        raise ValueError(f"{error}.{near(name, POLICY_NAMES)}") from error
    return name


def _window(value: object) -> int | None:
    if value == "all":
        return None
    if str(value).isdigit() and int(str(value)) >= 2:
        return int(str(value))
    raise ValueError(f"{value!r} is neither `all` nor a number of layers from 2 on")


def _pace(value: object) -> Pace:
    if isinstance(value, bool):  # as YAML reads a bare `on` and `off`
        return "on" if value else "off"
    return read_pace(str(value))


def _traffic(value: object) -> TrafficSettings:
    return read_settings(json.dumps(value) if isinstance(value, dict) else str(value))


def _traffic_text(traffic: TrafficSettings) -> str:
    return "" if traffic == TrafficSettings() else msgspec.json.encode(traffic).decode()


def _quotas(value: object) -> tuple[Quota, ...]:
    return tuple(read_quotas(str(value)))


def _folders(value: object) -> tuple[Path, ...]:
    return tuple(Path(folder).expanduser() for folder in str(value).split(",") if folder)


def _comma_separated(values: tuple[object, ...]) -> str:
    return ",".join(map(str, values))


def _names(value: object) -> tuple[str, ...]:
    written = value if isinstance(value, list) else str(value).split(",")
    return tuple(str(name).strip() for name in written if str(name).strip())


def _urls(value: object) -> tuple[str, ...]:
    urls = _names(value)
    if not all(url.startswith(("http://", "https://")) for url in urls):
        raise ValueError("give a URL such as http://10.0.0.1:30000, or several, comma-separated")
    return urls


KEYS = secret(Form(read_keys, "KEY", keys_text))
NAMES = Form(_names, "LIST", _comma_separated)
URLS = Form(_urls, "URLS", _comma_separated)
"""Of gateways: see :mod:`launch.gateways`."""
QUOTA_MS = Form(_quota_ms, "MS|off", lambda value: "off" if value is None else str(value))
POLICY = Form(_policy, "NAME")
WINDOW = Form(_window, "W|all", lambda value: "all" if value is None else str(value))
PACE = Form(_pace, "auto|on|off|RATE")
TRAFFIC = Form(_traffic, "JSON", _traffic_text)
QUOTAS = Form(_quotas, "LIST", _comma_separated)
FOLDERS = Form(_folders, "DIRS", _comma_separated)

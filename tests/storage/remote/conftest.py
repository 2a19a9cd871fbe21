"""Remote tiers over a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from storage.remote.tier import RemoteTier
from tests.storage.conftest import QUICK, no_wake

Open = Callable[..., RemoteTier]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/remote"


@pytest.fixture
def open_remote() -> Iterator[Open]:
    tiers: list[RemoteTier] = []

    def open_with(url: str, **settings: Any) -> RemoteTier:
        changed = msgspec.structs.replace(QUICK, **settings)
        tiers.append(RemoteTier(url, {}, no_wake, changed))
        return tiers[-1]

    yield open_with
    for tier in tiers:
        tier.close()

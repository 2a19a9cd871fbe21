"""Every route of the installed SGLang has somebody who answers it at the gateway."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from launch.gateway.routes.table import ROUTES


def flat(routes: Iterable[Any]) -> Iterator[Any]:
    """Of nested routers, too."""
    for route in routes:
        if hasattr(route, "path"):
            yield route
        else:
            yield from flat(getattr(route, "routes", None) or route.original_router.routes)


@pytest.fixture(scope="module")
def installed() -> set[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_PLATFORM", "dualpath_cpu")
        from sglang.srt.entrypoints.http_server import app
    # Mounted when a server starts, if it is told to.
    return {route.path for route in flat(app.routes)} | {"/metrics", "/dumper/{method}"}


def test_every_route_of_sglang_is_somebodys(installed: set[str]) -> None:
    assert installed - ROUTES.keys() == set()


def test_the_table_names_no_route_that_sglang_does_not_have(installed: set[str]) -> None:
    assert ROUTES.keys() - installed == set()

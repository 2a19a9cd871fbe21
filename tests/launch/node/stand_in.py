"""A process in SGLang's place, for nodes of tests: it answers as :class:`StubEngine` does, at the
ports that the node gave it. :func:`install` makes the package that is started."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from common.process_settings import incarnation
from engine.config import EngineConfig
from tests.launch.gateway import control_stub
from tests.launch.gateway.stubs import StubEngine

WORD_DELAY_S = "STAND_IN_WORD_DELAY_S"
_PROGRAM = "from tests.launch.node.stand_in import main\nmain()\n"


def install(folder: Path) -> dict[str, str]:
    """The environment in which ``python -m sglang.launch_server`` is this."""
    package = folder / "stand_in" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "launch_server.py").write_text(_PROGRAM)
    path = os.pathsep.join([str(package.parent), str(Path(__file__).parents[3])])
    return {**os.environ, "PYTHONPATH": path}


class _Rooms(dict[int, asyncio.Event]):
    """P and D are in different processes, and wait for nobody."""

    def setdefault(self, room: int, default: asyncio.Event | None = None) -> asyncio.Event:
        event = asyncio.Event()
        event.set()
        return event


async def _serve() -> None:
    config = EngineConfig.from_env()
    port = int(config.controls[0].rpartition(":")[2])
    control_stub.free_port = lambda: port
    engine = StubEngine(config.name, config.role, _Rooms())
    engine.agent = config.agent
    engine.incarnation = incarnation()
    engine.port = int(sys.argv[sys.argv.index("--port") + 1])
    engine.word_delay_s = float(os.environ.get(WORD_DELAY_S, "0"))
    await engine.start_http()
    await asyncio.Event().wait()


def main() -> None:
    """Serve until killed."""
    asyncio.run(_serve())

"""A process in SGLang's place, for nodes of tests: it answers as :class:`StubEngine` does, at the
ports that the node gave it, and has an engine's links to agents. :func:`install` makes the package
that is started."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from common.messages.from_engines import EngineHello, RankMemory, RegisterEngine
from common.messages.from_gateway import KnownAgents
from common.process_settings import incarnation
from common.samples import sample
from engine.config import EngineConfig
from tests.launch.gateway import control_stub
from tests.launch.gateway.agent_stub import NAMESPACE
from tests.launch.gateway.stubs import StubEngine
from transfer.client import AgentLinks
from transfer.control.keys import Keys

WORD_DELAY_S = "STAND_IN_WORD_DELAY_S"
_PROGRAM = "from tests.launch.node.stand_in import main\nmain()\n"


def install(folder: Path) -> dict[str, str]:
    """The environment in which ``python -m engine.serve`` starts this."""
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


class _StandIn(StubEngine):
    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config.name, config.role, _Rooms())
        self.agent = config.agent
        self.incarnation = incarnation()
        layers, components = NAMESPACE.layout.num_layers, len(NAMESPACE.layout.component_bytes)
        nowhere = RankMemory(f"{self.name}:1", [[1] * components] * layers, 1)
        me = RegisterEngine(self.name, self.incarnation, NAMESPACE, 1, [nowhere], 1, 1)
        keys = Keys(config.name, config.control_secret)
        self._links = AgentLinks(config.agents, keys, me, lambda agent, message: None)

    def answers(self, message: Any) -> list[Any]:
        if isinstance(message, KnownAgents):
            self._links.meet(message)
        return super().answers(message)

    def hello(self) -> EngineHello:
        self.load_changes["linked"] = self._links.linked()
        self.samples = [sample("engine_linked_agents", len(self._links.linked()))]
        return msgspec.structs.replace(super().hello(), heard=self._links.heard)


async def _serve() -> None:
    config = EngineConfig.from_env()
    host, _, port = config.controls[0].removeprefix("tcp://").rpartition(":")
    control_stub.HOST, control_stub.free_port = host, lambda: int(port)
    engine = _StandIn(config)
    engine.port = int(sys.argv[sys.argv.index("--port") + 1])
    engine.word_delay_s = float(os.environ.get(WORD_DELAY_S, "0"))
    await engine.start_http()
    await asyncio.Event().wait()


def main() -> None:
    """Serve until killed."""
    asyncio.run(_serve())

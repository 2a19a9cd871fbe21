"""The node's agent: ``python -m transfer.agent``, settings in ``DUALPATH_AGENT``."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading

from common.process_settings import BadSettings
from storage.remote.tier import RemoteUnusable
from storage.ssd.tier import DirectoryLocked, DirectoryUnusable
from storage.tiers.io_threads import SWITCH_INTERVAL_S
from transfer.agent.config import AgentConfig
from transfer.agent.control_socket import CannotBind
from transfer.agent.server import Agent
from transfer.memory import NotEnoughMemory
from transfer.mooncake import TransferFailed
from transfer.ports.source_filter import CannotFilter

log = logging.getLogger("transfer.agent")

STOP_TIMEOUT_S = 2.5
"""A process that has not ended by itself so long after SIGTERM ends at once."""

START_ERRORS = (
    BadSettings,
    CannotBind,
    CannotFilter,
    DirectoryLocked,
    DirectoryUnusable,
    NotEnoughMemory,
    RemoteUnusable,
    TransferFailed,
)


async def run(config: AgentConfig) -> None:
    """Serve until SIGTERM or SIGINT."""
    if config.dram_bytes <= 0:
        raise BadSettings("dram_bytes is 0, but an agent cannot do without DRAM")
    config.experiment.announce(log)
    agent = Agent(config)
    serving = asyncio.create_task(agent.serve())

    def stop() -> None:
        log.info("agent ends name=%s", config.name)
        timer = threading.Timer(STOP_TIMEOUT_S, os._exit, (0,))
        timer.daemon = True
        timer.start()
        serving.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    try:
        await serving
    except asyncio.CancelledError:
        log.debug("serving ended")
    finally:
        agent.close()


def main() -> None:
    """Exit code 2 and one line on stderr if the agent cannot start."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        asyncio.run(run(AgentConfig.from_env()))
    except START_ERRORS as error:
        print(f"agent: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    # Mooncake's own threads are not waited for.
    logging.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main()

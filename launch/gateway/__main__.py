"""``python -m launch.gateway``: the process of the front door.

A supervisor gives it its settings in the environment. Started by hand, with flags, it knows no
agent and no engine: nodes join it (``python -m launch.node``). Exit code 2: a setting cannot work.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import uvicorn

from common.process_settings import RUN_FOLDER
from launch.gateway.app import create_app
from launch.gateway.config import GatewayConfig
from launch.gateway.listening import listen
from launch.settings import BadConfig

SHUTDOWN_S = 3
"""Open streams get this long to end once a signal has come."""
LOG_LEVEL = "DUALPATH_LOG_LEVEL"


def main() -> None:
    """Serve until a signal comes."""
    level = os.environ.get(LOG_LEVEL, "info").upper()
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        config = GatewayConfig.from_env() if GatewayConfig.VARIABLE in os.environ else _by_flags()
    except BadConfig as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    folder = os.environ.get(RUN_FOLDER) or config.state_dir

    def stop() -> None:
        server.should_exit = True

    app = create_app(config, Path(folder) if folder else None, stop)
    serving = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        log_level="warning",
        timeout_graceful_shutdown=SHUTDOWN_S,
        ssl_certfile=config.doors.ssl_certfile or None,
        ssl_keyfile=config.doors.ssl_keyfile or None,
        ssl_keyfile_password=config.keys.ssl_keyfile_password or None,
        ssl_ca_certs=config.doors.ssl_ca_certs or None,
    )
    server = uvicorn.Server(serving)
    server.run([listen(serving, config.client_stall_s)])
    if app.state.standby.leadership.ended.is_set():
        _begin_anew(config)


def _begin_anew(config: GatewayConfig) -> None:
    """Another gateway has taken over: be its standby, with nothing of before."""
    if not config.standby_of:
        sys.exit("error: another gateway has taken over (docs/deploy.md)")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _by_flags() -> GatewayConfig:
    from launch.flags.gateway import lone_gateway

    return lone_gateway(sys.argv[1:])


if __name__ == "__main__":
    main()

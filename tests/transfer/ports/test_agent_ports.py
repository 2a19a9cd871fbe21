"""A real agent's ports: Mooncake's are bound to every address, and hear whom the agent is told."""

from __future__ import annotations

import socket

import psutil
import pytest

from tests.transfer.agent.agent_process import running_agent


@pytest.mark.slow
def test_mooncakes_ports_hear_only_whom_they_may(tmp_path):
    control = f"ipc://{tmp_path}/control"
    with running_agent(tmp_path, control=control, heard=["127.0.0.2", "127.0.0.9/32"]) as agent:
        while "agent up" not in agent.log():
            assert agent.process.poll() is None, agent.log()
        connections = psutil.Process(agent.process.pid).net_connections("tcp")
        listening = [each.laddr.port for each in connections if each.status == "LISTEN"]
        assert len(listening) == 2  # handshakes and data
        for port in listening:
            socket.create_connection(("127.0.0.1", port), 5, ("127.0.0.2", 0)).close()
            with pytest.raises(TimeoutError):
                socket.create_connection(("127.0.0.1", port), 0.3)

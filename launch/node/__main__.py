"""``python -m launch.node``: one host of a cluster, which joins a gateway and leaves it.

Exit codes: 0 after SIGINT or SIGTERM; 1 when a process did not start, or the gateway has no place
for the node any more; 2 for a setting that cannot work (the reason is one sentence on stderr).
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

from common.cluster.membership import TOKEN_PURPOSE, HostOfGroup, Joined, JoinRequest, Role
from launch.access import Access
from launch.cluster import preflight
from launch.cluster.console import make_node_summary
from launch.cluster.hardware import Hardware, detect
from launch.cluster.process_record import ProcessRecord
from launch.cluster.supervise import supervise
from launch.cluster.supervisor import Start, StartFailed
from launch.flags.shared import cluster_secret
from launch.models.resolve import resolve_model
from launch.node.address import first_host, network_of, own_address
from launch.node.config import NodeConfig, load_config
from launch.node.lease import Lease, Refused, Unreachable, new_session
from launch.node.numbers import GrantedNumbers
from launch.node.records import alike, node_layout, node_members, node_records
from launch.node.reporter import NodeReporter
from launch.settings import BadConfig, help_markdown
from transfer.control.keys import derived


def main(argv: Sequence[str]) -> int:
    """Be a member until a signal; returns the exit code."""
    if "--help-markdown" in argv:
        print(help_markdown(NodeConfig))
        return 0
    logging.basicConfig(level="WARNING", format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        return asyncio.run(_Node(load_config(argv)).run())
    except asyncio.CancelledError:  # a signal, before anything was started
        return 0
    except (BadConfig, Refused, Unreachable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadConfig) else 1


class _Node:
    """One host's part of a cluster. Raises :class:`BadConfig` where it cannot work."""

    def __init__(self, config: NodeConfig) -> None:
        self.hardware: Hardware = detect(config)
        is_reader = config.role == Role.READER.value
        self.model = Path(config.model) if is_reader else resolve_model(config.model)
        self.host = own_address(config.host, config.join)
        # Who joins later is of the same network, or of those that --peers-from names.
        if config.peers_from != "any":
            networks = filter(None, (network_of(self.host), config.peers_from))
            config = replace(config, peers_from=",".join(networks))
        self.config = config
        self.secret = cluster_secret(config)
        self.first_host = ""
        """Of the engine's ranks, where they are on several hosts."""

    async def run(self) -> int:
        config, waiting = self.config, asyncio.current_task()
        assert waiting is not None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # until the supervisor's are
            asyncio.get_running_loop().add_signal_handler(number, waiting.cancel)
        if config.nnodes > 1:
            await self._find_first_host()
        request = JoinRequest(
            role=Role(config.role),
            session=new_session(),
            name=config.node or None,
            settings=alike(config, self.model, self.hardware),
            group=HostOfGroup(config.name, config.node_rank, config.nnodes)
            if config.nnodes > 1
            else None,
        )
        access = Access(derived(self.secret, TOKEN_PURPOSE), config.ssl_ca_certs, any_name=True)
        lease = Lease(config.join, access, request)
        try:
            joined = await lease.join(config.start_timeout_s)
            return await self._serve(lease, joined)
        finally:
            await lease.leave()
            await lease.close()

    async def _find_first_host(self) -> None:
        config = self.config
        self.first_host = await first_host(config.dist_init_addr, config.start_timeout_s)
        if not config.node_rank and self.first_host != self.host:
            raise BadConfig(
                f"--dist-init-addr {config.dist_init_addr} is not at --host {self.host}: give the "
                "address of host 0 that the other hosts reach."
            )

    async def _serve(self, lease: Lease, joined: Joined) -> int:
        config = self._named(joined)
        layout = node_layout(config, self.model, self.hardware, self.host, self.first_host)
        records = node_records(layout, self.secret, joined)
        locks = preflight.check(config, records)
        title = f"DualPath node {joined.name} ({config.role}) on {self.host}"
        reporter = NodeReporter(config, [record.name for record in records])
        reporter.console.print(make_node_summary(title, config, self.hardware, self.model, records))
        lease.tell(node_members(layout, self.secret))
        try:
            await self._supervise(lease, joined, records, reporter)
        except StartFailed as error:
            reporter.failed(str(error), error.log)
            return 1
        finally:
            _close(locks)
        return 0

    def _named(self, joined: Joined) -> NodeConfig:
        """By the name that the gateway has given, where there was none."""
        return self.config if self.config.name else replace(self.config, name=joined.name)

    async def _supervise(
        self,
        lease: Lease,
        joined: Joined,
        records: list[ProcessRecord],
        reporter: NodeReporter,
    ) -> None:
        """Until a signal, or until the lease is refused."""
        config = self._named(joined)

        async def drain() -> None:
            if not await lease.drained(config.drain_timeout_s):
                reporter.console.print("not drained in time: what is left is cut off")

        granted = Start(joined.incarnation, joined.turn)
        numbers = GrantedNumbers(lease, granted, is_of_several_hosts=config.nnodes > 1)
        keeping = asyncio.create_task(lease.keep())
        running = asyncio.create_task(supervise(config, records, reporter, numbers, drain))
        try:
            await asyncio.wait([keeping, running], return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                keeping.result()  # raises Refused
            await running
        finally:
            for task in (running, keeping):
                task.cancel()
            await asyncio.gather(running, keeping, return_exceptions=True)


def _close(locks: list[IO[str]]) -> None:
    for lock in locks:
        lock.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

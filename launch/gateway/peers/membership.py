"""Who is there, who of them is alive, and which namespace they serve together."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple
from urllib.parse import urlsplit

import zmq.asyncio

from common.block import Namespace
from common.cluster.membership import EngineAddress
from common.loads import ModelBounds
from launch.gateway.config import GatewayConfig
from launch.gateway.peers.peer import AgentPeer, EnginePeer, Peer
from transfer.control.keys import Keys
from transfer.control.senders import GATEWAY
from transfer.ports.source_filter import is_address


class WeightsName(NamedTuple):
    """What of a namespace changes with the weights."""

    model_digest: str
    version: str

    @classmethod
    def of(cls, namespace: Namespace) -> WeightsName:
        return cls(namespace.model_digest, namespace.weight_version)


class Membership:
    """Every agent and engine, at first those of the configuration, and a connection to each."""

    def __init__(self, config: GatewayConfig) -> None:
        self._heartbeat_timeout_s = config.scheduler.heartbeat_timeout_s
        self._context = zmq.asyncio.Context()
        self._keys = Keys(GATEWAY, config.control_secret)
        self.agents: dict[str, AgentPeer] = {}
        self.engines: dict[str, EnginePeer] = {}
        self.missed: set[str] = set()
        """Engines that lack a node whose lease has run out, or that is not there: it may come."""
        self.served_weights: WeightsName | None = None
        """Engines of others are strangers, also if they are many; None as long as no weights
        were updated."""
        for name, endpoint in config.agents.items():
            self.add_agent(name, endpoint)
        for address in config.engines:
            self.add_engine(address)

    def close(self) -> None:
        for peer in self.peers():
            peer.close()
        self._context.destroy(0)

    def add_agent(self, name: str, endpoint: str) -> AgentPeer:
        self.agents[name] = AgentPeer(name, endpoint, self._context, self._keys)
        return self.agents[name]

    def add_engine(self, address: EngineAddress) -> EnginePeer:
        self.engines[address.name] = EnginePeer(address, self._context, self._keys)
        return self.engines[address.name]

    def pop(self, name: str) -> AgentPeer | EnginePeer | None:
        """Who had the name until now; its connection is the caller's to close."""
        self.missed.discard(name)
        return self.engines.pop(name, None) or self.agents.pop(name, None)

    def peers(self) -> list[AgentPeer | EnginePeer]:
        return [*self.agents.values(), *self.engines.values()]

    def hosts(self) -> list[str]:
        """Addresses of all members, in order; not of those that are known by a host's name."""
        places = {urlsplit(peer.endpoint).hostname or "" for peer in self.peers()}
        places |= {engine.address.bootstrap_host for engine in self.engines.values()}
        return sorted(filter(is_address, places))

    def alive(self, peer: Peer) -> bool:
        if time.monotonic() - peer.last_seen_s > self._heartbeat_timeout_s:
            return False
        if isinstance(peer, EnginePeer):
            has_said_who = peer.hello is not None
            return has_said_who and peer.http_alive and peer.ended != peer.incarnation
        return True

    def live_engines(self, role: str | None = None) -> list[EnginePeer]:
        return [
            e
            for e in self.engines.values()
            if self.alive(e) and (role is None or e.address.role == role)
        ]

    def of_one_process(self, names: Iterable[str]) -> set[str]:
        """These engines, and the attention groups of the same processes."""
        processes = {self.engines[name].address.http for name in names}
        return {n for n, e in self.engines.items() if e.address.http in processes}

    def namespace(self) -> Namespace | None:
        """The namespace that is served: the one of most live engines with both roles in it."""
        roles: dict[Namespace, set[str]] = {}
        sizes: Counter[Namespace] = Counter()
        for engine in self.live_engines():
            namespace = engine.known().namespace
            if self.served_weights not in (None, WeightsName.of(namespace)):
                continue
            roles.setdefault(namespace, set()).add(engine.address.role)
            sizes[namespace] += 1
        for namespace, _ in sizes.most_common():
            if len(roles[namespace]) == 2:
                return namespace
        return None

    def bounds(self) -> ModelBounds | None:
        """What fits every engine that was ever heard; None if none was."""
        known = [e.hello.bounds for e in self.engines.values() if e.hello is not None]
        if not known:
            return None
        return ModelBounds(
            min(bounds.vocabulary_tokens for bounds in known),
            min(bounds.context_tokens for bounds in known),
            min(bounds.prompt_tokens_max for bounds in known),
        )

    def troubles(self) -> list[str]:
        """Why no request can be served; empty when one can."""
        missing = [r for r in ("prefill", "decode") if not self.live_engines(r)]
        if missing:
            return [f"no live {role} engine" for role in missing]
        if self.namespace() is None:
            served = self.served_weights
            if served is not None and not any(
                WeightsName.of(e.known().namespace) == served for e in self.live_engines()
            ):
                return [f"no engine has the weights {served.version!r} yet: they are to be updated"]
            return [
                "no prefill and decode engine serve the same model, weights and KV layout under "
                f"the same settings: {self._differences()}"
            ]
        return []

    def _differences(self) -> str:
        """In what the namespaces of the live engines differ."""
        namespaces = {e.known().namespace for e in self.live_engines()}
        names = [
            name
            for name in Namespace.__struct_fields__
            if len({getattr(namespace, name) for namespace in namespaces}) > 1
        ]
        if names == ["settings"]:
            flags = Counter(flag for namespace in namespaces for flag in _flags(namespace))
            names = sorted({name for (name, _), n in flags.items() if n < len(namespaces)})
        types = {f"{n.kv_dtype} of {n.layout.block_bytes} bytes a block" for n in namespaces}
        told = f" ({', '.join(sorted(types))})" if len(types) > 1 else ""
        return f"they differ in {', '.join(names)}{told}"

    def strangers(self) -> frozenset[str]:
        """Live engines of another namespace than the served one: they cannot exchange KV."""
        served = self.namespace()
        return frozenset(e.name for e in self.live_engines() if e.known().namespace != served)


class MemberNames(Collection[str]):
    """Of the agents and engines that there are whenever it is looked at."""

    def __init__(self, members: Membership) -> None:
        self._members = members

    def __contains__(self, name: object) -> bool:
        return name in self._members.engines or name in self._members.agents

    def __iter__(self) -> Iterator[str]:
        return itertools.chain(self._members.agents, self._members.engines)

    def __len__(self) -> int:
        return len(self._members.peers())


def _flags(namespace: Namespace) -> set[tuple[str, str]]:
    return {(name, str(value)) for name, value in json.loads(namespace.settings or "{}").items()}

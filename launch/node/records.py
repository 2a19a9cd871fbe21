"""The processes of one node, made on the host that runs them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from common.cluster.membership import SAME_PROTOCOL, AgentAddress, Joined, NodeMembers, Role
from engine.model_digest import NoWeights, model_digest
from launch.cluster.hardware import Hardware
from launch.cluster.layout import ENGINE_ROLES, Layout, Place, agent_name
from launch.cluster.process_record import ProcessRecord
from launch.cluster.processes import Records
from launch.node.config import NodeConfig
from launch.settings import BadConfig


def node_layout(
    config: NodeConfig, model: Path, hardware: Hardware, host: str, first_host: str = ""
) -> Layout:
    """Of a node with the name that it has by now; ``first_host`` is that of the first ranks, where
    there are several. Raises :class:`BadConfig`."""
    place = Place(Role(config.role), host, config.bind_host)
    if config.nnodes == 1:
        return Layout(config, model, hardware, {config.name: place})
    spread = ("--nnodes", str(config.nnodes), "--dist-init-addr", config.dist_init_addr)
    if place.role is Role.PREFILL:
        config = replace(config, prefill_args=(*config.prefill_args, *spread))
    else:
        config = replace(config, decode_args=(*config.decode_args, *spread))
    if not config.node_rank:
        return Layout(config, model, hardware, {config.name: place})
    first = Place(place.role, first_host, is_elsewhere=True)
    place = place._replace(engine=config.name, rank=config.node_rank)
    return Layout(config, model, hardware, {config.name: first, config.node: place})


def _own(layout: Layout) -> tuple[str, Place]:
    """The node's own place, of those that its engine has."""
    [own] = [each for each in layout.places.items() if not each[1].is_elsewhere]
    return own


def node_records(layout: Layout, secret: str, joined: Joined) -> list[ProcessRecord]:
    """Its agent, and its engine if it has one. Raises :class:`BadConfig`."""
    node, place = _own(layout)
    agents = {name: at for name, at in joined.agents.items() if name != agent_name(node)}
    records = Records(layout, secret, os.environ, agents, joined.engines)
    agent = records.agent(node)
    return [agent] if place.role is Role.READER else [agent, records.engine(node)]


def node_members(layout: Layout, secret: str) -> NodeMembers:
    """Where the others reach them."""
    node, place = _own(layout)
    agent = AgentAddress(agent_name(node), layout.agent_control(node, place.host))
    return NodeMembers(agent, Records(layout, secret, os.environ).addresses(node))


def alike(config: NodeConfig, model: Path, hardware: Hardware) -> dict[str, str]:
    """What has to be so at all nodes of a cluster."""
    found = {**SAME_PROTOCOL, "--transfer": hardware.transfer}
    role = Role(config.role)
    if role is Role.READER:
        return found
    if config.nnodes > 1:
        found[f"--nnodes of {config.name}"] = str(config.nnodes)
    window = config.prefill_layer_window
    found["model"] = _digest(model)
    found["--prefill-layer-window"] = "all" if window is None else str(window)
    layout = Layout(config, model, hardware, {"x": Place(role)})
    for each in ENGINE_ROLES:
        # Told by the nodes of both roles: how heads are staged between them depends on both.
        found[f"ranks of {each.value} engines"] = str(layout.group_size(each))
    return found


def _digest(model: Path) -> str:
    if not model.is_absolute():
        return str(model)
    try:
        return model_digest(model)
    except NoWeights as error:
        raise BadConfig(f"--model: {error}.") from error

"""The manifests are what Kubernetes and LeaderWorkerSet take, and start what they say.

``leaderworkersets.json`` is the CRD of kubernetes-sigs/lws (v0.9.0, Apache-2.0), without its
descriptions. Kubernetes' own kinds are checked by the schemas in ``kubernetes-validate``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from common.user_files import write_private
from launch.flags.gateway import lone_gateway
from launch.node.config import NodeConfig, load_config

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))
KUBERNETES = "1.33"
POD_IP = "10.0.0.7"
CRD = json.loads(Path(__file__).with_name("leaderworkersets.json").read_text())
DOCUMENTS = {"gateway": 3, "prefill": 2, "decode": 2, "reader": 2, "nodes": 1}
"""Of each file."""


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


EVERY = [document for path in FILES for document in documents(path)]


def strict(schema: Any) -> Any:
    """Kubernetes drops unknown fields in silence; here they are errors."""
    if isinstance(schema, list):
        return [strict(value) for value in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string") is True:
        return {"type": ["integer", "string"]}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    return schema


def lws_schema() -> dict[str, Any]:
    (version,) = [v for v in CRD["spec"]["versions"] if v["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def validate(document: dict[str, Any]) -> None:
    if document["kind"] == "LeaderWorkerSet":
        assert document["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
        jsonschema.Draft202012Validator(lws_schema()).validate(document)
    else:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Templates of pods, by the role in their labels."""
    for document in EVERY:
        spec = document.get("spec", {})
        template = spec.get("template") or spec.get("leaderWorkerTemplate", {}).get(
            "workerTemplate"
        )
        if template:
            yield template["metadata"]["labels"]["dualpath-role"], template["spec"]


PODS = dict(pods())
NODES = ("prefill", "decode", "reader")


def arguments(role: str, hosts: dict[str, str] | None = None) -> list[str]:
    """``hosts``: what LeaderWorkerSet adds to a container's environment."""
    (container,) = PODS[role]["containers"]
    module, *flags = container["args"]
    assert module == ("launch.gateway" if role == "gateway" else "launch.node")
    known = {"POD_IP": POD_IP, "GROUP_INDEX": "3"}
    own = {variable["name"]: known[variable["name"]] for variable in container["env"]}
    values = {**own, **(hosts or {})}  # an unknown name fails: Kubernetes would leave it as it is
    return [re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], flag) for flag in flags]


# ---- what they are ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_document_is_what_its_schema_says(path: Path):
    found = documents(path)
    assert len(found) == DOCUMENTS[path.stem]
    for document in found:
        validate(document)


def test_a_misspelt_field_is_found():
    for document in EVERY:
        if "spec" not in document:
            continue
        spoiled = json.loads(json.dumps(document))
        spoiled["spec"]["replicasss"] = 1
        with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
            validate(spoiled)


# ---- what they start ----------------------------------------------------------------------------


def test_the_gateway_takes_its_arguments(tmp_path: Path):
    write_private(tmp_path / "admin", b"key-of-operators\n")
    write_private(tmp_path / "cluster", b"5" * 64)
    flags = [f.replace("/etc/dualpath/secret", str(tmp_path)) for f in arguments("gateway")]
    config = lone_gateway(flags)
    (container,) = PODS["gateway"]["containers"]
    assert (config.host, config.port) == (POD_IP, container["ports"][0]["containerPort"])
    assert config.standby_of == gateway_urls()


def gateway_urls() -> tuple[str, ...]:
    """Of each gateway's pod, by the name that its StatefulSet and its Service give it."""
    (gateways,) = [d for d in EVERY if d["kind"] == "StatefulSet"]
    spec = gateways["spec"]
    (service,) = [d for d in services() if d["metadata"]["name"] == spec["serviceName"]]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    (port,) = service["spec"]["ports"]
    names = [f"{gateways['metadata']['name']}-{number}" for number in range(spec["replicas"])]
    return tuple(f"http://{name}.{spec['serviceName']}:{port['port']}" for name in names)


def services() -> list[dict[str, Any]]:
    return [d for d in EVERY if d["kind"] == "Service"]


def node_of(role: str, tmp_path: Path, hosts: dict[str, str] | None = None) -> NodeConfig:
    (profiles,) = [d for d in EVERY if d["kind"] == "ConfigMap"]
    profile = tmp_path / "nodes.yaml"
    profile.write_text(profiles["data"]["nodes.yaml"])
    mounted = "/etc/dualpath/profile/nodes.yaml"
    return load_config([f.replace(mounted, str(profile)) for f in arguments(role, hosts)])


def of_lws(size: int, worker: int) -> dict[str, str]:
    leader = "dualpath-decode-3.dualpath-decode.default"
    return {
        "LWS_GROUP_SIZE": str(size),
        "LWS_WORKER_INDEX": str(worker),
        "LWS_LEADER_ADDRESS": leader,
    }


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_the_hosts_of_an_engine_have_its_name_and_a_place_each(role: str, tmp_path: Path):
    first, second = (node_of(role, tmp_path, of_lws(2, worker)) for worker in (0, 1))
    assert first.name == second.name == f"{role}-3"
    assert (first.nnodes, first.node_rank, second.node_rank) == (2, 0, 1)
    assert first.dist_init_addr.startswith(of_lws(2, 0)["LWS_LEADER_ADDRESS"])


@pytest.mark.parametrize("role", NODES)
def test_a_node_takes_its_arguments_and_its_profile(role: str, tmp_path: Path):
    config = node_of(role, tmp_path, of_lws(1, 0))
    assert (config.role, config.host, config.nnodes) == (role, POD_IP, 1)
    assert role == "reader" or config.prefill_args and config.decode_args
    pod = PODS[role]
    assert config.drain_timeout_s < pod["terminationGracePeriodSeconds"]
    assert config.join == gateway_urls()
    mounts = {m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
    folders = [*map(str, config.ssd_dir), str(Path(config.cluster_secret_file).parent)]
    assert mounts >= set(folders)
    assert role == "reader" or Path(config.model).parent == Path("/models") in map(Path, mounts)


def test_every_mount_has_its_volume_and_every_volume_its_object():
    configured = {d["metadata"]["name"] for d in EVERY if d["kind"] == "ConfigMap"}
    for pod in PODS.values():
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {m["name"] for m in pod["containers"][0]["volumeMounts"]} == volumes.keys()
        assert volumes["secret"]["secret"]["defaultMode"] & 0o077 == 0  # read_secret refuses others
        if "profile" in volumes:
            assert volumes["profile"]["configMap"]["name"] in configured


def test_readiness_is_health_and_liveness_is_not():
    (container,) = PODS["gateway"]["containers"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/health"
    assert container["livenessProbe"].keys() & {"httpGet", "exec"} == set()
    assert container["lifecycle"]["preStop"]
    (clients,) = [d for d in services() if d["metadata"]["name"] == "dualpath"]
    assert "publishNotReadyAddresses" not in clients["spec"], "clients reach the active one alone"


@pytest.mark.parametrize("role", NODES)
def test_a_node_is_ready_while_it_serves(role: str, tmp_path: Path):
    config = node_of(role, tmp_path, of_lws(1, 0))
    (container,) = PODS[role]["containers"]
    assert container["readinessProbe"]["exec"]["command"] == ["test", "-e", config.ready_file]
    assert "livenessProbe" not in container, "launch.node itself starts again what hangs"


def test_nothing_waits_for_the_standby_to_be_ready():
    (gateways,) = [d for d in EVERY if d["kind"] == "StatefulSet"]
    assert gateways["spec"]["podManagementPolicy"] == "Parallel"
    assert gateways["spec"]["updateStrategy"]["type"] == "OnDelete"
    affinity = PODS["gateway"]["affinity"]["podAntiAffinity"]
    (apart,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]
    labels = gateways["spec"]["template"]["metadata"]["labels"]
    assert apart["labelSelector"]["matchLabels"] == labels, "a drain of a host ends one of them"


def test_nodes_are_evicted_one_at_a_time():
    """Of gateways the standby is never ready: a budget would keep the active one for ever."""
    budgets = [d["spec"]["selector"] for d in EVERY if d["kind"] == "PodDisruptionBudget"]
    labels = [{"app": "dualpath", "dualpath-role": role} for role in NODES]
    assert sorted(map(str, (b["matchLabels"] for b in budgets))) == sorted(map(str, labels))


# ---- the image ----------------------------------------------------------------------------------


def test_the_image_is_built_by_the_readmes_command_and_reaps():
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line and line[0].isupper()]
    assert all(re.match("(FROM|ARG|WORKDIR|RUN|COPY|ENTRYPOINT|CMD) ", line) for line in lines)
    assert "RUN make setup DEVICE=${DEVICE}" in lines
    (entry,) = [line for line in lines if line.startswith("ENTRYPOINT")]
    assert json.loads(entry.removeprefix("ENTRYPOINT ")) == ["tini", "--", ".venv/bin/python", "-m"]

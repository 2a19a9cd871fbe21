"""What trainers send, sent to a server, and the shapes of what it answers."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.clients.trainer import Group, Tensors, serialized
from tests.cluster import prompt
from tests.common.ports import free_port

AS_SENT: dict[str, list[tuple[str, str, Any]]] = json.loads(
    (Path(__file__).parents[1] / "launch/gateway/weights/as_sent.json").read_text()
)
"""By trainer its requests in their order, as its sources have them: path, method, body."""
NEED_SESSION = ("/update_weights_from_tensor", "/update_weights_from_distributed")
JOIN_S = 60


class Answer:
    """``shape``: every key that it has, with the kind of its values; of a list, of all its items
    together."""

    def __init__(self, status: int, text: str) -> None:
        self.status = status
        self.shape: dict[str, set[str]] = {}
        self.value: Any = json.loads(text) if re.match(r"[\[{]|null$", text) else text
        self._walk("", self.value)

    def _walk(self, name: str, value: Any) -> None:
        self.shape.setdefault(name, set()).add(_kind(value))
        if isinstance(value, dict):
            for key, inner in value.items():
                self._walk(f"{name}.{key}", inner)
        elif isinstance(value, list):
            for inner in value:
                self._walk(f"{name}[]", inner)

    def only(self, names: Collection[str]) -> Answer:
        """Without all but these keys."""
        part = Answer(self.status, "")
        part.shape = {name: kinds for name, kinds in self.shape.items() if name in names}
        return part

    def lacks(self, other: Answer) -> list[str]:
        """Keys of ``other`` that this has not, or with values of another kind: what a client of
        the other could miss here."""
        troubles = [f"{name or 'body'} is missing" for name in other.shape.keys() - self.shape]
        for name in other.shape.keys() & self.shape.keys():
            kinds, known = self.shape[name] - {"null"}, other.shape[name] - {"null"}
            if kinds and known and not kinds <= known:
                troubles.append(f"{name or 'body'} is {kinds}, not {known}")
        return sorted(troubles)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, float | int) and not isinstance(value, bool):
        return "number"
    return type(value).__name__


class Replay:
    """A trainer at one server, which has ``ranks`` of weights. ``weights``: of its model's names.
    ``opens_sessions``: around calls that want one, where the trainer does not."""

    def __init__(
        self, url: str, ranks: int, folder: Path, weights: Tensors, opens_sessions: bool
    ) -> None:
        self._url = url
        self._ranks = ranks
        self._folder = folder
        self._weights = dict(weights)
        self._opens_sessions = opens_sessions
        self._in_session = False
        self._groups: dict[str, Group] = {}

    def call(self, path: str, method: str, body: Any) -> Answer:
        """As sent, but for what is a machine's own: addresses, folders, handles of memory."""
        needs_session = path in NEED_SESSION and self._opens_sessions and not self._in_session
        if needs_session:
            assert self._send("/begin_weight_update", "POST", {"selector": "all"}).status == 200
        answer = self._special.get(path, Replay._send)(self, path, method, body)
        if needs_session:
            assert self._send("/end_weight_update", "POST", {}).status == 200
        if path in ("/begin_weight_update", "/end_weight_update"):
            self._in_session = path.startswith("/begin")
        return answer

    def _generate(self, path: str, method: str, body: Any) -> Answer:
        return self._send(path, method, body | {"input_ids": prompt(100, seed=1)})

    def _from_disk(self, path: str, method: str, body: Any) -> Answer:
        return self._send(path, method, body | {"model_path": str(self._folder)})

    def _init_group(self, path: str, method: str, body: Any) -> Answer:
        size = 1 + self._ranks
        # A process may have but one group of a name.
        group = Group(f"{body['group_name']}-{self._url}", free_port(), size)
        self._groups[body["group_name"]] = group
        joining = group.join()
        own = {"world_size": size, "backend": "gloo", "group_name": group.name}
        own["master_port"] = type(body["master_port"])(group.port)
        answer = self._send(path, method, body | own)
        joining.join(JOIN_S)
        return answer

    def _distributed(self, path: str, method: str, body: Any) -> Answer:
        group = self._groups[body["group_name"]]
        sending = group.broadcast([(name, self._weights[name]) for name in body["names"]])
        answer = self._send(path, method, body | {"group_name": group.name})
        sending.join(JOIN_S)
        return answer

    def _destroy_group(self, path: str, method: str, body: Any) -> Answer:
        group = self._groups[body["group_name"]]
        return self._send(path, method, body | {"group_name": group.name})

    def _tensors(self, path: str, method: str, body: Any) -> Answer:
        names = ["model.norm.weight", "model.layers.0.mlp.down_proj.weight"]
        tensors: Any = [(name, self._weights[name]) for name in names]
        if body["load_format"] == "flattened_bucket":
            tensors = flattened(tensors)
        return self._send(path, method, body | {"serialized_named_tensors": [serialized(tensors)]})

    _special: Mapping[str, Callable[[Replay, str, str, Any], Answer]] = {
        "/generate": _generate,
        "/update_weights_from_disk": _from_disk,
        "/init_weights_update_group": _init_group,
        "/update_weights_from_distributed": _distributed,
        "/destroy_weights_update_group": _destroy_group,
        "/update_weights_from_tensor": _tensors,
    }

    def _send(self, path: str, method: str, body: Any) -> Answer:
        request = urllib.request.Request(
            self._url + path,
            json.dumps(body).encode() if body is not None else None,
            {"Content-Type": "application/json"},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return Answer(response.status, response.read().decode())
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.read().decode(errors="replace"))


def flattened(tensors: Tensors) -> dict[str, torch.Tensor]:
    """One tensor of all, as slime and miles send them."""
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    bucket = FlattenedTensorBucket(named_tensors=tensors)
    return {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}

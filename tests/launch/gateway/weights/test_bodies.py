"""A pickle of tensors is looked through, and none is loaded."""

from __future__ import annotations

import base64
import collections
import os
import pickle
from typing import Any

import pytest
import torch

from benchmarks.clients.trainer import serialized
from launch.gateway.errors import BadRequest
from launch.gateway.weights import bodies
from launch.gateway.weights.bodies import check_tensors, ranks_of, tags_of

TENSORS = [("a", torch.ones(3)), ("b", torch.ones(2, dtype=torch.bfloat16))]


class Runs:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("false",)


def body(*pickled: bytes | str) -> dict[str, Any]:
    texts = [p if isinstance(p, str) else base64.b64encode(p).decode() for p in pickled]
    return {"serialized_named_tensors": texts}


def test_tensors_that_are_shared_by_name_pass():
    parameters = [("p", torch.nn.Parameter(torch.ones(2)))]
    check_tensors(body(serialized(TENSORS), serialized(parameters)), ranks=2)


def test_a_flattened_bucket_passes():
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    torch.multiprocessing.set_sharing_strategy("file_system")
    bucket = FlattenedTensorBucket(named_tensors=TENSORS)
    given = {
        "flattened_tensor": bucket.get_flattened_tensor(),
        "metadata": bucket.get_metadata(),
    }
    check_tensors(body(MultiprocessingSerializer.serialize(given, output_str=True)), ranks=1)


def test_file_descriptors_are_refused_with_what_to_do_instead():
    from sglang.srt.utils import MultiprocessingSerializer

    torch.multiprocessing.set_sharing_strategy("file_descriptor")
    text = MultiprocessingSerializer.serialize([("a", torch.ones(3))], output_str=True)
    with pytest.raises(BadRequest, match="set_sharing_strategy"):
        check_tensors(body(text), ranks=1)


@pytest.mark.parametrize("protocol", range(5))
def test_a_pickle_that_names_anything_else_is_refused_and_not_run(protocol, monkeypatch):
    monkeypatch.setattr(os, "system", lambda command: pytest.fail("it was run"))
    with pytest.raises(BadRequest, match="names posix.system"):
        check_tensors(body(b"cposix\nsystem\n(S'false'\ntR."), ranks=1)
    monkeypatch.undo()
    with pytest.raises(BadRequest, match=r"names (posix|os|nt)\.system"):
        check_tensors(body(pickle.dumps([Runs()], protocol)), ranks=1)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"serialized_named_tensors": "text"},
        {"serialized_named_tensors": []},
        body("no base64!"),
        body(b"no pickle"),
        body(pickle.dumps([1])[:-1]),
        body(b"\x93."),  # STACK_GLOBAL of an empty stack
        body(b"\x8c\x02osh\x00\x93."),  # of a memo that is empty
    ],
)
def test_what_no_engine_could_open_is_refused(given):
    with pytest.raises(BadRequest):
        check_tensors(given, ranks=1)


def test_each_rank_needs_an_entry():
    with pytest.raises(BadRequest, match="1 entries for engines of 2 ranks"):
        check_tensors(body(serialized(TENSORS)), ranks=2)


def test_what_passes_is_in_sglang_s_own_list():
    from sglang.srt.utils.common import SafeUnpickler

    allowed = collections.defaultdict(set)
    for module, name in SafeUnpickler.ALLOWED_GLOBALS:
        allowed[module].add(name)
    assert bodies._OF_TENSORS.keys() <= allowed.keys()
    for module in ("torch.multiprocessing.reductions", "sglang.srt.weight_sync.tensor_bucket"):
        assert all(bodies._is_allowed(module, name) for name in allowed[module])


def test_an_engine_has_as_many_ranks_as_it_says():
    assert ranks_of(b'{"tp_size": 4, "pp_size": 2, "other": null}') == 8


def test_memory_is_named_by_sglang_s_tags():
    assert tags_of({"tags": ["weights"]}) == ["weights"]
    assert len(tags_of({})) == 3
    with pytest.raises(BadRequest, match="kv_cache"):
        tags_of({"tags": ["everything"]})

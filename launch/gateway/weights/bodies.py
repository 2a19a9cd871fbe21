"""What a trainer may send on to engines: bodies that would end one are refused here, unread.

SGLang unpickles ``serialized_named_tensors`` in its scheduler. Whatever its allow-list blocks, and
whatever cannot be opened there, is an exception that ends the engine; so these are looked through
as bytes, opcode by opcode, and nothing is loaded.
"""

from __future__ import annotations

import base64
import binascii
import pickletools
import re
from collections.abc import Iterator, Sequence

import msgspec

from common.json import JsonObject
from launch.gateway.errors import BadRequest

MEMORY_TAGS = ("kv_cache", "weights", "cuda_graph")
TENSORS = "serialized_named_tensors"
_OF_TENSORS = {
    "torch": r"\w*(Tensor|Storage)|Size|device|dtype|(bcomplex|bfloat|complex|float|q?u?int|bit)\w*"
    r"|bool|half|double|long|short|c(float|double|half)",
    "torch.storage": r"\w*Storage",
    "torch.nn.parameter": r"Parameter",
    "torch.serialization": r"_get_layout",
    "torch._tensor": r"_rebuild_from_type_v2",
    "torch._utils": r"_rebuild_\w+",
    "torch.multiprocessing.reductions": r"rebuild_\w+",
    "collections": r"OrderedDict|defaultdict|deque|Counter",
    "builtins": r"bool|bytearray|bytes|complex|dict|float|frozenset|int|list|range|set|slice|str"
    r"|tuple",
    "functools": r"partial",
    "copyreg": r"__newobj(_ex)?__",
    "_codecs": r"encode",
    "types": r"SimpleNamespace",
    "sglang.srt.model_executor.model_runner": r"LocalSerializedTensor",
    "sglang.srt.model_executor.model_runner_components.weight_updater": r"LocalSerializedTensor",
    "sglang.srt.utils.patch_torch": r"_rebuild_\w+_tensor_modified",
    "sglang.srt.weight_sync.tensor_bucket": r"FlattenedTensor(Bucket|Metadata)",
}
"""By module the names that a pickle of tensors has, in SGLang's own list too."""
_BY_DESCRIPTOR = {
    ("torch.multiprocessing.reductions", "rebuild_storage_fd"),
    ("multiprocessing.reduction", "rebuild_handle"),
    ("multiprocessing.resource_sharer", "DupFd"),
}
"""A file descriptor is the sender's: it is asked for with the sender's secret, which engines of
another process tree do not have."""
_IMPORTS = ("GLOBAL", "INST")
_ODD = ("EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "POP", "POP_MARK", "DUP")
"""No pickle of tensors has them."""


def check_tensors(body: JsonObject, ranks: int) -> None:
    """Raise :class:`BadRequest` with a sentence if engines could not live through it. ``ranks``: of
    each engine, which all open one entry each."""
    given = body.get(TENSORS)
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        raise BadRequest(f"{TENSORS} is to be a list of base64 texts, one a rank.", TENSORS)
    if len(given) < ranks:
        raise BadRequest(
            f"{TENSORS} has {len(given)} entries for engines of {ranks} ranks each.", TENSORS
        )
    for text in given:
        try:
            pickled = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadRequest(f"{TENSORS} is no base64: {error}", TENSORS) from error
        _check_pickle(pickled)


def _check_pickle(pickled: bytes) -> None:
    for module, name in _globals_of(pickled):
        if (module, name) in _BY_DESCRIPTOR:
            raise BadRequest(
                f"{TENSORS} shares memory by file descriptors, which no engine can open: call "
                'torch.multiprocessing.set_sharing_strategy("file_system") in the trainer, or '
                "update from disk or by a group.",
                TENSORS,
            )
        if not _is_allowed(module, name):
            raise BadRequest(
                f"{TENSORS} names {module}.{name}, which is nothing of tensors: it would end the "
                "engine that opens it.",
                TENSORS,
            )


def _is_allowed(module: str, name: str) -> bool:
    return re.fullmatch(_OF_TENSORS.get(module, "(?!)"), name) is not None


def _globals_of(pickled: bytes) -> Iterator[tuple[str, str]]:
    """What a pickle would import; nothing of it is run. Raises :class:`BadRequest`."""
    pushed: list[str] = []
    """What is on the stack, as far as it is text; all else is empty."""
    memo: dict[int, str] = {}
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name in _IMPORTS:
                module, _, name = str(argument).partition(" ")
                yield module, name
            elif opcode.name == "STACK_GLOBAL":
                yield pushed[-2], pushed[-1]
            elif opcode.name in _ODD:
                raise BadRequest(f"{TENSORS} is no plain pickle: it has {opcode.name}.", TENSORS)
            if opcode.name == "MEMOIZE":
                memo[len(memo)] = pushed[-1]
            elif opcode.name.endswith("PUT"):
                memo[int(argument or 0)] = pushed[-1]
            elif opcode.name.endswith("GET"):
                pushed.append(memo[int(argument or 0)])
            elif opcode.name not in ("PROTO", "FRAME"):
                pushed.append(argument if isinstance(argument, str) else "")
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise BadRequest(f"{TENSORS} is no pickle: {error}", TENSORS) from error


def ranks_of(server_info: bytes) -> int:
    """Of an engine, from what SGLang says of itself: each holds some of the weights."""
    info = msgspec.json.decode(server_info, type=_ServerInfo)
    return info.tp_size * info.pp_size


class _ServerInfo(msgspec.Struct):
    tp_size: int = 1
    pp_size: int = 1


def tags_of(body: JsonObject) -> Sequence[str]:
    """Which memory a body is about; raises :class:`BadRequest`."""
    tags = body.get("tags") or list(MEMORY_TAGS)
    if not isinstance(tags, list) or not all(tag in MEMORY_TAGS for tag in tags):
        raise BadRequest(f"tags are to be of {', '.join(MEMORY_TAGS)}.", "tags")
    return tags

"""What a trainer has for a cluster: weights in shared memory, or sent in a group."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors.torch import load_file

Tensors = list[tuple[str, torch.Tensor]]


def tensors_of(model: Path) -> Tensors:
    return sorted(load_file(model / "model.safetensors").items())


def serialized(tensors: Tensors) -> str:
    """As SGLang's clients do it; the memory is shared by name, as long as the tensors live."""
    from sglang.srt.utils import MultiprocessingSerializer

    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        text: str = MultiprocessingSerializer.serialize(tensors, output_str=True)
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
    return text


class Group:
    """Rank 0 of a group whose other ranks are the engines'."""

    def __init__(self, name: str, port: int, world_size: int) -> None:
        """``port``: a free one, where the ranks meet."""
        self.name, self.port = name, port
        self._world_size = world_size
        self._group: Any = None

    def body(self) -> dict[str, Any]:
        """Of ``/init_weights_update_group``."""
        return {
            "master_address": "127.0.0.1",
            "master_port": self.port,
            "rank_offset": 1,
            "world_size": self._world_size,
            "group_name": self.name,
            "backend": "gloo",
        }

    def join(self) -> threading.Thread:
        """Returns once the others have joined as well."""
        from sglang.srt.utils import init_custom_process_group

        def work() -> None:
            self._group = init_custom_process_group(
                backend="gloo",
                init_method=f"tcp://127.0.0.1:{self.port}",
                world_size=self._world_size,
                rank=0,
                group_name=self.name,
            )

        return _begun(work)

    def broadcast(self, tensors: Tensors) -> threading.Thread:
        def work() -> None:
            for _, tensor in tensors:
                torch.distributed.broadcast(tensor, src=0, group=self._group)

        return _begun(work)


def described(tensors: Tensors) -> dict[str, Any]:
    """Fields of ``/update_weights_from_distributed``."""
    return {
        "names": [name for name, _ in tensors],
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
        "shapes": [list(tensor.shape) for _, tensor in tensors],
    }


def _begun(work: Any) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread

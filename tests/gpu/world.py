"""The made-up device of ``tests/engine/streams``, real: CUDA streams with kernels that sleep."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from engine.streams import Cuda
from tests.engine.prefill.sends import FakeManager

SLEEP_MS = 20


class SleepyCuda(Cuda):
    """Each launch sleeps first, so that whoever does not wait comes too early."""

    def __init__(self) -> None:
        self.forward, self.schedule = torch.cuda.Stream(), torch.cuda.Stream()
        rate_khz = torch.cuda.get_device_properties(0).clock_rate
        self._cycles = int(rate_khz * SLEEP_MS)

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        with torch.cuda.stream(stream):
            yield

    def launch(self, kernel: Callable[[], object]) -> None:
        """Into the current stream."""
        torch.cuda._sleep(self._cycles)
        kernel()

    def wait_stream(self, stream: Any, other: Any) -> None:
        stream.wait_stream(other)

    def drain(self) -> None:
        torch.cuda.synchronize()


class GpuManager(FakeManager):
    """The prefill engine's pool is on the GPU; a write is a copy past all of its streams, as a
    NIC's is."""

    def __init__(self, components: int = 2) -> None:
        super().__init__(components)
        self.on_gpu = [torch.from_numpy(buffer.copy()).cuda() for buffer in self.own]
        self.kv_args.kv_data_ptrs = [buffer.data_ptr() for buffer in self.on_gpu]
        self._nic = torch.cuda.Stream()

    def batch_transfer_sync_write(self, session: Any, src: Any, dst: Any, lengths: Any) -> int:
        for a, b, length in zip(src, dst, lengths, strict=True):
            there = (ctypes.c_uint8 * length).from_address(b)
            torch.from_numpy(np.frombuffer(there, np.uint8)).copy_(self._read(a, length))
        return 0

    def _read(self, address: int, length: int) -> torch.Tensor:
        for buffer in self.on_gpu:
            start = address - buffer.data_ptr()
            if 0 <= start < len(buffer):
                host = torch.empty(length, dtype=torch.uint8, pin_memory=True)
                with torch.cuda.stream(self._nic):
                    host.copy_(buffer[start : start + length], non_blocking=True)
                self._nic.synchronize()
                return host
        raise AssertionError("an address of nobody")

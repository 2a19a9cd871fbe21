"""Order on the device: what it has been given to do, and what of that it has done.

On CUDA a call returns when its work is queued in a stream. Agents and decode engines read and
write KV past the streams, so whatever makes them do it waits for a *mark* behind the work that
it depends on. Nothing else in the engine names a stream.
"""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from transfer.ranges import Addresses

_WRITES_ORDERING = 118
"""CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING."""
_OWNER = 100
"""CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER; 0 is none, 200 all devices."""


class Mark(Protocol):
    """A point in a stream."""

    def query(self) -> bool:
        """Whether the device has passed it."""

    def synchronize(self) -> None:
        """Wait for that, from any thread, without the GIL."""

    def elapsed_time(self, later: Mark) -> float:
        """Milliseconds to a later mark; both timed, and passed."""


Stream = object
"""Work that the device does in the order in which it got it."""


class Device(Protocol):
    """What is asked of a device with streams. ``stream`` None: the caller's current one."""

    def mark(self, stream: Stream | None, timed: bool = False) -> Mark:
        """Behind all that the stream has been given."""

    def to_host(self, values: torch.Tensor) -> torch.Tensor:
        """A copy that is made when the caller's current stream comes to it."""

    def within(self, stream: Stream | None) -> AbstractContextManager[object]:
        """What is launched meanwhile goes there."""

    def is_capturing(self) -> bool:
        """Whether calls go into a graph instead of a stream."""


class Cuda:
    """The :class:`Device` of this process. (Untested: no such machine was at hand.)"""

    def mark(self, stream: Stream | None, timed: bool = False) -> Mark:
        event = torch.cuda.Event(enable_timing=timed, blocking=True)  # whoever waits, sleeps
        event.record(stream or torch.cuda.current_stream())
        return event

    def to_host(self, values: torch.Tensor) -> torch.Tensor:
        # From pageable memory the copy would wait for the stream.
        copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        return copy.copy_(values, non_blocking=True)

    def within(self, stream: Stream | None) -> AbstractContextManager[object]:
        return torch.cuda.stream(stream or torch.cuda.current_stream())

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()


def writes_are_ordered() -> bool:
    """Whether a kernel of the current GPU that begins after a NIC's completion sees all that it
    has written to the GPU's memory; otherwise it would have to be flushed first."""
    ordering = ctypes.c_int(0)
    driver = ctypes.CDLL("libcuda.so.1")
    asked = driver.cuDeviceGetAttribute(
        ctypes.byref(ordering), _WRITES_ORDERING, torch.cuda.current_device()
    )
    return asked == 0 and ordering.value >= _OWNER


class _Passed:
    """A CPU has done its work when the call returns."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: Mark) -> float:
        return 0.0


PASSED: Mark = _Passed()


class HostPages:
    """Pages, whose numbers are on their way from the device; how many is known at once."""

    def __init__(self, rows: torch.Tensor, page_tokens: int, here: Mark = PASSED) -> None:
        """``rows``: of each page the first."""
        self.here = here
        self._rows = rows
        self._page_tokens = page_tokens

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, part: slice) -> HostPages:
        return HostPages(self._rows[part], self._page_tokens, self.here)

    def get(self) -> Addresses:
        """Waits until they are here. Shape (pages,)."""
        self.here.synchronize()
        return self._numbers

    @cached_property
    def _numbers(self) -> Addresses:
        """Every layer asks for them."""
        return self._rows.numpy().astype(np.int64) // self._page_tokens


class Streams:
    """An engine's. ``device`` None: a CPU.

    ``forward`` is the stream of forwards, None where the scheduler's thread launches them into
    its own (``--disable-overlap-schedule``).
    """

    def __init__(self, device: Device | None = None, forward: Stream | None = None) -> None:
        self.device = device
        self._forward = forward

    def after_forwards(self) -> Mark:
        """Behind every forward launched so far, and behind what has been launched of one that
        is being launched now. For the scheduler's thread.

        At one rank of an engine it stands for all: a forward ends with a collective, and each
        layer's KV is written before the layer's own.
        """
        return PASSED if self.device is None else self.device.mark(self._forward)

    def behind_forwards(self) -> AbstractContextManager[object]:
        """What the scheduler's thread launches meanwhile comes after every forward launched so
        far, and before the next one."""
        return nullcontext() if self.device is None else self.device.within(self._forward)

    def pages(self, rows: torch.Tensor, page_tokens: int) -> HostPages:
        """Of rows of the KV pool, page after page. Does not wait for the scheduler's stream,
        which itself may wait for a forward."""
        first_rows = rows[::page_tokens]
        if self.device is None:
            return HostPages(first_rows.clone(), page_tokens)
        copy = self.device.to_host(first_rows)
        return HostPages(copy, page_tokens, self.device.mark(None))

"""glibc's malloc, told to keep what a forward frees for the next one.

On a CPU the temporaries of each layer's attention (keys and values gathered by page, the mask,
tens of MB) come from malloc and go back to it. By default glibc returns them to the kernel when
they are their own mapping or lie at the end of the heap, and the next layer then pays a page
fault for every 4 KiB. Whether it does depends on the sizes that a process happened to free
before, so equal engines differ by a sixth of their forwards' time, for as long as they live.
"""

from __future__ import annotations

import ctypes
import logging

KEPT_BYTES = 1 << 30
"""Freed memory at the end of the heap that a process keeps; blocks from this size on are mappings
of their own, which are returned when freed."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc, malloc.h

log = logging.getLogger(__name__)


def keep_freed_memory() -> None:
    """Of this process and those that it forks. Without glibc nothing is changed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
        if mallopt is None or not mallopt(option, KEPT_BYTES):
            log.warning("malloc not set to keep freed memory: forwards on the CPU may be slower")
            return

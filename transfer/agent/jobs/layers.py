"""Moves a transfer's next layers, and says on the engine's completion board that they are there."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from common.board_word import BOARD_WORD_BYTES, FAILED, board_word
from transfer.agent.jobs.heads import Staging
from transfer.agent.jobs.transfer import Transfer
from transfer.mooncake import BYTES_PER_BATCH, PeerSuspended, TransferFailed, TransferPeer
from transfer.pacing.pacer import Pacer
from transfer.ranges import Ranges, joined, layer_ranges

log = logging.getLogger(__name__)


class LayerMover:
    """Thread-safe, for one transfer a thread; ``transfers_max`` of them at once."""

    def __init__(
        self,
        peer: TransferPeer,
        transfers_max: int,
        pacer_towards: Callable[[str], Pacer | None],
    ) -> None:
        self._peer = peer
        self._pacer_towards = pacer_towards
        self._words = np.zeros(transfers_max, np.uint64)
        peer.register(int(self._words.ctypes.data), self._words.nbytes)
        self._own = threading.local()

    def move(self, transfer: Transfer) -> Exception | None:
        """The next layer, or layers; returns what has ended the transfer, if anything has."""
        try:
            transfer.check()
            copy = self._peer.read if transfer.is_read else self._peer.write
            before_batch, batch_bytes = self._pace(transfer)
            layers = transfer.next_layers
            for ranges in self._ranges(transfer, layers):
                copy(transfer.session_id, *ranges, before_batch, batch_bytes)
            transfer.layers_done = layers.stop
            if transfer.board_address:
                self._write_word(transfer, transfer.layers_done)
        except Exception as error:  # whatever it is, it ends this transfer and reaches its owner
            return self._say_failed(transfer, error) if transfer.board_address else error
        return None

    def _pace(self, transfer: Transfer) -> tuple[Callable[[int], None], int]:
        """What runs before each batch, with its bytes; and how many bytes it has at most."""
        # What is read is sent by another process.
        pacer = None if transfer.is_read else self._pacer_towards(transfer.session_id)
        if pacer is None:
            return lambda nbytes: transfer.check(), BYTES_PER_BATCH
        return partial(pacer.wait, transfer.precedence, transfer.check), pacer.batch_bytes

    def _ranges(self, transfer: Transfer, layers: range) -> Iterator[Ranges]:
        groups = transfer.groups
        yield from joined(
            [
                layer_ranges(group.layout, group.addresses, layers, group.slots, group.places)
                for group in groups
                if len(group.places)
            ]
        )
        for group in groups:
            for blocks in group.others:
                if not hasattr(self._own, "staging"):
                    page_bytes_max = max(max(each.layout.component_bytes) for each in groups)
                    self._own.staging = Staging(self._peer.register, page_bytes_max)
                for layer in layers:
                    yield from self._own.staging.ranges(blocks, group.addresses, layer)

    def _write_word(self, transfer: Transfer, code: int) -> None:
        self._words[transfer.scratch] = board_word(transfer.job, code)
        source = int(self._words.ctypes.data) + transfer.scratch * BOARD_WORD_BYTES
        word = np.array([[source], [transfer.board_address], [BOARD_WORD_BYTES]], np.int64)
        self._peer.write(transfer.session_id, *word)

    def _say_failed(self, transfer: Transfer, error: Exception) -> Exception:
        """Best effort: the engine is told by message as well. Returns what ends the transfer:
        ``error``, unless the word itself may still land."""
        try:
            if isinstance(error, TransferFailed):
                self._peer.forgive(transfer.session_id)
            self._write_word(transfer, FAILED)
        except PeerSuspended:
            log.debug("board not written job=%d", transfer.job)
        except TransferFailed as also:
            return error if isinstance(error, TransferFailed) else also
        except Exception:  # of the word alone, which was not sent: the worker goes on
            log.exception("board not written job=%d", transfer.job)
        return error

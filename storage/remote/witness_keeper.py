"""Witnesses beside the packs of a remote store (:mod:`storage.witnesses`)."""

from __future__ import annotations

from storage.remote.objects.calls import RemoteCalls

FOLDER = "witness/"
_BYTES_MAX = 1 << 20


class RemoteKeeper:
    """A :class:`storage.witnesses.Keeper`. Of two that write at once the first one counts where
    the store has conditional writes; elsewhere the last, and both read it back."""

    def __init__(self, calls: RemoteCalls) -> None:
        self._calls = calls

    def read(self, namespace_digest: bytes) -> bytes:
        try:
            return bytes(self._calls.read(FOLDER + namespace_digest.hex(), 0, _BYTES_MAX))
        except FileNotFoundError:
            return b""

    def create(self, namespace_digest: bytes, values: bytes) -> None:
        self._calls.create(FOLDER + namespace_digest.hex(), values)

    def remove(self, namespace_digest: bytes) -> None:
        self._calls.delete(FOLDER + namespace_digest.hex())

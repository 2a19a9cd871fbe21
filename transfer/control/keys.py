"""Who is who on control connections: key pairs derived from the cluster's one secret.

Every connection is CURVE: each end proves its key, and what crosses it is encrypted. The pair of a
process is made of the secret and its name, so whoever holds the secret knows everyone, and nobody
else can be anyone. One mechanism serves unix sockets and TCP alike, and tells what neither the mode
of a folder nor an address does: which process has sent a message (:mod:`transfer.control.senders`).
"""

from __future__ import annotations

import hmac
import os
import stat
from pathlib import Path

import zmq
from zmq.utils import z85

from common.process_settings import BadSettings

SECRET_CHARS_MIN = 32
_CONTEXT = b"dualpath-control\0"
_HTTP_CONTEXT = b"dualpath-http\0"

ENGINE_HTTP = "engine-http"
"""Purpose of the key without which nobody may call an engine's HTTP port (:func:`derived`)."""


class BadSecret(Exception):
    """The file of the cluster's secret cannot be used; the text says what to do."""


def read_secret(file: Path) -> str:
    """Raises :class:`BadSecret` for a file that others may read, or that holds next to nothing."""
    try:
        with file.open("rb") as opened:
            mode = os.fstat(opened.fileno()).st_mode
            secret = opened.read().decode(errors="replace").strip()
    except OSError as error:
        raise BadSecret(f"{file}: {error.strerror}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise BadSecret(f"{file} is open to others (mode {mode & 0o777:04o}): chmod 600 {file}")
    if len(secret) < SECRET_CHARS_MIN:
        raise BadSecret(
            f"{file} holds {len(secret)} characters, and {SECRET_CHARS_MIN} are the least: make "
            "one with `(umask 077; openssl rand -hex 32 > FILE)`"
        )
    return secret


def derived(secret: str, purpose: str) -> str:
    """What only holders of the cluster's secret can say, and what says nothing of it: the key of
    one kind of HTTP request."""
    return hmac.digest(secret.encode(), _HTTP_CONTEXT + purpose.encode(), "sha256").hex()


class Keys:
    """The pair of the process ``name``, and everyone's public key; all in Z85, as zmq takes
    them. Raises :class:`BadSettings` without a secret."""

    def __init__(self, name: str, secret: str) -> None:
        if not secret:
            raise BadSettings(f"{name} has no secret to make the keys of control connections of")
        self.name = name
        self._secret = secret.encode()
        self.private = self._private(name)

    def public(self, name: str) -> bytes:
        return zmq.curve_public(self._private(name))

    def _private(self, name: str) -> bytes:
        # Any 32 bytes are a Curve25519 key.
        return z85.encode(hmac.digest(self._secret, _CONTEXT + name.encode(), "sha256"))

"""API keys: how they are written, and whose a request's is."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Iterable, Sequence

import msgspec

_KEY = re.compile(r"[!-~]+")
"""What a header can carry without quotes."""
_TENANT_AND_KEY = re.compile(r"([^\s:]+):\s+(\S+)")


class BadKeys(ValueError):
    """No keys; the text says how they are written, and shows none."""


class ApiKey(msgspec.Struct, frozen=True):
    """A tenant may have several, so that one can be replaced while the other is used."""

    tenant: str
    key: str


def read_keys(written: object) -> tuple[ApiKey, ...]:
    """From a file's mapping of tenants to their keys, or from text: its JSON, or lines of ``KEY``
    or ``TENANT: KEY``. A key without a tenant is one by itself. Raises :class:`BadKeys`."""
    if isinstance(written, str) and written.lstrip().startswith("{"):
        try:
            written = json.loads(written)
        except json.JSONDecodeError as error:
            raise BadKeys("this is no JSON object of tenants and their keys") from error
    pairs = list(_of_mapping(written) if isinstance(written, dict) else _of_lines(written))
    if not pairs:  # which would let everybody in
        raise BadKeys("there is no key in it")
    for number, (_, key) in enumerate(pairs, start=1):
        if not _KEY.fullmatch(key):
            raise BadKeys(f"key {number} has characters that no header can carry: ASCII only")
    if len({key for _, key in pairs}) < len(pairs):
        raise BadKeys("two of the keys are the same")
    return tuple(ApiKey(tenant or _name_of(key), key) for tenant, key in pairs)


def _of_mapping(written: dict[object, object]) -> Iterable[tuple[str, str]]:
    for tenant, keys in written.items():
        for key in keys if isinstance(keys, list) else [keys]:
            if not isinstance(key, str):
                raise BadKeys(f"a key of {tenant} is no text: put it in quotes")
            yield str(tenant), key


def _of_lines(written: object) -> Iterable[tuple[str, str]]:
    if not isinstance(written, str):
        raise BadKeys("write a key, or a mapping of tenants to their keys")
    for line in map(str.strip, written.splitlines()):
        if line and not line.startswith("#"):
            named = _TENANT_AND_KEY.fullmatch(line)
            yield (named[1], named[2]) if named else ("", line)


def _name_of(key: str) -> str:
    return "key-" + hashlib.blake2b(key.encode(), digest_size=4).hexdigest()


def keys_text(keys: Sequence[ApiKey]) -> str:
    """What :func:`read_keys` reads back."""
    by_tenant: dict[str, list[str]] = {}
    for one in keys:
        by_tenant.setdefault(one.tenant, []).append(one.key)
    return json.dumps(by_tenant) if by_tenant else ""


class Keyring:
    """Whose key is it? The time it takes says nothing about the keys."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._tenants = [(_digest(one.key), one.tenant) for one in keys]

    def __bool__(self) -> bool:
        return bool(self._tenants)

    def tenant(self, authorization: str | None) -> str | None:
        """Of the header ``Authorization: Bearer KEY``; None if it holds no key of these."""
        scheme, _, given = (authorization or "").partition(" ")
        digest = _digest(given.strip())
        found = None
        for known, tenant in self._tenants:
            if hmac.compare_digest(known, digest):
                found = tenant
        return found if scheme.lower() == "bearer" else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()

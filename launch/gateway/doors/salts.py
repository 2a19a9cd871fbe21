"""Cache salts of tenants that are told apart by their API keys.

KV is found by its tokens and its salt alone. With a salt that only the tenant's key gives, nobody
finds, or can tell that there is, what another tenant has sent: not by its time to the first
token, nor by ``cached_tokens`` or the trace.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Mapping, Sequence

from common.block import tenant_digest
from common.json import JsonObject
from launch.gateway.doors.keys import ApiKey

log = logging.getLogger(__name__)

SALT_HEX_DIGITS = 32


def salt_keys(keys: Sequence[ApiKey]) -> dict[str, bytes]:
    """Of each tenant: its first key, so that others may be added and taken away."""
    return {one.tenant: one.key.encode() for one in reversed(keys)}


def derived_salt(key: bytes, salt: str) -> str:
    """What stands for a client's own salt (or none), within its tenant."""
    message = b"dualpath cache salt\0" + salt.encode(errors="surrogatepass")
    return hmac.new(key, message, hashlib.sha256).hexdigest()[:SALT_HEX_DIGITS]


def salted(body: JsonObject, key: bytes) -> JsonObject:
    """A request of the tenant with this key; its own salt is of the schema's type."""
    given = body.get("cache_salt")
    derived = []
    for salt in given if isinstance(given, list) else [given]:
        derived.append(derived_salt(key, salt if isinstance(salt, str) else ""))
    return body | {"cache_salt": derived if isinstance(given, list) else derived[0]}


def tell_digests(keys: Mapping[str, bytes]) -> None:
    """What a store says of each tenant's blocks (without a salt of the client's own), for quotas
    and drops: ``tenant-digest:`` in docs/storage.md."""
    for tenant, key in keys.items():
        log.info("tenant name=%s digest=%s", tenant, tenant_digest(derived_salt(key, "")))

"""Blocks of several tenants and weight versions."""

from __future__ import annotations

import msgspec

from common.block import UNLABELLED, BlockKey, BlockLabel, tenant_digest
from storage.tiers.contract import BlockIO, Tier
from tests.storage.conftest import finish, key_of, payload_of

ANN, BOB = "ann's salt", "bob's salt"


def label(tenant: str = "", version: str = "v1") -> BlockLabel:
    return msgspec.structs.replace(
        UNLABELLED,
        namespace_digest=version.encode().ljust(32, b"\0"),
        weight_version=version,
        tenant=tenant_digest(tenant) if tenant else "",
    )


def write_as(tier: Tier, of: BlockLabel, *numbers: int) -> list[BlockKey]:
    """Returns the keys that were stored."""
    blocks = [BlockIO(key_of(i), memoryview(payload_of(key_of(i))), of) for i in numbers]
    stored = []
    for block in blocks:
        tier.submit_writes([block])
        if finish(tier, 1)[block.key].error is None:
            stored.append(block.key)
    return stored


def held(tier: Tier) -> set[int]:
    return {i for i in range(200) if tier.contains([key_of(i)])[0]}


def fill(tier: Tier) -> None:
    """Four blocks of Ann's (0 to 3), three of Bob's (10 to 12); then the tier is closed."""
    write_as(tier, label(ANN, "v1"), *range(4))
    write_as(tier, label(BOB, "v2"), *range(10, 13))
    tier.close()

"""Whose blocks a tier holds: selections of owners, quotas over them, and what each uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import msgspec

from common.block import BlockOwner, tenant_digest
from common.sizes import parse_size

FIELDS = ("namespace", "model", "version", "tenant", "tenant-digest")


class BadSelector(ValueError):
    """No selection of owners; the text says what one looks like."""


class Selector(msgspec.Struct, frozen=True):
    """Owners that agree in one field; ``*`` stands for every owner.

    ``namespace`` and ``model`` take the first digits of a digest, ``version`` a weight
    version, ``tenant`` a salt, ``tenant-digest`` what is stored of a salt.
    """

    field: str
    value: str

    @classmethod
    def parse(cls, text: str) -> Selector:
        """Such as ``version:step-12``; raises :class:`BadSelector`."""
        field, colon, value = text.partition(":")
        if field not in FIELDS or not colon or not value:
            raise BadSelector(
                f"{text!r} selects no blocks; write FIELD:VALUE with one of {', '.join(FIELDS)}"
            )
        if field == "tenant" and value != "*":
            return cls("tenant-digest", tenant_digest(value))
        return cls("tenant-digest" if field == "tenant" else field, value)

    def value_of(self, owner: BlockOwner) -> str | None:
        """The owner's value in this field; None if it is not selected."""
        if self.field == "namespace":
            own = owner.namespace_digest.hex()
            is_same = own.startswith(self.value)
        elif self.field == "model":
            own = owner.model_digest
            is_same = own.startswith(self.value)
        else:
            own = owner.weight_version if self.field == "version" else owner.tenant
            is_same = own == self.value
        return own if is_same or self.value == "*" else None

    def __str__(self) -> str:
        return f"{self.field}:{self.value}"


class Quota(msgspec.Struct, frozen=True):
    """At most ``bytes_max`` for all owners of a selector together; of ``*``, for each value."""

    selector: Selector
    bytes_max: int

    def subject(self, owner: BlockOwner) -> str | None:
        """Those with the same subject share the bytes; None: the quota does not concern it."""
        value = self.selector.value_of(owner)
        return value if value is None or self.selector.value == "*" else self.selector.value

    def __str__(self) -> str:
        return f"{self.selector}={self.bytes_max}"

    @classmethod
    def parse(cls, text: str) -> Quota:
        """Such as ``tenant:*=20GiB``; raises :class:`BadSelector`."""
        selector, equals, size = text.rpartition("=")
        if not equals:
            raise BadSelector(f"{text!r} is no quota; write FIELD:VALUE=SIZE")
        try:
            return cls(Selector.parse(selector), parse_size(size))
        except ValueError as error:
            raise BadSelector(f"{text!r} is no quota: {error}") from error


def read_quotas(text: str) -> list[Quota]:
    """Quotas separated by commas; raises :class:`BadSelector`."""
    return [Quota.parse(part.strip()) for part in text.split(",") if part.strip()]


class OwnerGroups:
    """Gives owners the small numbers, *groups*, by which an index knows them, and keeps what
    each uses. A dropped owner that comes back gets a new group."""

    def __init__(self, quotas: Sequence[Quota] = ()) -> None:
        self._quotas = list(quotas)
        self._groups: dict[BlockOwner, int] = {}
        self._owners: list[BlockOwner] = []
        """By group, also of dropped ones."""
        self._subjects: list[list[str | None]] = []
        """Of each group, in each quota; None where it does not count, or no more."""
        self._used_bytes: Counter[int] = Counter()
        self._blocks: Counter[int] = Counter()
        self._subject_bytes: list[Counter[str]] = [Counter() for _ in self._quotas]

    def group_of(self, owner: BlockOwner) -> int:
        group = self._groups.get(owner)
        if group is None:
            group = self._groups[owner] = len(self._owners)
            self._owners.append(owner)
            self._subjects.append([quota.subject(owner) for quota in self._quotas])
        return group

    def note(self, group: int, blocks: int, nbytes: int) -> None:
        """So much more, or less, belongs to a group."""
        self._blocks[group] += blocks
        self._used_bytes[group] += nbytes
        self._count(group, nbytes)

    def _count(self, group: int, nbytes: int) -> None:
        for used, subject in zip(self._subject_bytes, self._subjects[group], strict=True):
            if subject is not None:
                used[subject] += nbytes

    def drop(self, selector: Selector) -> set[int]:
        """Groups of the owners selected; what comes of theirs from now on has other groups."""
        gone = {self._groups.pop(owner) for owner in selected(self._groups, [selector])}
        for group in gone:
            self._count(group, -self._used_bytes[group])
            self._subjects[group] = [None] * len(self._quotas)
        return gone

    def over_quota(self, group: int, nbytes: int) -> set[int] | None:
        """The groups one of whose blocks must go before ``group`` may have ``nbytes`` more;
        None if it may."""
        for number, quota in enumerate(self._quotas):
            subject = self._subjects[group][number]
            if subject is None:
                continue
            if self._subject_bytes[number][subject] + nbytes > quota.bytes_max:
                groups = self._groups.values()
                return {g for g in groups if self._subjects[g][number] == subject}
        return None

    def usage(self) -> list[tuple[BlockOwner, int, int]]:
        """(owner, blocks, bytes) of each that has any and was not dropped."""
        return [
            (owner, self._blocks[group], self._used_bytes[group])
            for owner, group in self._groups.items()
            if self._blocks[group]
        ]


def selected(owners: Iterable[BlockOwner], selectors: Collection[Selector]) -> set[BlockOwner]:
    """Those that any of the selectors takes."""
    return {o for o in owners if any(s.value_of(o) is not None for s in selectors)}

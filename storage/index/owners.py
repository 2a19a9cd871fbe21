"""Whose blocks a tier holds: selections of owners, quotas over them, and what each uses."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import msgspec

from common.block import BlockOwner, tenant_digest
from common.sizes import parse_size

FIELDS = ("namespace", "model", "version", "tenant", "tenant-digest")
PART = "part"
"""Of quotas alone: what is dropped is dropped with its parts."""


class BadSelector(ValueError):
    """No selection of owners; the text says what one looks like."""


class Selector(msgspec.Struct, frozen=True):
    """Owners that agree in one field; ``*`` stands for every owner.

    ``namespace`` and ``model`` take the first digits of a digest, ``version`` a weight
    version, ``tenant`` a salt, ``tenant-digest`` what is stored of a salt; ``part`` the kind of a
    part.
    """

    field: str
    value: str

    @classmethod
    def parse(cls, text: str, fields: Sequence[str] = FIELDS) -> Selector:
        """Such as ``version:step-12``; raises :class:`BadSelector`."""
        field, colon, value = text.partition(":")
        if field not in fields or not colon or not value:
            raise BadSelector(
                f"{text!r} selects no blocks; write FIELD:VALUE with one of {', '.join(fields)}"
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
        elif self.field == PART:
            own = owner.part
            is_same = own == self.value
            return own if is_same or (own and self.value == "*") else None
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
            return cls(Selector.parse(selector, (*FIELDS, PART)), parse_size(size))
        except ValueError as error:
            raise BadSelector(f"{text!r} is no quota: {error}") from error


def read_quotas(text: str) -> list[Quota]:
    """Quotas separated by commas; raises :class:`BadSelector`."""
    return [Quota.parse(part.strip()) for part in text.split(",") if part.strip()]


class _Group(msgspec.Struct):
    owner: BlockOwner
    subjects: list[str | None]
    """In each quota; None where it does not count, or no more."""
    blocks: int = 0
    nbytes: int = 0


class _Subject(msgspec.Struct):
    """What a quota counts together."""

    groups: set[int] = msgspec.field(default_factory=set)
    nbytes: int = 0


class OwnerGroups:
    """Gives owners the small numbers, *groups*, by which an index knows them, and keeps what
    each uses. A dropped owner that comes back gets a new group. A group of which nothing is
    left is forgotten: what is kept grows with the owners of what is here, not with all who
    ever came. ``forgotten`` is told its number before it may serve another owner.
    """

    def __init__(
        self, quotas: Sequence[Quota] = (), forgotten: Callable[[int], None] = lambda group: None
    ) -> None:
        self._quotas = list(quotas)
        self._forgotten = forgotten
        self._numbers: dict[BlockOwner, int] = {}
        """Without dropped ones."""
        self._groups: dict[int, _Group] = {}
        """Also of dropped owners, as long as something of theirs is left."""
        self._unused: list[int] = []
        self._subjects: list[dict[str, _Subject]] = [{} for _ in self._quotas]
        """Of each quota."""

    def __len__(self) -> int:
        return len(self._groups)

    def group_of(self, owner: BlockOwner) -> int:
        """Known until what was noted of it has gone again."""
        group = self._numbers.get(owner)
        if group is None:
            group = self._unused.pop() if self._unused else len(self._groups)
            self._numbers[owner] = group
            subjects = [quota.subject(owner) for quota in self._quotas]
            self._groups[group] = _Group(owner, subjects)
            for of_quota, subject in zip(self._subjects, subjects, strict=True):
                if subject is not None:
                    of_quota.setdefault(subject, _Subject()).groups.add(group)
        return group

    def note(self, group: int, blocks: int, nbytes: int) -> None:
        """So much more, or less, belongs to a group."""
        noted = self._groups[group]
        noted.blocks += blocks
        noted.nbytes += nbytes
        for of_quota, subject in zip(self._subjects, noted.subjects, strict=True):
            if subject is not None:
                of_quota[subject].nbytes += nbytes
        if not noted.blocks and not noted.nbytes:
            self._leave_quotas(group)
            del self._groups[group]
            if self._numbers.get(noted.owner) == group:
                del self._numbers[noted.owner]
            self._forgotten(group)
            self._unused.append(group)

    def _leave_quotas(self, group: int) -> None:
        noted = self._groups[group]
        for of_quota, subject in zip(self._subjects, noted.subjects, strict=True):
            if subject is not None:
                of_quota[subject].groups.discard(group)
                of_quota[subject].nbytes -= noted.nbytes
                if not of_quota[subject].groups:
                    del of_quota[subject]
        noted.subjects = [None] * len(self._quotas)

    def drop(self, selector: Selector) -> set[int]:
        """Groups of the owners selected; what comes of theirs from now on has other groups."""
        gone = {self._numbers.pop(owner) for owner in selected(self._numbers, [selector])}
        for group in gone:
            self._leave_quotas(group)
        return gone

    def over_quota(self, group: int) -> Collection[int] | None:
        """The groups one of whose blocks must go, as a quota that ``group`` counts in is
        exceeded; None: none is."""
        for number, quota in enumerate(self._quotas):
            subject = self._groups[group].subjects[number]
            if subject is None:
                continue
            used = self._subjects[number][subject]
            if used.nbytes > quota.bytes_max:
                return used.groups
        return None

    def usage(self) -> list[tuple[BlockOwner, int, int]]:
        """(owner, blocks, bytes) of each that has any and was not dropped."""
        noted = (self._groups[group] for group in self._numbers.values())
        return [(each.owner, each.blocks, each.nbytes) for each in noted if each.blocks]


def selected(owners: Iterable[BlockOwner], selectors: Collection[Selector]) -> set[BlockOwner]:
    """Those that any of the selectors takes."""
    return {o for o in owners if any(s.value_of(o) is not None for s in selectors)}

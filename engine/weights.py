"""Which weights an engine has now, by the namespace that they give its KV.

What a trainer calls its weights proves nothing: another job calls others by the same version. So
only two kinds have a *name* that other engines can have too: those that come from a folder whose
bytes were digested, and those of which the gateway has said that all engines have them
(:class:`~common.messages.from_gateway.CommitWeights`). All others are *unnamed*: their namespace is
this engine's own.

KV of older weights that an update leaves in the engine (in its prefix tree, in requests that run
on) makes what is computed from it doubtful. A name given meanwhile holds until that is flushed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec
from msgspec import structs

from common.block import Namespace
from common.messages.from_engines import WeightsState
from common.messages.from_gateway import CommitWeights

log = logging.getLogger(__name__)


class FolderDigested(msgspec.Struct, frozen=True):
    """An event: the engine's weights, as they are since a change, are those of a folder."""

    change: int
    digest: str
    """Empty: that cannot be told, or is not true any more."""


class VariantTaken(msgspec.Struct, frozen=True):
    """An event: the KV is not what others have under the same names (:mod:`engine.witness`)."""

    variant: int


NamespaceEvent = CommitWeights | FolderDigested | VariantTaken
"""Takes effect between two steps of the scheduler, at all ranks."""


class Weights:
    """A change takes effect at once; it is made in the scheduler's thread, at all ranks alike, and
    read in any."""

    def __init__(self, namespace: Namespace, unnamed: str = "") -> None:
        """``unnamed`` begins the version of weights that nobody has named: the same at every
        rank of this engine, and at no other engine."""
        self.namespace = namespace
        self.digest = namespace.digest()
        first = namespace.weight_version
        self.state = WeightsState(version=first, last_name=first)
        self.on_change: Callable[[], None] = _nobody_asked
        self._unnamed = unnamed
        self._first = namespace.model_digest, namespace.weight_version
        self._folder_digest = ""
        """Of the folder that the weights are from; empty where there is none."""

    def changed(self, version: str | None, is_clean: bool) -> None:
        """Weights have been written: every older block becomes unreachable. ``version`` is what
        the trainer calls them; ``is_clean``: the engine holds no KV."""
        self._folder_digest = ""
        self.state = structs.replace(
            self.state,
            changes=self.state.changes + 1,
            version=self.state.version if version is None else version,
            is_doubtful=not is_clean,
            is_digesting=False,
            is_broken=self.state.is_broken and self.state.in_session,
        )
        self._rename()

    def failed(self, is_clean: bool) -> None:
        """An update that had begun did not come to its end."""
        self.changed(None, is_clean)
        self.state = structs.replace(self.state, is_broken=True)

    def session(self, is_open: bool, is_clean: bool) -> None:
        """Between begin and end of a session weights may be written at any time."""
        is_broken = self.state.is_broken and not is_open
        self.state = structs.replace(self.state, in_session=True, is_broken=is_broken)
        self.changed(None, is_clean)
        self.state = structs.replace(self.state, in_session=is_open)

    def flushed(self) -> None:
        """What is computed from now on is of the present weights alone."""
        if self.state.is_doubtful:
            self.state = structs.replace(self.state, is_doubtful=False)
            self._rename()

    def digesting(self) -> None:
        """They are those of a folder; its digest is awaited."""
        self.state = structs.replace(self.state, is_digesting=True)

    def heard(self, event: NamespaceEvent) -> None:
        """From the gateway, or of this engine's own."""
        match event:
            case CommitWeights():
                self._commit(event)
            case FolderDigested():
                self._digested(event)
            case VariantTaken(variant=variant):
                self._take(variant=variant)

    def _digested(self, event: FolderDigested) -> None:
        if event.change != self.state.changes:
            return
        self.state = structs.replace(self.state, is_digesting=False)
        self._folder_digest = event.digest
        if event.digest and not self.state.is_doubtful:
            self._rename()

    def _commit(self, event: CommitWeights) -> None:
        if event.number != self.state.number or self.state.in_session:
            return  # it is of weights that were here before
        is_doubtful = self.state.is_doubtful or event.is_doubtful
        self.state = structs.replace(self.state, is_doubtful=is_doubtful)
        self._name(self._first[0], event.name)

    def _rename(self) -> None:
        """To what can be known here."""
        model_digest, first_version = self._first
        if self._folder_digest and not self.state.is_doubtful:
            self._name(self._folder_digest, first_version)
            return
        number = self.state.number + 1
        self.state = structs.replace(self.state, number=number, is_named=False)
        version = f"unnamed-{self._unnamed}-{number}"
        self._take(model_digest=model_digest, weight_version=version)

    def _name(self, model_digest: str, version: str) -> None:
        self.state = structs.replace(
            self.state,
            number=self.state.number + 1,
            named_at_change=self.state.changes,
            last_name=version,
            is_named=True,
            is_broken=False,
        )
        self._take(model_digest=model_digest, weight_version=version)

    def _take(self, **changes: str | int) -> None:
        self.namespace = structs.replace(self.namespace, **changes)
        self.digest = self.namespace.digest()
        log.info(
            "KV goes under a new namespace=%s version=%s named=%s doubtful=%s",
            self.digest.hex()[:16],
            self.state.version,
            self.state.is_named,
            self.state.is_doubtful,
        )
        self.on_change()


def _nobody_asked() -> None:
    pass

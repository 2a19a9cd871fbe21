"""Which weights an engine has now, by the namespace that they give its KV."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import msgspec

from common.block import Namespace
from engine.model_digest import model_digest

log = logging.getLogger(__name__)


class Weights:
    """A change takes effect at once; it is made in the scheduler's thread and read in any."""

    def __init__(self, namespace: Namespace, unnamed: str = "") -> None:
        """``unnamed`` begins the version of weights that nobody has named: the same at every
        rank of this engine, and at no other engine."""
        self.namespace = namespace
        self.digest = namespace.digest()
        self.on_change: Callable[[], None] = _nobody_asked
        self._unnamed = unnamed
        self._updates = 0

    def changed(self, version: str | None, model_path: str | None) -> None:
        """The next request sees other weights: every older block becomes unreachable.

        Weights from a folder are named by their digest. Others without a version get a
        namespace of this engine's own: nothing is shared until the next update names one.
        """
        digest = model_digest(Path(model_path)) if model_path else self.namespace.model_digest
        if version is None:
            version = "" if model_path else f"unnamed-{self._unnamed}-{self._updates}"
        self._updates += 1
        self._take(model_digest=digest, weight_version=version)

    def take_variant(self, variant: int) -> None:
        """The KV is not what others have under the same names (:mod:`engine.witness`)."""
        self._take(variant=variant)

    def _take(self, **changes: str | int) -> None:
        self.namespace = msgspec.structs.replace(self.namespace, **changes)
        self.digest = self.namespace.digest()
        log.info("KV goes under a new namespace=%s", self.digest.hex()[:16])
        self.on_change()


def _nobody_asked() -> None:
    pass

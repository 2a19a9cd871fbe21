"""The witness of a namespace: KV of a fixed prompt, sampled, as its first engine computed it.

A namespace says what should give equal KV: files, flags, layout. Whether it does, only KV can
tell: an environment variable, another SGLang, a kernel, a damaged weight in memory are in no
digest. So at its start each engine computes a prompt of :data:`PROMPT_TOKENS` tokens and
compares samples of the KV with those that the agents keep (``storage/witnesses.py``). If they
differ by more than rounding does, its KV goes under the namespace's next *variant*, where
engines that agree with it meet.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection

import msgspec
import numpy as np
from numpy.typing import NDArray

from common.block import Namespace
from common.messages.codec import Message
from common.messages.from_agents import KeptWitness
from common.messages.from_engines import KeepWitness
from common.samples import Sample, sample

log = logging.getLogger(__name__)

PROMPT_TOKENS = 64
_POSITIONS = np.arange(7, PROMPT_TOKENS, 8)
"""Not the first ones, to which some models attend with numbers far beyond all others."""
_NUMBERS = 16
"""Of each position, in each buffer of a layer."""
VARIANTS_MAX = 16
GREETING_S = 3.0
"""An agent that has not been heard by then is compared with when it comes."""
ANSWERS_S = 10.0
"""An agent that has not answered by then likewise."""

TOLERANCES = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 6e-2}
_TOLERANCE_BELOW = 0.25
"""Of types with fewer bits, such as the two of 8."""

Values = NDArray[np.float32]
"""Shape (layers, components, samples); NaN in layers that the engine holds no more."""


def prompt(vocabulary_tokens: int) -> list[int]:
    """The fixed prompt, for a vocabulary of this size."""
    return [(1009 * i + 17) % vocabulary_tokens for i in range(PROMPT_TOKENS)]


def samples_of(rows: Values, shard: int, shards: int) -> Values:
    """What is sampled of one component of a layer: from the numbers of this rank's shard, shape
    (PROMPT_TOKENS, numbers); NaN where another shard has the sample."""
    own = rows.shape[1]
    numbers = np.arange(_NUMBERS)
    step = max(1, own * shards // _NUMBERS)
    wanted = (numbers * own * shards // _NUMBERS + numbers % step) - shard * own
    is_own = (wanted >= 0) & (wanted < own)
    values = np.full((len(_POSITIONS), _NUMBERS), np.nan, np.float32)
    # A number that is none must not be taken for one that is not here.
    values[:, is_own] = np.nan_to_num(rows[np.ix_(_POSITIONS, wanted[is_own])], nan=np.inf)
    return values.ravel()


def merged(of_ranks: Collection[Values]) -> Values:
    """The samples of all ranks as one engine's."""
    first, *others = of_ranks
    for values in others:
        first = np.where(np.isnan(first), values, first)
    return first


def distance(one: Values, other: Values) -> float:
    """How far two engines' KV is apart: of the samples of one component of one layer, the
    greatest relative distance. Layers that one of them lacks do not count."""
    if one.shape != other.shape:
        return np.inf
    here = ~(np.isnan(one) | np.isnan(other))
    a, b = (np.where(here, values, 0).astype(np.float64) for values in (one, other))
    with np.errstate(all="ignore"):
        size = np.maximum(np.linalg.norm(a, axis=2), np.linalg.norm(b, axis=2))
        apart = np.linalg.norm(a - b, axis=2) / np.maximum(size, 1e-30)
    return float(np.nan_to_num(apart, nan=np.inf).max(initial=0.0))


def tolerance(namespace: Namespace) -> float:
    """What rounding may do: other kernels, batches, ranks. By the coarser of the types of
    computation and of KV; a wrong weight, scale or rotation moves KV by its own size."""
    computes_in = msgspec.json.decode(namespace.settings or "{}").get("dtype", "float32")
    types = (computes_in, namespace.kv_dtype)
    return max(TOLERANCES.get(name, _TOLERANCE_BELOW) for name in types)


class WitnessCheck:
    """Finds the variant of a namespace in which this engine's KV may go, and sees to it that
    this stays so when an agent comes later, with a store that the engine has not seen. While it
    looks for one, the engine's KV is ``apart``, in a variant that no other engine has.

    ``ask(agent, message)`` sends to one agent; ``take(variant)`` is called, from any thread,
    with each variant after the first. At the engine's leader.
    """

    def __init__(
        self,
        namespace: Namespace,
        values: Values,
        apart: int,
        ask: Callable[[str, Message], object],
        take: Callable[[int], None],
    ) -> None:
        self.differing_total = 0
        self.variant = 0
        """In which the engine's KV goes."""
        self._candidate = 0
        self._namespace = namespace
        self._values = values
        self._tolerance = tolerance(namespace)
        self._apart = apart
        self._ask = ask
        self._take = take
        self._asked: set[str] = set()
        """Agents that have been heard."""
        self._answered: set[str] = set()
        """Those that have said what they keep of the candidate."""
        self._furthest = 0.0
        """Of those that agree."""
        self._changed = threading.Condition(threading.RLock())

    def settle(self, agents: Collection[str]) -> None:
        """Wait until all of these have answered, or are late."""
        begun = time.monotonic()
        with self._changed:
            while (wait_s := self._wait_s(agents, time.monotonic() - begun)) > 0:
                self._changed.wait(wait_s)
            self._give_in(self._candidate)
        log.info(
            "witness compared variant=%d apart=%.3g differing=%d not_compared=%s after_s=%.3f",
            self.variant,
            self._furthest,
            self.differing_total,
            sorted(set(agents) - self._answered),
            time.monotonic() - begun,
        )

    def _wait_s(self, agents: Collection[str], waited_s: float) -> float:
        missing = set(agents) - self._answered
        if not missing or self._candidate > VARIANTS_MAX:
            return 0.0
        return (ANSWERS_S if missing & self._asked else GREETING_S) - waited_s

    def _give_in(self, candidate: int) -> None:
        """Whoever has not answered about the candidate is not waited for."""
        with self._changed:
            if candidate == self._candidate <= VARIANTS_MAX and self.variant != candidate:
                self.variant = candidate
                self._take(candidate)

    # ---- the thread of the links ----

    def greeted(self, agent: str) -> None:
        """A new incarnation of an agent has been heard: it is asked what it keeps."""
        with self._changed:
            self._asked.add(agent)
            self._answered.discard(agent)
            self._send(agent)

    def answered(self, agent: str, message: KeptWitness) -> None:
        """What an agent keeps of a variant; nothing, if it could not look."""
        with self._changed:
            if message.namespace_digest != self._digest:
                return  # of a variant that is ruled out already
            if not all(self._agrees(agent, values) for values in message.kept):
                self._try_next()
            else:
                self._answered.add(agent)
                if self._answered >= self._asked:
                    self._give_in(self._candidate)
            self._changed.notify_all()

    @property
    def _digest(self) -> bytes:
        return msgspec.structs.replace(self._namespace, variant=self._candidate).digest()

    def _agrees(self, agent: str, kept: bytes) -> bool:
        other = np.frombuffer(kept[: len(kept) // 4 * 4], np.float32)
        if other.size == self._values.size:
            other = other.reshape(self._values.shape)
        by = distance(self._values, other)
        if by <= self._tolerance:
            self._furthest = max(self._furthest, by)
            return True
        self.differing_total += 1
        log.error(
            "this engine's KV of the witness prompt differs from what agent %s keeps of the same "
            "namespace (variant %d) by %.3g of its size, where rounding explains %g: weights, "
            "flags or kernels are not what they were. Its KV goes into another variant of the "
            "namespace; nothing stored before is used",
            agent,
            self._candidate,
            by,
            self._tolerance,
        )
        return False

    def _try_next(self) -> None:
        self._answered.clear()
        self._candidate += 1
        if self.variant != self._apart:
            self.variant = self._apart
            self._take(self._apart)
        if self._candidate > VARIANTS_MAX:
            log.error("no variant of the namespace has KV like this engine's: it stays apart")
            return
        for agent in self._asked:
            self._send(agent)
        timer = threading.Timer(ANSWERS_S, self._give_in, [self._candidate])
        timer.daemon = True
        timer.start()

    def _send(self, agent: str) -> None:
        may_keep = not np.isnan(self._values).any()
        self._ask(agent, KeepWitness(self._digest, self._values.tobytes(), may_keep))

    def samples(self) -> list[Sample]:
        """For the metrics."""
        return [
            sample("engine_witnesses_differing_total", self.differing_total),
            sample("engine_namespace_variant", self.variant),
        ]

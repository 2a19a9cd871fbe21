"""Flags of SGLang beside which an engine of ours would be wrong: refused at start."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec


class Refused(msgspec.Struct, frozen=True):
    """A flag, and why not."""

    flag: str
    reason: str
    attribute: str
    """Of SGLang's resolved settings, dotted."""
    values: tuple[str, ...] = ()
    """Only these; none: whatever switches it on."""
    served: tuple[str, ...] = ()
    """But for these."""

    def __str__(self) -> str:
        value = " " + " or ".join(self.values) if self.values else ""
        others = f" (but {' or '.join(self.served)})" if self.served else ""
        return f"{self.flag}{value}{others} is not supported: {self.reason}"

    def meets(self, value: object) -> bool:
        """Whether a value is refused."""
        if self.values:
            return str(value) in self.values
        if self.served and str(value).upper() in self.served:
            return False
        return value not in (None, False, 0, "0", "")


REFUSED = (
    Refused(
        "--enable-two-batch-overlap",
        "the KV of a layer would leave when the first half of its batch is computed",
        "enable_two_batch_overlap",
    ),
    Refused(
        "--enable-pdmux",
        "its prefill runs in streams that nothing here waits for",
        "enable_pdmux",
    ),
    Refused(
        "--cuda-graph-backend-prefill",
        "a layer's KV can leave, and its hits be waited for, between graphs alone; take "
        "breakable (SGLang's default) or disabled",
        "cuda_graph_config.prefill.backend",
        ("full",),
    ),
    Refused(
        "--speculative-algorithm",
        "the KV of other drafts is in no block: they would lack the prefix, and hardly any of "
        "their tokens would be accepted",
        "speculative_algorithm",
        served=("EAGLE", "NEXTN"),
    ),
    Refused(
        "--enable-multi-layer-eagle",
        "a block has the KV of one draft",
        "enable_multi_layer_eagle",
    ),
    Refused(
        "--optimistic-prefill-attempts",
        "it gives back pages that a forward in flight still writes to",
        "optimistic_prefill_attempts",
    ),
)


def refused_flags(words: Iterable[str]) -> str:
    """Why these words of a command line are refused; empty if they are not."""
    asked = list(words)
    for refused in REFUSED:
        for word, following in zip(asked, [*asked, ""][1:], strict=True):
            flag, _, value = word.partition("=")
            is_switch = not value and (not following or following.startswith("--"))
            if flag == refused.flag and refused.meets(True if is_switch else value or following):
                return str(refused)
    return ""


def refused_settings(settings: object) -> str:
    """The same of SGLang's settings as they hold, however they were given."""
    for refused in REFUSED:
        value = settings
        for name in refused.attribute.split("."):
            value = getattr(value, name)
        if refused.meets(value):
            return str(refused)
    return ""

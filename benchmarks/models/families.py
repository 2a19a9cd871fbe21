"""The families that are measured, one line each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import msgspec

WINDOW_PAGES = 2
NO_PARTS: Mapping[str, int] = MappingProxyType({})
FLOAT8 = ("--kv-cache-dtype", "fp8_e4m3")
DSA = ("--attention-backend", "dsa")
COMPRESSED = ("--attention-backend", "dsv4")
ROUNDING_MARGIN = 0.03
"""Some times what a latent that rounds otherwise changes (of a logarithm of a probability)."""
TWO_RANKS = ("--tp-size", "2")
DRAFT = tuple(
    "--speculative-algorithm EAGLE --speculative-num-steps 1 --speculative-eagle-topk 1 "
    "--speculative-num-draft-tokens 2".split()
)
DRAFT_TOKENS = 24
ENDS_OF_PAGES = ("window/0", "window/1", "window/2")
"""Of DeepSeek-V4: 128 tokens of a page of 256, and what makes one group of four tokens."""


class Family(msgspec.Struct, frozen=True):
    """A random model and the flags with which it is served."""

    name: str
    model: str
    engines: tuple[str, ...] = ()
    """SGLang's flags of both engines, and of the plain server."""
    prefill: tuple[str, ...] = ()
    """Those of the prefill engine alone."""
    decode: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    """Those of the plain server alone."""
    spans: Mapping[str, int] = NO_PARTS
    """Of each part: how many objects a hit needs at its end."""
    new_tokens: int = 12
    """Of an answer; behind a draft more, for its acceptance to mean something."""
    margin_min: float = 0.0
    """Prompts are drawn until each token of the answer is likelier than the next best one by this
    (logarithms): where KV is rounded coarsely, by chance, those with less have no right answer."""
    faint: frozenset[str] = frozenset()
    """Controls that not every prompt shows."""

    @property
    def has_draft(self) -> bool:
        return "--speculative-algorithm" in self.engines


FAMILIES = {
    family.name: family
    for family in (
        Family("tiny", "tiny"),
        Family("tiny-mla", "tiny-mla"),
        Family("tiny-gemma3", "tiny-gemma3"),
        Family("tiny-swa", "tiny-swa", spans={"window": WINDOW_PAGES}),
        Family("tiny-swa, two ranks", "tiny-swa", TWO_RANKS, spans={"window": WINDOW_PAGES}),
        Family("tiny-hybrid", "tiny-hybrid", spans={"state": 1}),
        Family("tiny-gdn", "tiny-gdn", spans={"state": 1}),
        Family("tiny-dsa", "tiny-dsa", plain=DSA),
        Family("tiny-dsa, P of two ranks", "tiny-dsa", prefill=TWO_RANKS, plain=DSA),
        Family("tiny-mtp", "tiny-mtp", DRAFT, plain=DSA, new_tokens=DRAFT_TOKENS),
        Family(
            "tiny-mtp, two ranks",
            "tiny-mtp",
            (*DRAFT, *TWO_RANKS),
            plain=DSA,
            new_tokens=DRAFT_TOKENS,
        ),
        Family(
            "tiny-v4",
            "tiny-v4",
            plain=COMPRESSED,
            spans={"window": 1},
            margin_min=ROUNDING_MARGIN,
            faint=frozenset(ENDS_OF_PAGES),
        ),
        Family("tiny, float8", "tiny", FLOAT8),
        Family("tiny, float8, two ranks", "tiny", (*FLOAT8, *TWO_RANKS)),
        Family("tiny-dsa, float8", "tiny-dsa", FLOAT8, plain=DSA),
        Family("tiny-dsa, float8, two ranks", "tiny-dsa", (*FLOAT8, *TWO_RANKS), plain=DSA),
    )
}

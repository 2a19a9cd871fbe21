"""A few seconds of made-up prefill forwards at the start, from which the quota's costs are
fitted; kept in the user's cache folder, by device and model."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch

from common.user_files import cache_folder
from engine.prefill.forward_clock import ForwardClock, ForwardSample
from engine.sglang.prefill.made_up_forwards import MadeUpForwards
from scheduler.quota import Chunk

log = logging.getLogger(__name__)

PROFILE_S = 3.0
"""Forwards are taken, the cheapest first, until they have lasted so long together."""
_CONTEXTS = (0, 256, 1024, 4096, 16384)
_NEW = (64, 256, 1024, 4096)
_BATCHES = ([Chunk(0, 64)] * 8, [Chunk(1024, 64)] * 8)

_decoder = msgspec.json.Decoder(list[ForwardSample])


def profile_path(forwards: MadeUpForwards, model_digest: str) -> Path:
    """The file of this device and model; a profile depends on nothing else."""
    subject = {
        "device": torch.cuda.get_device_name() if forwards.on_cuda else _processor(),
        "threads": 0 if forwards.on_cuda else torch.get_num_threads(),
        "model": model_digest,
        **forwards.settings(),
    }
    name = hashlib.sha256(json.dumps(subject, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / "prefill_profiles" / f"{name}.json"


def load(path: Path) -> list[ForwardSample] | None:
    """A kept profile; None where there is none that can be read."""
    try:
        return _decoder.decode(path.read_bytes()) or None
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        log.warning("profile %s cannot be read (%s): it is taken anew", path, error)
        return None


@torch.no_grad()
def take(forwards: MadeUpForwards, clock: ForwardClock) -> list[ForwardSample]:
    """Run the forwards; every rank of the engine runs the same ones."""
    samples: list[ForwardSample] = []
    with clock.handing_to(samples.append):
        for number, chunks in enumerate(_shapes(forwards)):
            if sum(sample.forward_s for sample in samples) > PROFILE_S:
                break
            forwards.run(chunks)
            if number == 0:  # a first forward takes longer than any later one
                clock.flush()
                samples.clear()
    log.info("profiled %d prefill forwards", len(samples))
    return samples


def _shapes(forwards: MadeUpForwards) -> Iterator[list[Chunk]]:
    new_max, tokens_max = forwards.new_tokens_max, forwards.tokens_max
    grid = [Chunk(context, new) for context in _CONTEXTS for new in _NEW if new <= new_max]
    single = [[chunk] for chunk in grid if sum(chunk) <= tokens_max]
    together = [chunks for chunks in _BATCHES if sum(map(sum, chunks)) <= tokens_max]
    yield [Chunk(0, 64)]
    yield from sorted(single + together, key=lambda chunks: sum(n * (c + n) for c, n in chunks))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()

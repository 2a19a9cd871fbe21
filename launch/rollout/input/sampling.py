"""How a sample's tokens are to be drawn: the job's settings, the row's own over them."""

from __future__ import annotations

import hashlib

import msgspec

from common.json import JsonObject
from launch.rollout.config import RolloutConfig
from launch.rollout.input.rows import SAMPLING_COLUMNS, Prompt, Sampling


def sampling_of(config: RolloutConfig, prompt: Prompt, sample: int) -> Sampling:
    """The row's sampling columns over the job's flags; the seed is the sample's own."""
    row = {name: getattr(prompt.row, name) for name in SAMPLING_COLUMNS}
    sampling = msgspec.structs.replace(
        Sampling(
            temperature=config.temperature,
            top_p=config.top_p,
            max_new_tokens=config.max_new_tokens,
            seed=config.seed,
            stop=list(config.stop),
        ),
        **{name: value for name, value in row.items() if value is not None},
    )
    if sampling.seed is None:
        return sampling
    text = f"{sampling.seed}/{prompt.number}/{sample}".encode()
    own = int.from_bytes(hashlib.blake2b(text, digest_size=4).digest()) >> 1
    return msgspec.structs.replace(sampling, seed=own)


def request_params(sampling: Sampling, room_tokens: int) -> JsonObject:
    """SGLang's ``sampling_params``."""
    params: JsonObject = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_new_tokens": min(sampling.max_new_tokens, room_tokens),
    }
    if sampling.seed is not None:
        params["sampling_seed"] = sampling.seed
    if sampling.stop:
        params["stop"] = sampling.stop
    return params

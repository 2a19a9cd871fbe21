"""Rows of the pool, as FlashMLA has them.

A page of latents is a row of 576 bytes for each token (448 float8 numbers, then 64 with a position
in bfloat16), then 8 bytes for each: the exponents of its 7 scales, one for each 64 numbers, and
a byte of padding. A page of index keys is 128 float8 numbers for each, then a float32 scale each.
"""

from __future__ import annotations

import torch

LATENT, PLAIN = 512, 448
"""Numbers of a latent, and of these those without a position."""
KEY = 128
_GROUP = 64
_FP8_MAX = 448.0
_ROW_BYTES = PLAIN + 2 * (LATENT - PLAIN)
_EXPONENT_BYTES = 8
_EXPONENT_BIAS = 127
_SMALLEST = 1e-4


def round_trip(latents: torch.Tensor) -> torch.Tensor:
    """What is read of latents, shape (..., LATENT), that were written."""
    return _unpacked(*_packed(latents.reshape(-1, LATENT))).view(latents.shape)


def round_trip_keys(keys: torch.Tensor) -> torch.Tensor:
    """The same of index keys, shape (..., KEY)."""
    numbers, scales = _quantized_keys(keys)
    return numbers.float() * scales


def write_latents(
    buffer: torch.Tensor, page_tokens: int, rows: torch.Tensor, latents: torch.Tensor
) -> None:
    """Of a layer's pages, shape (pages, bytes)."""
    data, exponents = _views(buffer, page_tokens)
    page, at = rows // page_tokens, rows % page_tokens
    data[page, at], exponents[page, at, : PLAIN // _GROUP] = _packed(latents)


def read_latents(buffer: torch.Tensor, page_tokens: int, rows: torch.Tensor) -> torch.Tensor:
    """Shape (n, LATENT), float32."""
    data, exponents = _views(buffer, page_tokens)
    page, at = rows // page_tokens, rows % page_tokens
    return _unpacked(data[page, at], exponents[page, at, : PLAIN // _GROUP])


def write_keys(
    buffer: torch.Tensor, page_tokens: int, rows: torch.Tensor, keys: torch.Tensor
) -> None:
    """Index keys, of a layer's pages."""
    page, at = rows // page_tokens, rows % page_tokens
    numbers, scales = _quantized_keys(keys)
    keys_of, scales_of = _key_views(buffer, page_tokens)
    keys_of[page, at], scales_of[page, at] = numbers.view(torch.uint8), scales.view(torch.uint8)


def read_keys(buffer: torch.Tensor, page_tokens: int, rows: torch.Tensor) -> torch.Tensor:
    """Shape (n, KEY), float32."""
    page, at = rows // page_tokens, rows % page_tokens
    numbers, scales = (view[page, at].contiguous() for view in _key_views(buffer, page_tokens))
    return numbers.view(torch.float8_e4m3fn).float() * scales.view(torch.float32)


def _packed(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    groups = latents[:, :PLAIN].float().view(len(latents), PLAIN // _GROUP, _GROUP)
    mantissas, exponents = torch.frexp(groups.abs().amax(-1).clamp_min(_SMALLEST) / _FP8_MAX)
    exponents = exponents - (mantissas == 0.5).int()  # of the least power of two that is enough
    exponents = (exponents + _EXPONENT_BIAS).to(torch.uint8)
    numbers = (groups / _powers(exponents)).to(torch.float8_e4m3fn).flatten(1)
    positioned = latents[:, PLAIN:].to(torch.bfloat16).contiguous()
    data = torch.cat([numbers.view(torch.uint8), positioned.view(torch.uint8)], -1)
    return data, exponents


def _unpacked(data: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    numbers = data[:, :PLAIN].contiguous().view(torch.float8_e4m3fn).float()
    groups = numbers.view(len(data), PLAIN // _GROUP, _GROUP)
    plain = (groups * _powers(exponents)).flatten(1)
    positioned = data[:, PLAIN:].contiguous().view(torch.bfloat16).float()
    return torch.cat([plain, positioned], -1)


def _powers(exponents: torch.Tensor) -> torch.Tensor:
    """A float32 with nothing but an exponent."""
    return (exponents.int() << 23).view(torch.float32)[..., None]


def _quantized_keys(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = keys.float().abs().amax(-1, keepdim=True).clamp_min(_SMALLEST) / _FP8_MAX
    numbers = (keys.float() / scales).clamp(-_FP8_MAX, _FP8_MAX)
    return numbers.to(torch.float8_e4m3fn), scales


def _views(buffer: torch.Tensor, page_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _two_views(buffer.view(torch.uint8), page_tokens, _ROW_BYTES, _EXPONENT_BYTES)


def _key_views(buffer: torch.Tensor, page_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _two_views(buffer, page_tokens, KEY, torch.float32.itemsize)


def _two_views(
    buffer: torch.Tensor, page_tokens: int, first: int, second: int
) -> tuple[torch.Tensor, torch.Tensor]:
    border, end = page_tokens * first, page_tokens * (first + second)
    return (
        buffer[:, :border].view(len(buffer), page_tokens, first),
        buffer[:, border:end].view(len(buffer), page_tokens, second),
    )

"""The random model of the tests: ``--model tiny``.

A Qwen2 of 8 layers (8 KiB of float32 KV a token) whose greedy output depends on tokens
thousands of positions back, which a default initialisation would not give:

- the gain of q and k makes attention logits spread widely, so that a few tokens of a long
  context are attended to, and which ones they are is chaotic;
- the gain of v and o makes attention as loud as the residual stream.

Every file is the same, bit for bit, on every machine: weights come from integer
arithmetic on a PCG64 stream (vector instructions round torch's normal numbers
differently), the tokenizer from words that the same stream makes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

_SEED = 7
_VOCAB = 2048
_HIDDEN = 256
_LAYERS = 8
_HEADS, _KV_HEADS, _HEAD_DIM = 4, 2, 64
_MLP = 512
_LOGIT_SPREAD = 4.5
_OUTPUT_GAIN = 12.0
_CONTEXT_TOKENS = 32768

_SPECIAL = _PAD, _START, _END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
STOP_TOKENS = {"eos_token_id": _SPECIAL.index(_END), "pad_token_id": _SPECIAL.index(_PAD)}
"""The trainer numbers special tokens first, in their order."""
_CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_WORDS = (
    "the of and to in is it you that he was for on are with as his they be at one have this "
    "from or had by hot but some what there we can out other were all your when up use word how "
    "said an each she which do their time if will way about many then them would write like so "
    "these her long make thing see him two has look more day could go come did my sound no most "
    "number who over know water than call first people may down side been now find system user "
    "assistant question answer paper model token cache prefix block reader storage network hello"
).split()
_SYLLABLES = (
    "ba ke li mo nu ra se ti vo zu cha the shi pro con ter men tion ing er est ly al en ar or "
    "ist ment able ful less ness ous ive ate ize pre dis un re in sub inter trans super"
).split()


def build(folder: Path) -> None:
    """Write config, weights, tokenizer and chat template into ``folder``."""
    silent = write_tokenizer(folder)
    write_json(folder / "config.json", _model_config())
    write_json(folder / "generation_config.json", dict(STOP_TOKENS))
    save_file(_weights(silent), folder / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(folder: Path) -> list[int]:
    """For a vocabulary of 2048 tokens; returns those that stand for no text."""
    tokenizer = _train_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", _tokenizer_config())
    return [*range(len(_SPECIAL)), *range(tokenizer.get_vocab_size(), _VOCAB)]


def write_json(path: Path, value: dict[str, object]) -> None:
    """The same bytes for equal values."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


class Normals:
    """Nearly normal numbers: each is the sum of the four 16-bit parts of one random word."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.PCG64(seed)

    def array(self, shape: tuple[int, ...], deviation: float) -> NDArray[np.float32]:
        words = self._bits.random_raw(math.prod(shape))
        sums = words.view(np.uint16).reshape(-1, 4).sum(axis=1, dtype=np.int64)
        centred = 2 * sums - 4 * 0xFFFF
        scale = np.float32(deviation / (2 * math.sqrt(4 * (65536**2 - 1) / 12)))
        return (centred.astype(np.float32) * scale).reshape(shape)


def _weights(silent_tokens: list[int]) -> dict[str, NDArray[np.float32]]:
    normals = Normals(_SEED)
    lm_head = normals.array((_VOCAB, _HIDDEN), 1 / math.sqrt(_HIDDEN))
    lm_head[silent_tokens] = 0  # a logit of 0 never wins over 2000 normal ones
    weights = {
        "lm_head.weight": lm_head,
        "model.embed_tokens.weight": normals.array((_VOCAB, _HIDDEN), 1.0),
        "model.norm.weight": np.ones(_HIDDEN, np.float32),
    }
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}."
        weights |= {prefix + name: value for name, value in _layer_weights(normals)}
    return weights


def _layer_weights(normals: Normals) -> Iterator[tuple[str, NDArray[np.float32]]]:
    query, key_value = _HEADS * _HEAD_DIM, _KV_HEADS * _HEAD_DIM
    spread, even = math.sqrt(_LOGIT_SPREAD / _HIDDEN), 1 / math.sqrt(_HIDDEN)
    for name, rows, deviation in (
        ("q", query, spread),
        ("k", key_value, spread),
        ("v", key_value, even),
    ):
        yield f"self_attn.{name}_proj.weight", normals.array((rows, _HIDDEN), deviation)
        yield f"self_attn.{name}_proj.bias", np.zeros(rows, np.float32)
    yield "self_attn.o_proj.weight", normals.array((_HIDDEN, query), _OUTPUT_GAIN / query**0.5)
    yield "mlp.gate_proj.weight", normals.array((_MLP, _HIDDEN), even)
    yield "mlp.up_proj.weight", normals.array((_MLP, _HIDDEN), even)
    yield "mlp.down_proj.weight", normals.array((_HIDDEN, _MLP), 1 / math.sqrt(_MLP))
    yield "input_layernorm.weight", np.ones(_HIDDEN, np.float32)
    yield "post_attention_layernorm.weight", np.ones(_HIDDEN, np.float32)


def _model_config() -> dict[str, object]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "dtype": "float32",
        "vocab_size": _VOCAB,
        "hidden_size": _HIDDEN,
        "intermediate_size": _MLP,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": _HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": _CONTEXT_TOKENS,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
    } | STOP_TOKENS


def _tokenizer_config() -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": _CONTEXT_TOKENS,
        "eos_token": _END,
        "pad_token": _PAD,
        "additional_special_tokens": [_START],
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }


def _train_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB,
        special_tokens=list(_SPECIAL),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(_sentences(), trainer)
    return tokenizer


def _sentences() -> Iterator[str]:
    """Lines of common and of invented words, the earlier ones in the lists more often."""
    picks = iter(np.random.PCG64(_SEED).random_raw(400_000).tolist())

    def pick(words: list[str]) -> str:
        span = 1 + next(picks) % len(words)
        return words[next(picks) % span]

    for _ in range(3000):
        words = []
        for _ in range(12):
            invented = "".join(pick(_SYLLABLES) for _ in range(2 + next(picks) % 2))
            words.append(invented if next(picks) % 3 else pick(_WORDS))
        yield " ".join(words).capitalize() + ".\n"

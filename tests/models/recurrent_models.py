"""Random models of further families with recurrent layers, written as transformers' own."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    KimiLinearConfig,
    KimiLinearForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
)

from launch.models.random_model import SHAPE, write


def granite(folder: Path) -> None:
    """Granite-4: Mamba-2, one layer in four with attention, no experts."""
    config = GraniteMoeHybridConfig(
        **SHAPE
        | {
            "num_hidden_layers": 4,
            "layer_types": ["mamba", "attention", "mamba", "mamba"],
            "attention_multiplier": 0.125,
            "position_embedding_type": "rope",
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 512,
            "mamba_n_heads": 16,
            "mamba_d_head": 32,
            "mamba_d_state": 32,
            "mamba_chunk_size": 64,
        }
    )
    write(folder, GraniteMoeHybridForCausalLM(config))


def nemotron(folder: Path) -> None:
    """Nemotron-H: a layer is Mamba-2, attention or an MLP. SGLang's pool goes by ``n_groups`` of a
    config, its layers by ``mamba_n_groups``, which no checkpoint has: with others than the 8 of
    its default the convolution's weights do not fit."""
    mamba = {"mamba_num_heads": 8, "mamba_head_dim": 32, "ssm_state_size": 32, "n_groups": 8}
    layers = ["linear_attention", "mlp", "full_attention", "linear_attention", "mlp"]
    config = NemotronHConfig(**SHAPE | mamba, layers_block_type=layers, chunk_size=64)
    named = {"linear_attention": "mamba", "full_attention": "attention"}
    as_sglang_names_them = [named.get(layer, layer) for layer in layers]
    write(folder, NemotronHForCausalLM(config), layers_block_type=as_sglang_names_them)


def kimi(folder: Path) -> None:
    """Kimi-Linear: KDA, one layer in four with MLA, experts. What comes out of them is not scaled:
    SGLang's experts on a CPU leave that out."""
    config = KimiLinearConfig(
        **SHAPE
        | {
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention"] * 2 + ["full_attention", "linear_attention"],
            "linear_num_heads": 4,
            "linear_head_dim": 32,
            "num_key_value_heads": 4,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
            "mlp_layer_types": ["sparse"] * 4,
            "moe_intermediate_size": 128,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "routed_scaling_factor": 1.0,
        }
    )
    of_checkpoints = {
        "mla_use_nope": True,
        "first_k_dense_replace": 0,
        "linear_attn_config": {
            "kda_layers": [1, 2, 4],
            "full_attn_layers": [3],
            "num_heads": 4,
            "head_dim": 32,
            "short_conv_kernel_size": 4,
        },
    }
    write(folder, KimiLinearForCausalLM(config), **of_checkpoints)


FAMILIES = {"granite": granite, "nemotron": nemotron, "kimi": kimi}

"""A random Falcon-H1, for tests: ``--model tiny-hybrid``. Each of its 4 layers has attention and
Mamba-2 side by side."""

from __future__ import annotations

from pathlib import Path

from launch.models.random_model import SHAPE, write


def build(folder: Path) -> None:
    """Write config, weights and tokenizer into ``folder``."""
    from transformers import FalconH1Config, FalconH1ForCausalLM

    mamba = {
        "mamba_d_ssm": 256,
        "mamba_n_heads": 8,
        "mamba_d_head": 32,
        "mamba_d_state": 32,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 64,
        "mamba_rms_norm": False,
    }
    config = FalconH1Config(**SHAPE | mamba, num_hidden_layers=4)
    write(folder, FalconH1ForCausalLM(config))

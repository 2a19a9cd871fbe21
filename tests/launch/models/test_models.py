import hashlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.models import tiny_model
from launch.models.recipes import build_into, model_folder
from launch.models.resolve import resolve_model
from launch.settings import BadConfig


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model.build(folder)
    return folder


def digests(folder: Path) -> dict[str, str]:
    files = sorted(folder.iterdir())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.slow
def test_tiny_is_the_same_on_every_build(tiny, tmp_path):
    tiny_model.build(tmp_path)
    assert digests(tmp_path) == digests(tiny)


def test_tiny_weights_are_the_same_on_every_machine(tiny):
    assert digests(tiny)["model.safetensors"].startswith("a19d4fb71d")


@pytest.mark.slow
def test_tiny_sees_a_changed_early_token(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, 2000, (1, 800), generator=generator)
    changed = prompt.clone()
    changed[0, 100] = (changed[0, 100] + 17) % 2000

    def generate(ids: torch.Tensor) -> list[int]:
        with torch.no_grad():
            answer = model.generate(ids, max_new_tokens=16, do_sample=False)
        return answer[0, ids.shape[1] :].tolist()

    first = generate(prompt)
    assert first == generate(prompt)
    assert first != generate(changed)
    assert len(set(first)) > 8


def test_tiny_has_a_chat_template_and_a_lossless_tokenizer(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    text = "What is the capital of France? Ünïcode, 漢字\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_tiny_is_built_once_into_the_user_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = resolve_model("tiny")
    assert folder == model_folder("tiny") and folder.is_relative_to(tmp_path)
    built = (folder / "model.safetensors").stat().st_mtime_ns
    assert resolve_model("tiny") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == built


def test_a_failed_build_leaves_nothing(tmp_path):
    def build(folder: Path) -> None:
        (folder / "config.json").write_text("{")
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError):
        build_into(tmp_path / "model", build)
    assert list(tmp_path.iterdir()) == []


def test_a_build_that_another_process_finished_first_is_taken(tmp_path):
    target = tmp_path / "model"

    def build(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        target.mkdir()
        (target / "config.json").write_text("{}")

    build_into(target, build)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_path_is_a_folder_with_a_config(tiny):
    assert resolve_model(str(tiny)) == tiny.resolve()


def test_a_hub_name_is_left_to_sglang():
    assert resolve_model("Qwen/Qwen3-0.6B") == Path("Qwen/Qwen3-0.6B")


@pytest.mark.parametrize("name", ["tinny", "/no/such/folder", "./absent"])
def test_an_unknown_name_says_what_can_be_given(name):
    with pytest.raises(BadConfig, match="config.json"):
        resolve_model(name)


def test_an_unreadable_folder_is_named(tmp_path):
    with pytest.raises(BadConfig, match="config.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadConfig, match="not JSON"):
        resolve_model(str(tmp_path))
    with pytest.raises(BadConfig, match="folder"):
        resolve_model(str(tmp_path / "config.json"))

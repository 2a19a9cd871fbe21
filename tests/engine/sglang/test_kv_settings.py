"""Which of SGLang's flags part the KV of engines, and which do not."""

import argparse
import json
from functools import cache
from pathlib import Path

import msgspec
import pytest
from sglang.srt.server_args import ServerArgs

from engine.sglang.kv_settings import BY_CONTENTS, BY_JSON, NEUTRAL, kv_settings
from launch.cluster.config import ClusterConfig
from launch.cluster.engine_command import engine_flags
from launch.cluster.hardware import Hardware
from launch.cluster.layout import Layout, places_of


@cache
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return parser


def given(*flags: str) -> ServerArgs:
    return ServerArgs.from_cli_args(parser().parse_args(["--model-path", "m", *flags]))


def settings(*flags: str) -> dict:
    return json.loads(kv_settings(given(*flags), "float32"))


def test_the_list_names_flags_that_sglang_has_each_once():
    listed = [name for names in NEUTRAL.values() for name in names.split()]
    assert len(listed) == len(set(listed))
    fields = set(ServerArgs.__struct_fields__)
    assert not set(listed) - fields and not (BY_CONTENTS | BY_JSON) - fields
    assert not (BY_CONTENTS | BY_JSON) & set(listed)


def test_a_flag_that_nobody_has_thought_about_counts_once_it_is_used():
    newer = msgspec.defstruct("Newer", [("brand_new", str, "off")], bases=(ServerArgs,))
    assert json.loads(kv_settings(newer(model_path="m"), "float32")) == {"dtype": "float32"}
    used = newer(model_path="m", brand_new="on")
    assert json.loads(kv_settings(used, "float32"))["brand_new"] == "on"


@pytest.mark.parametrize(
    "flags",
    [
        ("--json-model-override-args", '{"rope_theta": 5000}'),
        ("--quantization", "fp8"),
        ("--load-format", "dummy"),
        ("--context-length", "4096"),
        ("--enable-lora", "--lora-paths", "a=/models/a"),
        ("--speculative-algorithm", "NGRAM"),
    ],
)
def test_what_changes_kv_counts(flags):
    assert settings(*flags) != settings()
    assert settings(*flags) == settings(*flags)


def test_the_type_of_computation_counts_as_it_is_not_as_it_was_given():
    assert given("--dtype", "bfloat16") != given()
    of_bfloat16 = kv_settings(given("--dtype", "auto"), "bfloat16")
    assert of_bfloat16 == kv_settings(given("--dtype", "bfloat16"), "bfloat16")
    assert of_bfloat16 != kv_settings(given("--dtype", "float32"), "float32")


def test_how_index_keys_are_written_and_what_scales_kv_has_count():
    formats = [{}, {"index_keys": "rotated"}, {"index_keys": "plain"}, {"kv_scales": "plain"}]
    of_formats = [kv_settings(given(), "float32", kv_format) for kv_format in formats]
    assert len(set(of_formats)) == 4 and of_formats[0] == kv_settings(given(), "float32")


def test_order_and_blanks_of_json_do_not_count():
    first = settings("--json-model-override-args", '{"a": 1, "rope": {"x": 2, "y": 3}}')
    assert first == settings("--json-model-override-args", '{"rope":{"y":3,"x":2},"a":1}')


def test_scales_and_adapters_count_by_what_they_hold(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "scales.json").write_text("1")

    def of(folder, flag="--quantization-param-path", prefix=""):
        return settings(flag, prefix + str(folder))

    assert of(here / "scales.json") == of(there / "scales.json") != settings()
    assert of(here, "--lora-paths", "a=") == of(there, "--lora-paths", "a=")
    assert of(here, "--lora-paths", "a=") != of(there, "--lora-paths", "b=")
    (there / "scales.json").write_text("2")
    assert of(here / "scales.json") != of(there / "scales.json")
    assert of(here, "--lora-paths", "a=") != of(there, "--lora-paths", "a=")


def test_a_long_value_is_noted_by_its_digest():
    long = json.dumps({f"key{i}": i for i in range(100)})
    noted = settings("--json-model-override-args", long)["json_model_override_args"]
    assert noted.startswith("sha256 ") and len(noted) == 71


def test_the_roles_of_a_cluster_agree():
    """Also where they differ in what is theirs: memory, ranks, kernels, batches."""
    prefill = "--tp-size 2 --chunked-prefill-size 512 --mem-fraction-static 0.7"
    prefill += " --attention-backend triton --log-level debug --disable-radix-cache"
    decode = "--attention-backend torch_native --max-running-requests 8 --moe-runner-backend triton"
    config = ClusterConfig(prefill_args=tuple(prefill.split()), decode_args=tuple(decode.split()))
    layout = Layout(config, Path("/models/tiny"), Hardware("cpu", "tcp", "test"), places_of(config))
    of_role = {}
    for node in ("p0", "d0"):
        ports = {"http": 1, "rendezvous": 2, "bootstrap": 3}
        of_role[node] = settings(*engine_flags(layout, node, ports))
    assert of_role["p0"] == of_role["d0"] == {"dtype": "float32"}

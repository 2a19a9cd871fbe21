from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.sizes import format_size, parse_size
from launch.cluster.config import ClusterConfig, load_config, make_parser
from launch.settings import BadConfig, flag, help_markdown, settings_of
from storage.ssd.folder import FORMAT


def test_defaults_serve_on_localhost():
    config = load_config([])
    assert (config.host, config.port, config.prefill, config.decode) == ("127.0.0.1", 30000, 1, 1)
    assert config.path_policy == "shorter-queue"
    assert config.first_port == 30100
    assert config.remote == ""


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path):
    file = tmp_path / "cluster.yaml"
    file.write_text("dram-bytes: 512MiB\nprefill: 2\nremote: memory://kv\nremote-options: {a: 1}\n")
    config = load_config(["--config", str(file), "--prefill", "3"])
    assert config.prefill == 3
    assert config.dram_bytes == 512 << 20
    assert config.remote_options == {"a": 1}
    assert config.decode == 1


def test_toml_and_yaml_mean_the_same(tmp_path: Path):
    (tmp_path / "c.toml").write_text('ssd_bytes = "2GiB"\npoison-kv = true\nport = 4000\n')
    (tmp_path / "c.yaml").write_text("ssd-bytes: 2GiB\npoison_kv: true\nport: 4000\n")
    configs = [load_config(["--config", str(tmp_path / f"c.{kind}")]) for kind in ("toml", "yaml")]
    assert configs[0] == configs[1]
    assert configs[0].poison_kv and configs[0].ssd_bytes == 2 << 30


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("8GiB", 8 << 30),
        ("512MiB", 512 << 20),
        ("1.5GB", 1_500_000_000),
        ("4096", 4096),
        ("64k", 64000),
        (7, 7),
    ],
)
def test_sizes(text, size_bytes):
    assert parse_size(text) == size_bytes


@given(st.integers(0, 1 << 40))
def test_a_formatted_size_reads_back_within_rounding(size_bytes):
    assert parse_size(format_size(size_bytes)) == pytest.approx(size_bytes, rel=1e-3, abs=1)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prefil", "2"], ["--prefil", "--prefill"]),
        (["--prefill", "two"], ["--prefill", "two"]),
        (["--prefill", "0"], ["--prefill", "at least 1"]),
        (["--prefill"], ["--prefill"]),
        (["--port", "70000"], ["--port", "65535"]),
        (["--dram-bytes", "8GiBB"], ["--dram-bytes", "8GiB,"]),
        (["--dram-bytes", "0"], ["--dram-bytes"]),
        (["--path-policy", "shortest-queue"], ["shorter-queue?", "split"]),
        (["--remote-options", "[1]"], ["JSON object"]),
        (["--remote-options", '{"a": 1}'], ["--remote"]),
        (["--engine-args", "--x 'open"], ["--engine-args", "quotation"]),
        (["--read-timeout-s", "0"], ["--read-timeout-s"]),
        (["--prefill-quota-ms", "none"], ["--prefill-quota-ms", "none"]),
        (["--prefill-quota-ms", "0"], ["--prefill-quota-ms", "greater than 0, or off"]),
        (["--config", "absent.yaml"], ["absent.yaml", "No such file"]),
    ],
)
def test_a_bad_flag_is_named_in_a_sentence_that_says_what_to_do(argv, words):
    with pytest.raises(BadConfig) as caught:
        load_config(argv)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("c.yaml", "dram_byte: 1GiB", ["dram_byte", "dram-bytes?"]),
        ("c.toml", "prefil = 1", ["prefil", "prefill?"]),
        ("c.yaml", "prefill: [1", ["not valid"]),
        ("c.yaml", "just words", ["key: value"]),
        ("c.yaml", "poison_kv: maybe", ["poison_kv", "true"]),
    ],
)
def test_a_bad_file_is_an_error_that_names_the_key(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(BadConfig) as caught:
        load_config(["--config", str(tmp_path / name)])
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_the_quota_can_be_switched_off_in_a_file_and_on_by_a_flag(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("prefill-quota-ms: off\n")  # which YAML reads as false
    assert load_config(["--config", str(file)]).prefill_quota_ms is None
    assert load_config(["--config", str(file), "--prefill-quota-ms", "300"]).prefill_quota_ms == 300


def test_help_and_the_table_of_flags_name_every_setting():
    table, usage = help_markdown(ClusterConfig), make_parser().format_help()
    for name in settings_of(ClusterConfig):
        assert f"`{flag(name)}" in table
        assert flag(name) in usage


def test_folders_follow_the_user_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ClusterConfig().ssd_folders == [tmp_path / "dualpath" / f"store-{FORMAT}"]
    assert ClusterConfig(port=4000).log_folder == tmp_path / "dualpath" / "logs" / "4000"

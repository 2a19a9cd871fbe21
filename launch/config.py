"""Every setting of ``python -m launch.cluster``, each declared once.

A setting is one field of :class:`ClusterConfig`; its flag, its key in a ``--config``
file and its row in the README's table all come from that declaration. Flags win over
the file, the file over the defaults.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import shlex
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.sizes import format_size, parse_size
from scheduler.policies import POLICY_NAMES, UnknownPolicy, read_policy


class BadConfig(Exception):
    """A flag, a key of the file, or a combination of them; the text says what to do."""


def cache_folder() -> Path:
    """Where models and the default store live: ``dualpath`` in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dualpath"


def _parse_json_object(value: str | dict[str, Any]) -> dict[str, Any]:
    parsed = json.loads(value) if isinstance(value, str) else value
    if not isinstance(parsed, dict):
        raise ValueError(f"{value!r} is not a JSON object")
    return parsed


def _parse_arguments(value: str) -> str:
    shlex.split(value)  # raises ValueError on an open quote
    return value


def _parse_policy(value: str) -> str:
    try:
        read_policy(value)
    except UnknownPolicy as error:
        raise ValueError(f"{error}.{near(value, POLICY_NAMES)}") from error
    return value


def _parse_switch(value: str | bool) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError(f"{value!r} is neither true nor false")


def setting(
    default: Any,
    description: str,
    parse: Callable[[Any], Any] = str,
    *,
    metavar: str = "",
    choices: Sequence[str] = (),
) -> Any:
    """A field of :class:`ClusterConfig`. ``parse`` takes text or the file's own value."""
    metadata = {"help": description, "parse": parse, "metavar": metavar, "choices": choices}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ClusterConfig:
    """What the user asked for. Build with :func:`load_config`, which also checks it."""

    model: str = setting(
        "default",
        "Folder of a model, name on a hub (org/name), `tiny` (random, for tests) or `default` "
        "(SmolLM2-135M-Instruct, built at set-up).",
        metavar="PATH|NAME",
    )
    prefill: int = setting(1, "Number of prefill engines.", int, metavar="N")
    decode: int = setting(1, "Number of decode engines.", int, metavar="M")
    host: str = setting(
        "127.0.0.1", "Address of the gateway; everything else stays on the loopback."
    )
    port: int = setting(30000, "Port of the gateway: the OpenAI API.", int)
    base_port: int = setting(
        0,
        "First port of the other processes, 48 for each, best below 32768 (Mooncake takes fixed "
        "ports only there); 0 means --port + 100.",
        int,
    )
    device: str = setting(
        "auto",
        "Where engines compute; auto is cuda if torch has it.",
        choices=("auto", "cuda", "cpu"),
    )
    transfer: str = setting(
        "auto",
        "How KV moves between nodes; auto is rdma where there is a device for it.",
        choices=("auto", "rdma", "tcp"),
    )
    rdma_devices: str = setting(
        "",
        "RDMA devices that KV moves through, such as mlx5_0,mlx5_1; empty means all.",
        metavar="LIST",
    )
    dram_bytes: int = setting(
        parse_size("1GiB"), "DRAM tier of each agent, such as 64GiB.", parse_size, metavar="SIZE"
    )
    ssd_dir: str = setting(
        "",
        "Folder of the SSD tier, or one a disk, separated by commas; empty means dualpath/store "
        "in the user's cache.",
        metavar="DIRS",
    )
    ssd_bytes: int = setting(
        parse_size("8GiB"), "SSD tier of each agent; 0 switches it off.", parse_size, metavar="SIZE"
    )
    ssd_min_free_bytes: int = setting(
        parse_size("1GiB"), "SSD tier: what stays free on each disk.", parse_size, metavar="SIZE"
    )
    remote: str = setting(
        "",
        "Remote tier, any fsspec URL such as s3://bucket/prefix; empty means none.",
        metavar="URL",
    )
    remote_options: dict[str, Any] = setting(
        {}, "Options of the remote tier's fsspec filesystem.", _parse_json_object, metavar="JSON"
    )
    path_policy: str = setting(
        "shorter-queue",
        f"Which agent reads a hit block: {', '.join(POLICY_NAMES)}, or a class of your own as "
        "module:Class (docs/scheduler.md).",
        _parse_policy,
        metavar="NAME",
    )
    load_policy: str = setting(
        "auto",
        "Whether a hit is loaded or computed again; auto is whatever gives the first token sooner.",
        choices=("auto", "always", "never"),
    )
    alpha_bytes: int = setting(
        0,
        "A node's read queue is short up to here; 0 means what its storage NIC reads in 3 s.",
        parse_size,
        metavar="SIZE",
    )
    beta_tokens: int = setting(
        0,
        "Prompt tokens that may wait at a prefill engine; 0 means what it computes in 5 s.",
        int,
        metavar="N",
    )
    served_model_name: str = setting(
        "", "Model name in the API; empty means the model's own.", metavar="NAME"
    )
    log_dir: str = setting(
        "",
        "Folder of the logs, one file for each process; empty means dualpath/logs/PORT in the "
        "user's cache.",
        metavar="DIR",
    )
    log_level: str = setting(
        "error",
        "Lines of the processes' logs from this level on are shown on the console too.",
        choices=("debug", "info", "warning", "error", "none"),
    )
    engine_args: str = setting(
        "",
        "SGLang server flags for all engines, such as '--tp-size 2'; they win over ours.",
        _parse_arguments,
        metavar="FLAGS",
    )
    prefill_args: str = setting(
        "", "SGLang server flags for the prefill engines.", _parse_arguments, metavar="FLAGS"
    )
    decode_args: str = setting(
        "", "SGLang server flags for the decode engines.", _parse_arguments, metavar="FLAGS"
    )
    max_total_tokens: int = setting(
        0,
        "Tokens in the KV pool of each engine; 0 means 65536 on CPU, SGLang's choice on CUDA.",
        int,
        metavar="N",
    )
    requests_max: int = setting(
        256,
        "Requests in flight or queued; beyond it the tenant that holds most gets 429.",
        int,
        metavar="N",
    )
    read_timeout_s: float = setting(
        20.0,
        "A storage read that is not done by then is given up, its blocks recomputed.",
        float,
        metavar="S",
    )
    deliver_timeout_s: float = setting(
        20.0, "A delivery into an engine that is not done by then fails.", float, metavar="S"
    )
    request_timeout_s: float = setting(600.0, "Longest life of a request.", float, metavar="S")
    start_timeout_s: float = setting(
        600.0, "Longest time from the start of a process until it is ready.", float, metavar="S"
    )
    restart_backoff_max_s: float = setting(
        15.0, "Longest pause before a process that died is started again.", float, metavar="S"
    )
    poison_kv: bool = setting(
        False,
        "For tests: fill the engines' KV pools with noise at start and after each flush.",
        _parse_switch,
    )

    def __post_init__(self) -> None:
        _check(self)

    @property
    def first_port(self) -> int:
        return self.base_port or self.port + 100

    @property
    def ssd_folders(self) -> list[Path]:
        folders = [Path(folder).expanduser() for folder in self.ssd_dir.split(",") if folder]
        return folders or [cache_folder() / "store"]

    @property
    def log_folder(self) -> Path:
        return (
            Path(self.log_dir).expanduser()
            if self.log_dir
            else cache_folder() / "logs" / str(self.port)
        )


FIELDS = {field.name: field for field in dataclasses.fields(ClusterConfig)}


def flag(name: str) -> str:
    """``dram_bytes`` -> ``--dram-bytes``."""
    return "--" + name.replace("_", "-")


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise BadConfig(sentence)


def _check(config: ClusterConfig) -> None:
    for name, field in FIELDS.items():
        choices = field.metadata["choices"]
        value = getattr(config, name)
        if choices and value not in choices:
            raise BadConfig(
                f"{flag(name)} {value}: choose one of {', '.join(choices)}.{near(value, choices)}"
            )
        if name.endswith(("_s", "_max")):
            _require(value > 0, f"{flag(name)} {value}: give a number greater than 0.")
    for name in ("prefill", "decode"):
        _require(getattr(config, name) >= 1, f"{flag(name)}: at least 1 engine is needed.")
    for name, low in (("port", 1), ("base_port", 0)):
        value = getattr(config, name)
        _require(low <= value <= 65535, f"{flag(name)} {value}: give a port from {low} to 65535.")
    sizes = [name for name in FIELDS if name.endswith("_bytes")]
    for name in (*sizes, "max_total_tokens", "beta_tokens"):
        _require(getattr(config, name) >= 0, f"{flag(name)}: give 0 or more.")
    _require(
        config.dram_bytes > 0,
        "--dram-bytes 0: every block passes through DRAM; give at least what two requests need.",
    )
    _require(
        ":" not in config.served_model_name,
        f"--served-model-name {config.served_model_name}: SGLang refuses a colon in it.",
    )
    _require(
        not config.remote_options or bool(config.remote),
        "--remote-options without --remote: give the URL of the remote tier as well.",
    )


def near(word: str, words: Sequence[str]) -> str:
    """`` Did you mean x?`` or nothing."""
    matches = difflib.get_close_matches(word, words, n=1)
    return f" Did you mean {matches[0]}?" if matches else ""


def _parsed(name: str, value: Any, where: str) -> Any:
    try:
        return FIELDS[name].metadata["parse"](value)
    except (ValueError, TypeError) as error:
        raise BadConfig(f"{where} {value!r}: {error}.") from error


def read_file(path: Path) -> dict[str, Any]:
    """The settings in a YAML or TOML file; keys as the flags, with - or _."""
    try:
        text = path.read_text()
        raw = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except OSError as error:
        raise BadConfig(
            f"--config {path}: {error.strerror}; give a readable YAML or TOML file."
        ) from error
    except (yaml.YAMLError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadConfig(f"--config {path} is not valid: {error}") from error
    if not isinstance(raw, dict | None):
        raise BadConfig(f"--config {path}: expected lines of `key: value`.")
    settings = {}
    for key, value in (raw or {}).items():
        name = str(key).replace("-", "_")
        if name not in FIELDS:
            spelled = [field.replace("_", "-") for field in FIELDS]
            hint = near(str(key).replace("_", "-"), spelled)
            raise BadConfig(f"--config {path}: unknown key {key!r}.{hint}")
        settings[name] = _parsed(name, value, f"--config {path}: {key}")
    return settings


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise BadConfig(f"{message}; see --help.")


def make_parser() -> argparse.ArgumentParser:
    """Values stay text: :func:`load_config` parses them as it does the file's."""
    parser = _Parser(
        prog="python -m launch.cluster",
        description="Serve a model from prefill and decode engines with a shared KV store.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML or TOML file of the same settings; flags win."
    )
    parser.add_argument(
        "--help-markdown",
        action="store_true",
        help="Print the table of flags for the README and exit.",
    )
    for name, field in FIELDS.items():
        text = field.metadata["help"].replace("%", "%%")
        if field.metadata["parse"] is _parse_switch:
            parser.add_argument(flag(name), action="store_true", help=text)
        else:
            text += f" (default: {default_text(name)})"
            parser.add_argument(flag(name), metavar=_metavar(name), help=text)
    return parser


def load_config(argv: Sequence[str]) -> ClusterConfig:
    """Flags over file over defaults; raises :class:`BadConfig`."""
    given, unknown = make_parser().parse_known_args(list(argv))
    if unknown:
        flags = [*map(flag, FIELDS), "--config"]
        raise BadConfig(f"unknown flag {unknown[0]}.{near(unknown[0].split('=')[0], flags)}")
    values = vars(given)
    values.pop("help_markdown", None)
    file = values.pop("config", None)
    settings = read_file(Path(file).expanduser()) if file else {}
    settings |= {name: _parsed(name, value, flag(name)) for name, value in values.items()}
    return ClusterConfig(**settings)


def _metavar(name: str) -> str:
    metadata = FIELDS[name].metadata
    if metadata["choices"]:
        return "{" + ",".join(metadata["choices"]) + "}"
    return str(metadata["metavar"] or name.upper())


def default_text(name: str) -> str:
    """A setting's default as a user would write it; ``-`` for an empty one."""
    default = FIELDS[name].default
    if default is dataclasses.MISSING or default == "":
        return "-"
    if FIELDS[name].metadata["parse"] is parse_size:
        return format_size(int(default)).replace(" ", "")
    return str(default).lower() if isinstance(default, bool) else str(default)


def help_markdown() -> str:
    """The README's table of flags."""
    rows = ["| flag | default | what |", "| --- | --- | --- |"]
    rows.append("| `--config FILE` | - | YAML or TOML file of the same settings; flags win. |")
    for name, field in FIELDS.items():
        switch = field.metadata["parse"] is _parse_switch
        usage = flag(name) if switch else f"{flag(name)} {_metavar(name)}"
        usage = usage.replace("|", "\\|")
        rows.append(f"| `{usage}` | {default_text(name)} | {field.metadata['help']} |")
    return "\n".join(rows)

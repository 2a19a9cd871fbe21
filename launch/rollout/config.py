"""Every setting of ``python -m launch.rollout``: the job's own, and the cluster's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.sizes import parse_size
from launch import settings
from launch.cluster.config import ClusterConfig
from launch.rollout.env import BadEnv, load_env
from launch.settings import check_choices, fields_of, flag, parse_switch, require, setting

AUTO = "auto"


def _parse_concurrency(value: str | int) -> int | str:
    if value == AUTO:
        return AUTO
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise ValueError("give a number of requests, or auto")
    return number


def _parse_stop(value: str | list[str]) -> tuple[str, ...]:
    """One string, or several as a JSON list."""
    parsed = json.loads(value) if isinstance(value, str) and value.startswith("[") else value
    strings = [parsed] if isinstance(parsed, str) else parsed
    if not isinstance(strings, list) or not all(isinstance(s, str) for s in strings):
        raise ValueError("give a string, or a JSON list of strings")
    return tuple(s for s in strings if s)


def _parse_env(value: str) -> str:
    try:
        load_env(value)
    except BadEnv as error:
        raise ValueError(str(error)) from error
    return value


def _parse_seed(value: str | int) -> int | None:
    return None if value == "" else int(value)


@dataclass(frozen=True)
class JobConfig:
    """What one job generates, from what, and where to."""

    input: str = setting(
        "",
        "Prompts: a .jsonl or .parquet file, or a folder of them.",
        metavar="PATH",
    )
    output: str = setting(
        "", "Folder of the samples; an unfinished job there goes on.", metavar="DIR"
    )
    endpoint: str = setting(
        "",
        "A running cluster; empty starts one with the cluster's flags, and stops it at the end.",
        metavar="URL",
    )
    n: int = setting(1, "Samples of each prompt.", int, metavar="N")
    max_new_tokens: int = setting(512, "Tokens generated in one turn.", int, metavar="N")
    temperature: float = setting(1.0, "0 is greedy.", float, metavar="T")
    top_p: float = setting(1.0, "Nucleus of the sampling.", float, metavar="P")
    seed: int | None = setting(
        None,
        "Of the order and of the samples (SGLang heeds it with --enable-deterministic-inference).",
        _parse_seed,
        metavar="N",
    )
    stop: tuple[str, ...] = setting(
        (), "String that ends a turn, or a JSON list of them.", _parse_stop, metavar="TEXT"
    )
    logprobs: bool = setting(
        False, "Record the log-probability of each generated token.", parse_switch
    )
    env: str = setting(
        "",
        "Environment of an episode of many turns, module:Class; empty means one turn.",
        _parse_env,
        metavar="NAME",
    )
    max_turns: int = setting(16, "Turns after which an episode ends.", int, metavar="N")
    max_episode_tokens: int = setting(
        32768, "Prompt and generated tokens after which an episode ends.", int, metavar="N"
    )
    env_timeout_s: float = setting(
        300.0, "One answer of the environment; later, the episode has failed.", float, metavar="S"
    )
    concurrency: int | str = setting(
        AUTO,
        "Requests in flight; auto is what the endpoint admits.",
        _parse_concurrency,
        metavar="auto|N",
    )
    order: str = setting(
        "input",
        "In which order prompts start: longest-first or shuffled keep the end of the job busy.",
        choices=("input", "longest-first", "shuffled"),
    )
    timeout_s: float = setting(600.0, "Longest time of one request.", float, metavar="S")
    retry_s: float = setting(
        300.0,
        "For so long a request that fails is sent again, with growing pauses.",
        float,
        metavar="S",
    )
    shard_bytes: int = setting(
        parse_size("64MiB"),
        "Samples collected for one Parquet file, before compression.",
        parse_size,
        metavar="SIZE",
    )
    overwrite: bool = setting(False, "Delete the job in --output and begin anew.", parse_switch)
    extend: bool = setting(
        False,
        "Keep the samples in --output and add those that changed settings or rows ask for.",
        parse_switch,
    )
    dry_run: bool = setting(
        False, "Count rows and tokens, show the first prompt, generate nothing.", parse_switch
    )


@dataclass(frozen=True)
class RolloutConfig(JobConfig, ClusterConfig):
    """Build with :func:`load_config`, which also checks it."""

    def __post_init__(self) -> None:
        ClusterConfig.__post_init__(self)
        _check(self)

    @property
    def input_path(self) -> Path:
        return Path(self.input).expanduser()

    @property
    def output_folder(self) -> Path:
        return Path(self.output).expanduser()

    def cluster_flags(self) -> list[str]:
        """The command line of ``launch.cluster`` that gives its part of these settings."""
        argv: list[str] = []
        for name, field in fields_of(ClusterConfig).items():
            value = getattr(self, name)
            if value == _default(field):
                continue
            if field.metadata["parse"] is parse_switch:
                argv.append(flag(name))
            else:
                text = json.dumps(value) if isinstance(value, dict) else str(value)
                argv.append(f"{flag(name)}={text}")
        return argv

    def parameters(self) -> dict[str, Any]:
        """What decides which samples a job makes; a change of it is another job."""
        names = ("n", "max_new_tokens", "temperature", "top_p", "seed", "stop", "logprobs")
        limits = ("env", "max_turns", "max_episode_tokens")
        chosen = {name: getattr(self, name) for name in names + limits}
        return chosen | {"stop": list(self.stop)}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _check(config: RolloutConfig) -> None:
    check_choices(config)
    require(bool(config.input), "--input is missing: give a .jsonl or .parquet file or a folder.")
    require(bool(config.output), "--output is missing: give the folder of the samples.")
    for name in ("n", "max_new_tokens", "max_turns", "max_episode_tokens", "shard_bytes"):
        value = getattr(config, name)
        require(value >= 1, f"{flag(name)} {value}: give 1 or more.")
    for name in ("timeout_s", "retry_s", "env_timeout_s"):
        value = getattr(config, name)
        require(value > 0, f"{flag(name)} {value}: give a number greater than 0.")
    require(config.temperature >= 0, f"--temperature {config.temperature}: give 0 or more.")
    require(0 < config.top_p <= 1, f"--top-p {config.top_p}: give a number in (0, 1].")
    require(
        not (config.overwrite and config.extend),
        "--overwrite with --extend: give the one that you mean.",
    )
    if config.endpoint:
        require(
            config.endpoint.startswith(("http://", "https://")),
            f"--endpoint {config.endpoint}: give a URL such as http://127.0.0.1:30000.",
        )
        given = config.cluster_flags()
        require(
            not given,
            f"{' '.join(given)} with --endpoint: the cluster there has its own flags.",
        )


def load_config(argv: Sequence[str]) -> RolloutConfig:
    """Flags over file over defaults; raises :class:`~launch.settings.BadConfig`."""
    parser = settings.make_parser(
        RolloutConfig,
        "python -m launch.rollout",
        "Generate samples for reinforcement learning into Parquet files, resumably.",
    )
    return settings.load_settings(RolloutConfig, parser, argv)


def help_markdown() -> str:
    """The table of the job's own flags, for docs/rollout.md."""
    return settings.help_markdown(JobConfig)

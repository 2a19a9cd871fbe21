"""Every setting of ``python -m launch.rollout``: the job's own, and the cluster's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from launch import settings
from launch.access import Access
from launch.cluster.config import ClusterConfig
from launch.flags.forms import URLS
from launch.rollout.env import BadEnv, load_env
from launch.settings import (
    SECONDS,
    SIZE,
    SWITCH,
    Form,
    check_choices,
    choice,
    flag,
    flags_of,
    integer,
    real,
    require,
    secrets_of,
    setting,
    text,
    variable,
)

AUTO = "auto"


def _concurrency(value: object) -> int | str:
    if value == AUTO:
        return AUTO
    if not str(value).isdigit() or not int(str(value)):
        raise ValueError("give a number of requests, or auto")
    return int(str(value))


def _stop(value: object) -> tuple[str, ...]:
    """One string, or several as a JSON list."""
    parsed = json.loads(value) if isinstance(value, str) and value.startswith("[") else value
    strings = [parsed] if isinstance(parsed, str) else parsed
    if not isinstance(strings, list) or not all(isinstance(s, str) for s in strings):
        raise ValueError("give a string, or a JSON list of strings")
    return tuple(s for s in strings if s)


def _env(value: object) -> str:
    """An environment is made for each episode: here its name is the value."""
    name = str(value)
    try:
        load_env(name)
    except BadEnv as error:
        raise ValueError(str(error)) from error
    return name


def _seed(value: object) -> int | None:
    return None if value == "" else integer().parse(value)


CONCURRENCY = Form(_concurrency, "auto|N")
STOP = Form(_stop, "TEXT", lambda strings: json.dumps(strings) if strings else "")
ENV = Form(_env, "NAME")
SEED = Form(_seed, "N", lambda seed: "" if seed is None else str(seed))


@dataclass(frozen=True)
class JobConfig:
    """What one job generates, from what, and where to."""

    input: str = setting(
        "",
        "Prompts: a .jsonl or .parquet file, or a folder of them.",
        text("PATH"),
    )
    output: str = setting(
        "", "Folder of the samples; an unfinished job there goes on.", text("DIR")
    )
    endpoint: tuple[str, ...] = setting(
        (),
        "A running cluster, or the URLs of all its gateways, comma-separated; empty starts one "
        "with the cluster's flags, and stops it at the end.",
        URLS,
    )
    n: int = setting(1, "Samples of each prompt.", integer("N"))
    max_new_tokens: int = setting(512, "Tokens generated in one turn.", integer("N"))
    temperature: float = setting(1.0, "0 is greedy.", real("T"))
    top_p: float = setting(1.0, "Nucleus of the sampling.", real("P"))
    seed: int | None = setting(
        None,
        "Of the order and of the samples (SGLang heeds it with --enable-deterministic-inference).",
        SEED,
    )
    stop: tuple[str, ...] = setting((), "String that ends a turn, or a JSON list of them.", STOP)
    logprobs: bool = setting(False, "Record the log-probability of each generated token.", SWITCH)
    env: str = setting(
        "",
        "Environment of an episode of many turns, module:Class; empty means one turn.",
        ENV,
    )
    max_turns: int = setting(16, "Turns after which an episode ends.", integer("N"))
    max_episode_tokens: int = setting(
        32768, "Prompt and generated tokens after which an episode ends.", integer("N")
    )
    env_timeout_s: float = setting(
        300.0, "One answer of the environment; later, the episode has failed.", SECONDS
    )
    concurrency: int | str = setting(
        AUTO,
        "Requests in flight; auto is what the endpoint admits.",
        CONCURRENCY,
    )
    order: str = setting(
        "input",
        "In which order prompts start: longest-first or shuffled keep the end of the job busy.",
        choice(("input", "longest-first", "shuffled")),
    )
    timeout_s: float = setting(600.0, "Longest time of one request.", SECONDS)
    retry_s: float = setting(
        300.0,
        "For so long a request that fails is sent again, with growing pauses.",
        SECONDS,
    )
    shard_bytes: int = setting(
        64 << 20,
        "Samples collected for one Parquet file, before compression.",
        SIZE,
    )
    overwrite: bool = setting(False, "Delete the job in --output and begin anew.", SWITCH)
    extend: bool = setting(
        False,
        "Keep the samples in --output and add those that changed settings or rows ask for.",
        SWITCH,
    )
    dry_run: bool = setting(
        False, "Count rows and tokens, show the first prompt, generate nothing.", SWITCH
    )


class Parameters(msgspec.Struct, frozen=True):
    """What decides which samples a job makes; a change of it is another job."""

    n: int
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: list[str]
    logprobs: bool
    env: str
    max_turns: int
    max_episode_tokens: int


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
        return flags_of(self, ClusterConfig)

    def cluster_secrets(self) -> dict[str, str]:
        """What goes with it in the environment."""
        return secrets_of(self, ClusterConfig)

    @property
    def access(self) -> Access:
        """How its client calls the cluster. The certificate of one of its own is known by itself,
        whatever the name in it."""
        return Access(
            key=self.api_key[0].key if self.api_key else "",
            ca_certs=self.ssl_ca_certs or self.ssl_certfile,
            any_name=not self.endpoint,
        )

    def parameters(self) -> Parameters:
        """Of the job that is asked for."""
        return Parameters(
            n=self.n,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop=list(self.stop),
            logprobs=self.logprobs,
            env=self.env,
            max_turns=self.max_turns,
            max_episode_tokens=self.max_episode_tokens,
        )


_OF_A_CLIENT = flag("ssl_ca_certs")
"""Like the API key, of use to a client too."""


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
        given = [word for word in config.cluster_flags() if not word.startswith(_OF_A_CLIENT)]
        given += [name for name in config.cluster_secrets() if name != variable("api_key")]
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

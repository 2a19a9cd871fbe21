"""Every setting of ``python -m launch.rollout``: the job's own, and the cluster's."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from launch import settings
from launch.access import Access
from launch.cluster.config import ClusterConfig
from launch.flags.forms import URLS
from launch.rollout.env import BadEnv, load_env
from launch.rollout.groups.hooks import BadHook, load_hook
from launch.settings import (
    SECONDS,
    SIZE,
    SWITCH,
    BadConfig,
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


def _hook(value: object) -> str:
    """Loaded again where it is called: here its name is the value."""
    name = str(value)
    try:
        load_hook(name)
    except BadHook as error:
        raise ValueError(str(error)) from error
    return name


def _optional(value: object) -> int | None:
    return None if value == "" else integer().parse(value)


CONCURRENCY = Form(_concurrency, "auto|N")
STOP = Form(_stop, "TEXT", lambda strings: json.dumps(strings) if strings else "")
ENV = Form(_env, "NAME")
HOOK = Form(_hook, "NAME")
OPTIONAL: Form[int | None] = Form(_optional, "N", lambda n: "" if n is None else str(n))


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
        OPTIONAL,
    )
    stop: tuple[str, ...] = setting((), "String that ends a turn, or a JSON list of them.", STOP)
    logprobs: bool = setting(False, "Record the log-probability of each generated token.", SWITCH)
    env: str = setting(
        "",
        "Environment of an episode of many turns, module:Class; empty means one turn.",
        ENV,
    )
    harness: str = setting(
        "",
        "Command of an agent that owns its loop, started once for each sample with a URL of its "
        "own in its environment, at which its turns are recorded; empty means none.",
        text("CMD"),
    )
    harness_timeout_s: float = setting(
        3600.0, "Longest life of such a process; later, it is ended.", SECONDS
    )
    harness_output_bytes: int = setting(
        1 << 20, "What is kept of each of its outputs: the end.", SIZE
    )
    record_host: str = setting(
        "127.0.0.1", "Address of this machine at which harnesses find these URLs.", text("HOST")
    )
    max_turns: int = setting(16, "Turns after which an episode ends.", integer("N"))
    max_episode_tokens: int = setting(
        32768, "Prompt and generated tokens after which an episode ends.", integer("N")
    )
    env_timeout_s: float = setting(
        300.0, "One answer of the environment: a tool's, a step's, a judge's.", SECONDS
    )
    on_env_timeout: str = setting(
        "fail",
        "Where it takes longer: fail the episode, observe (the model is told, and goes on), or end "
        "the episode without a reward.",
        choice(("fail", "observe", "end")),
    )
    group_reward: str = setting(
        "",
        "Rewards of a prompt's samples together, module:function of a whole group.",
        HOOK,
    )
    filter: str = setting(
        "", "Whether a whole group is written, module:function of it; else it is dropped.", HOOK
    )
    group_timeout_s: float = setting(300.0, "One answer of either; later, the job stops.", SECONDS)
    groups: int = setting(
        0,
        "Groups (prompts with all their samples) after which this run ends; the next one goes on; "
        "0 means all.",
        integer("N"),
    )
    oversample_groups: int = setting(
        0, "Groups begun beyond those; once there are enough, the rest is aborted.", integer("N")
    )
    oversample_samples: int = setting(
        0,
        "Samples begun beyond --n of each prompt; once --n are whole, the rest is aborted.",
        integer("N"),
    )
    drop_partial: bool = setting(
        False,
        "Forget what a run has of samples that it aborts; else the next one continues them.",
        SWITCH,
    )
    max_staleness_commits: int | None = setting(
        None,
        "Weight updates that a group's oldest token may be behind; empty means any number.",
        OPTIONAL,
    )
    on_stale: str = setting(
        "drop",
        "A group that is further behind: drop it as soon as that is known, or finish and write it.",
        choice(("drop", "finish")),
    )
    loss_staleness_commits: int | None = setting(
        None,
        "Weight updates that a token may be behind to be in the loss mask; empty means any number.",
        OPTIONAL,
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
    on_env_timeout: str = "fail"
    group_reward: str = ""
    filter: str = ""
    oversample_samples: int = 0
    max_staleness_commits: int | None = None
    on_stale: str = "drop"
    loss_staleness_commits: int | None = None
    harness: str = ""


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

    @property
    def is_staleness_bounded(self) -> bool:
        """Whether something depends on how many updates a token's weights are behind."""
        return (self.max_staleness_commits, self.loss_staleness_commits) != (None, None)

    def parameters(self) -> Parameters:
        """Of the job that is asked for."""
        values = {name: getattr(self, name) for name in Parameters.__struct_fields__}
        return msgspec.convert(values, Parameters)


_OF_A_CLIENT = flag("ssl_ca_certs")
"""Like the API key, of use to a client too."""


def _check(config: RolloutConfig) -> None:
    check_choices(config)
    require(bool(config.input), "--input is missing: give a .jsonl or .parquet file or a folder.")
    require(bool(config.output), "--output is missing: give the folder of the samples.")
    counts = ("n", "max_new_tokens", "max_turns", "max_episode_tokens", "shard_bytes")
    for name in (*counts, "harness_output_bytes"):
        value = getattr(config, name)
        require(value >= 1, f"{flag(name)} {value}: give 1 or more.")
    for name in ("groups", "oversample_groups", "oversample_samples"):
        value = getattr(config, name)
        require(value >= 0, f"{flag(name)} {value}: give 0 or more.")
    for name in ("max_staleness_commits", "loss_staleness_commits"):
        value = getattr(config, name)
        require(value is None or value >= 0, f"{flag(name)} {value}: give 0 or more.")
    require(
        bool(config.groups) or not config.oversample_groups,
        "--oversample-groups without --groups: say how many are needed.",
    )
    for name in ("timeout_s", "retry_s", "env_timeout_s", "group_timeout_s", "harness_timeout_s"):
        value = getattr(config, name)
        require(value > 0, f"{flag(name)} {value}: give a number greater than 0.")
    require(config.temperature >= 0, f"--temperature {config.temperature}: give 0 or more.")
    require(0 < config.top_p <= 1, f"--top-p {config.top_p}: give a number in (0, 1].")
    require(
        not (config.overwrite and config.extend),
        "--overwrite with --extend: give the one that you mean.",
    )
    _check_harness(config)
    if config.endpoint:
        given = [word for word in config.cluster_flags() if not word.startswith(_OF_A_CLIENT)]
        given += [name for name in config.cluster_secrets() if name != variable("api_key")]
        require(
            not given,
            f"{' '.join(given)} with --endpoint: the cluster there has its own flags.",
        )


def _check_harness(config: RolloutConfig) -> None:
    if not config.harness:
        return
    require(not config.env, "--harness with --env: give the one that owns the loop.")
    try:
        shlex.split(config.harness)
    except ValueError as error:
        raise BadConfig(f"--harness {config.harness}: {error}") from error
    require(
        config.record_host not in ("0.0.0.0", "::", ""),
        f"--record-host {config.record_host}: give the address at which harnesses reach it.",
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

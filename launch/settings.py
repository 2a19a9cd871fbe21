"""Settings declared once: a field of a frozen dataclass is a flag, a key of a ``--config``
file and a row of a table in the docs. Flags win over the file, the file over the defaults.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import shlex
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from common.sizes import format_size, parse_size

Config = TypeVar("Config")


class BadConfig(Exception):
    """A flag, a key of the file, or a combination of them; the text says what to do."""


# ---- declaring --------------------------------------------------------------------------


def setting(
    default: Any,
    description: str,
    parse: Callable[[Any], Any] = str,
    *,
    metavar: str = "",
    choices: Sequence[str] = (),
) -> Any:
    """A field of a dataclass of settings. ``parse`` takes text or the file's own value."""
    metadata = {"help": description, "parse": parse, "metavar": metavar, "choices": choices}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse_json_object(value: str | dict[str, Any]) -> dict[str, Any]:
    """A JSON object, as text or as the file's own mapping."""
    parsed = json.loads(value) if isinstance(value, str) else value
    if not isinstance(parsed, dict):
        raise ValueError(f"{value!r} is not a JSON object")
    return parsed


def parse_arguments(value: str) -> str:
    """Flags of another program, as on a command line."""
    shlex.split(value)  # raises ValueError on an open quote
    return value


def parse_switch(value: str | bool) -> bool:
    """True or false in a file; a flag without a value on the command line."""
    if isinstance(value, bool):
        return value
    raise ValueError(f"{value!r} is neither true nor false")


def require(holds: bool, sentence: str) -> None:
    """Raise :class:`BadConfig` unless ``holds``."""
    if not holds:
        raise BadConfig(sentence)


def check_choices(config: Any) -> None:
    """Every setting that has choices holds one of them."""
    for name, field in fields_of(type(config)).items():
        choices, value = field.metadata["choices"], getattr(config, name)
        if choices and value not in choices:
            raise BadConfig(
                f"{flag(name)} {value}: choose one of {', '.join(choices)}.{near(value, choices)}"
            )


def near(word: str, words: Iterable[str]) -> str:
    """`` Did you mean x?`` or nothing."""
    matches = difflib.get_close_matches(word, list(words), n=1)
    return f" Did you mean {matches[0]}?" if matches else ""


# ---- reading ----------------------------------------------------------------------------


def fields_of(kind: type) -> dict[str, dataclasses.Field[Any]]:
    """By name, in order of declaration."""
    return {field.name: field for field in dataclasses.fields(kind)}


def flag(name: str) -> str:
    """``dram_bytes`` -> ``--dram-bytes``."""
    return "--" + name.replace("_", "-")


def _parsed(field: dataclasses.Field[Any], value: Any, where: str) -> Any:
    try:
        return field.metadata["parse"](value)
    except (ValueError, TypeError) as error:
        raise BadConfig(f"{where} {value!r}: {error}.") from error


def read_file(kind: type, path: Path) -> dict[str, Any]:
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
    fields, settings = fields_of(kind), {}
    for key, value in (raw or {}).items():
        name = str(key).replace("-", "_")
        if name not in fields:
            spelled = [field.replace("_", "-") for field in fields]
            hint = near(str(key).replace("_", "-"), spelled)
            raise BadConfig(f"--config {path}: unknown key {key!r}.{hint}")
        settings[name] = _parsed(fields[name], value, f"--config {path}: {key}")
    return settings


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise BadConfig(f"{message}; see --help.")


def make_parser(kind: type, prog: str, description: str) -> argparse.ArgumentParser:
    """Values stay text: :func:`load_config` parses them as it does the file's."""
    parser = _Parser(
        prog=prog,
        description=description,
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
    for name, field in fields_of(kind).items():
        text = field.metadata["help"].replace("%", "%%")
        if field.metadata["parse"] is parse_switch:
            parser.add_argument(flag(name), action="store_true", help=text)
        else:
            text += f" (default: {default_text(field)})"
            parser.add_argument(flag(name), metavar=_metavar(field), help=text)
    return parser


def load_settings(
    kind: type[Config], parser: argparse.ArgumentParser, argv: Sequence[str]
) -> Config:
    """Flags over file over defaults; raises :class:`BadConfig`."""
    fields = fields_of(kind)
    given, unknown = parser.parse_known_args(list(argv))
    if unknown:
        flags = [*map(flag, fields), "--config"]
        raise BadConfig(f"unknown flag {unknown[0]}.{near(unknown[0].split('=')[0], flags)}")
    values = vars(given)
    values.pop("help_markdown", None)
    file = values.pop("config", None)
    settings = read_file(kind, Path(file).expanduser()) if file else {}
    settings |= {name: _parsed(fields[name], value, flag(name)) for name, value in values.items()}
    return kind(**settings)


# ---- showing ----------------------------------------------------------------------------


def _metavar(field: dataclasses.Field[Any]) -> str:
    if field.metadata["choices"]:
        return "{" + ",".join(field.metadata["choices"]) + "}"
    return str(field.metadata["metavar"] or field.name.upper())


def default_text(field: dataclasses.Field[Any]) -> str:
    """A setting's default as a user would write it; ``-`` for an empty one."""
    default = field.default
    if default is dataclasses.MISSING or default in ("", ()):
        return "-"
    if default is None:
        return "off"
    if field.metadata["parse"] is parse_size:
        return format_size(int(default)).replace(" ", "")
    return str(default).lower() if isinstance(default, bool) else str(default)


def help_markdown(kind: type) -> str:
    """The table of flags of the docs."""
    rows = ["| flag | default | what |", "| --- | --- | --- |"]
    rows.append("| `--config FILE` | - | YAML or TOML file of the same settings; flags win. |")
    for name, field in fields_of(kind).items():
        switch = field.metadata["parse"] is parse_switch
        usage = flag(name) if switch else f"{flag(name)} {_metavar(field)}"
        usage = usage.replace("|", "\\|")
        rows.append(f"| `{usage}` | {default_text(field)} | {field.metadata['help']} |")
    return "\n".join(rows)

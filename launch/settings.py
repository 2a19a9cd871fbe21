"""Settings declared once: a field of a frozen dataclass is a flag, a key of a ``--config``
file and a row of a table in the docs. Flags win over the file, the file over the defaults.

What is written is parsed here, once: fields hold values. A setting that a process has to know is
declared where that process has its own settings, and only named here (:func:`owned`).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import json
import logging
import os
import shlex
import tomllib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NoReturn, TypeVar

import msgspec
import yaml

from common.json import JsonObject
from common.sizes import format_size, parse_size

log = logging.getLogger(__name__)

Config = TypeVar("Config")
Struct = TypeVar("Struct", bound=msgspec.Struct)
T = TypeVar("T")


class BadConfig(Exception):
    """A flag, a key of the file, or a combination of them; the text says what to do."""


# ---- forms: how a setting of a type is written ------------------------------------------


@dataclass(frozen=True)
class Form(Generic[T]):
    """``parse`` takes a flag's text or the file's own value, and raises ValueError or TypeError;
    ``text`` is what it reads back, empty for nothing."""

    parse: Callable[[object], T]
    metavar: str = ""
    text: Callable[[T], str] = str
    choices: Sequence[str] = ()
    is_secret: bool = False
    """See :func:`secret`."""


def number(value: object) -> float:
    """Of a flag's text, or a file's number."""
    if isinstance(value, str | int | float):
        return float(value)
    raise TypeError("give a number")


def _whole_number(value: object) -> int:
    if isinstance(value, str | int | float):
        return int(value)
    raise TypeError("give a number")


def _size(value: object) -> int:
    return parse_size(value if isinstance(value, int) else str(value))


def _size_text(size_bytes: int) -> str:
    short = format_size(size_bytes).replace(" ", "")
    return short if parse_size(short) == size_bytes else str(size_bytes)


def _switch(value: object) -> bool:
    """True or false in a file; a flag without a value on the command line."""
    if isinstance(value, bool):
        return value
    raise ValueError(f"{value!r} is neither true nor false")


def _json_object(value: object) -> JsonObject:
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"this is no JSON object: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError("this is no JSON object")
    return parsed


def _words(value: object) -> tuple[str, ...]:
    if not isinstance(value, str):
        raise TypeError("give flags as on a command line")
    return tuple(shlex.split(value))  # raises ValueError on an open quote


def text(metavar: str = "") -> Form[str]:
    return Form(str, metavar)


def integer(metavar: str = "") -> Form[int]:
    return Form(_whole_number, metavar)


def real(metavar: str) -> Form[float]:
    return Form(number, metavar)


def choice(words: Sequence[str]) -> Form[str]:
    """One of these, which :func:`check_choices` sees to."""
    return Form(str, choices=words)


def secret(form: Form[T]) -> Form[T]:
    """Not for a command line, which every user of the machine can read, nor for a log: the value is
    also taken from a file, as ``@FILE``, or from the environment (:func:`variable`)."""

    def parse(value: object) -> T:
        if not isinstance(value, str) or not value.startswith("@"):
            return form.parse(value)
        try:
            return form.parse(Path(value[1:]).expanduser().read_text().strip())
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read the file: {error}") from error

    metavar = f"{form.metavar}|@FILE"
    return dataclasses.replace(form, parse=parse, metavar=metavar, is_secret=True)


SECONDS = real("S")
SIZE = Form(_size, "SIZE", _size_text)
SWITCH = Form(_switch, text=lambda value: str(value).lower())
JSON_OBJECT = Form(_json_object, "JSON", lambda value: json.dumps(value) if value else "")
ARGUMENTS = Form(_words, "FLAGS", shlex.join)
"""Flags of another program."""


# ---- declaring --------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting(Generic[T]):
    """One field of a dataclass of settings."""

    default: T
    description: str
    form: Form[T]
    owner: tuple[type[msgspec.Struct], str] | None = None
    """The struct that the setting belongs to, and the name that it has there."""

    @property
    def is_switch(self) -> bool:
        """A flag without a value."""
        return isinstance(self.default, bool)

    @property
    def metavar(self) -> str:
        """Empty: the setting's own name."""
        return "{" + ",".join(self.form.choices) + "}" if self.form.choices else self.form.metavar

    @property
    def default_text(self) -> str:
        """As a user would write it; ``-`` for nothing."""
        return self.form.text(self.default) or "-"


def setting(default: T, description: str, form: Form[T]) -> T:
    """A field of a dataclass of settings."""
    return _declared(Setting(default, description, form))


def owned(owner: type[msgspec.Struct], name: str, form: Form[T]) -> T:
    """A field that belongs to a process's own settings: the default and the sentence (the
    description in ``msgspec.Meta``) are those that the field ``name`` has there, and
    :func:`filled` puts the value there."""
    [field] = [field for field in msgspec.structs.fields(owner) if field.name == name]
    has_factory = field.default_factory is not msgspec.NODEFAULT
    default = field.default_factory() if has_factory else field.default
    hint = typing.get_type_hints(owner, include_extras=True)[name]
    [meta] = [extra for extra in hint.__metadata__ if isinstance(extra, msgspec.Meta)]
    assert meta.description is not None
    return _declared(Setting(default, meta.description, form, (owner, name)))


def _declared(declared: Setting[T]) -> T:
    default, metadata = declared.default, {"setting": declared}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def filled(struct: Struct, config: object) -> Struct:
    """``struct`` with the values of those settings of ``config`` that belong to it."""
    values = {
        declared.owner[1]: getattr(config, name)
        for name, declared in settings_of(type(config)).items()
        if declared.owner is not None and declared.owner[0] is type(struct)
    }
    return msgspec.structs.replace(struct, **values)


def settings_of(kind: type) -> dict[str, Setting[object]]:
    """By name, in order of declaration."""
    return {field.name: field.metadata["setting"] for field in dataclasses.fields(kind)}


def flag(name: str) -> str:
    """``dram_bytes`` -> ``--dram-bytes``."""
    return "--" + name.replace("_", "-")


def variable(name: str) -> str:
    """Of the environment, for a secret: ``api_key`` -> ``DUALPATH_API_KEY``."""
    return "DUALPATH_" + name.upper()


def flags_of(config: object, kind: type) -> list[str]:
    """The command line that gives the settings of ``kind``, as ``config`` has them; its secrets
    are :func:`secrets_of` it."""
    return [
        flag(name) + ("" if declared.is_switch else f"={declared.form.text(value)}")
        for name, declared, value in _changed(config, kind)
        if not declared.form.is_secret
    ]


def secrets_of(config: object, kind: type) -> dict[str, str]:
    """The environment that gives them."""
    return {
        variable(name): declared.form.text(value)
        for name, declared, value in _changed(config, kind)
        if declared.form.is_secret
    }


def _changed(config: object, kind: type) -> Iterator[tuple[str, Setting[object], object]]:
    for name, declared in settings_of(kind).items():
        value = getattr(config, name)
        if value != declared.default:
            yield name, declared, value


# ---- checking ---------------------------------------------------------------------------


def require(holds: bool, sentence: str) -> None:
    """Raise :class:`BadConfig` unless ``holds``."""
    if not holds:
        raise BadConfig(sentence)


def check_choices(config: object) -> None:
    """Every setting that has choices holds one of them."""
    for name, declared in settings_of(type(config)).items():
        choices, value = declared.form.choices, getattr(config, name)
        if choices and value not in choices:
            raise BadConfig(
                f"{flag(name)} {value}: choose one of {', '.join(choices)}.{near(value, choices)}"
            )


def near(word: str, words: Iterable[str]) -> str:
    """`` Did you mean x?`` or nothing."""
    matches = difflib.get_close_matches(word, list(words), n=1)
    return f" Did you mean {matches[0]}?" if matches else ""


# ---- reading ----------------------------------------------------------------------------


def _parsed(declared: Setting[object], value: object, where: str) -> object:
    try:
        return declared.form.parse(value)
    except (ValueError, TypeError) as error:
        shown = "" if declared.form.is_secret else f" {value!r}"
        raise BadConfig(f"{where}{shown}: {error}.") from error


def read_file(kind: type, path: Path) -> JsonObject:
    """The settings in a YAML or TOML file; keys as the flags, with - or _."""
    return parsed(kind, load_file(path, "--config") or {}, f"--config {path}")


def load_file(path: Path, option: str) -> object:
    """What a YAML or TOML file says; raises :class:`BadConfig`."""
    try:
        written = path.read_text()
        return tomllib.loads(written) if path.suffix == ".toml" else yaml.safe_load(written)
    except OSError as error:
        raise BadConfig(f"{option} {path}: {error.strerror}; give a readable file.") from error
    except (yaml.YAMLError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadConfig(f"{option} {path} is not valid: {error}") from error


def parsed(kind: type, raw: object, where: str) -> JsonObject:
    """The settings in what a file says; ``where`` is named in what is raised."""
    if not isinstance(raw, dict):
        raise BadConfig(f"{where}: expected lines of `key: value`.")
    known, values = settings_of(kind), JsonObject()
    for key, value in raw.items():
        name = str(key).replace("-", "_")
        if name not in known:
            spelled = [setting.replace("_", "-") for setting in known]
            raise BadConfig(
                f"{where}: unknown key {key!r}.{near(str(key).replace('_', '-'), spelled)}"
            )
        values[name] = _parsed(known[name], value, f"{where}: {key}")
    return values


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadConfig(f"{message}; see --help.")


def make_parser(kind: type, prog: str, description: str) -> argparse.ArgumentParser:
    """Values stay text: :func:`load_settings` parses them as it does the file's."""
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
    for name, declared in settings_of(kind).items():
        usage = declared.description.replace("%", "%%")
        if declared.is_switch:
            parser.add_argument(flag(name), action="store_true", help=usage)
        else:
            usage += f" (default: {declared.default_text})"
            metavar = declared.metavar or name.upper()
            parser.add_argument(flag(name), metavar=metavar, help=usage)
    return parser


def load_settings(
    kind: type[Config],
    parser: argparse.ArgumentParser,
    argv: Sequence[str],
    environ: MutableMapping[str, str] = os.environ,
    given_else: Mapping[str, object] | None = None,
) -> Config:
    """Flags over file over ``given_else`` over environment (secrets only, which are taken out of
    it: a process's children have it too) over defaults; raises :class:`BadConfig`."""
    known = settings_of(kind)
    given, unknown = parser.parse_known_args(list(argv))
    if unknown:
        flags = [*map(flag, known), "--config"]
        raise BadConfig(f"unknown flag {unknown[0]}.{near(unknown[0].split('=')[0], flags)}")
    on_line = vars(given)
    on_line.pop("help_markdown", None)
    file = on_line.pop("config", None)
    values = _read_environment(known, environ) | dict(given_else or {})
    values |= read_file(kind, Path(file).expanduser()) if file else {}
    values |= {name: _parsed(known[name], value, flag(name)) for name, value in on_line.items()}
    for name, value in on_line.items():
        if known[name].form.is_secret and not value.startswith("@"):
            log.warning(
                "%s on a command line can be read by every user of this machine: write it into a "
                "file and give @FILE, or set %s.",
                flag(name),
                variable(name),
            )
    return kind(**values)


def _read_environment(
    known: Mapping[str, Setting[object]], environ: MutableMapping[str, str]
) -> JsonObject:
    values = JsonObject()
    for name, declared in known.items():
        if declared.form.is_secret and (value := environ.pop(variable(name), "")):
            values[name] = _parsed(declared, value, variable(name))
    return values


def help_markdown(kind: type) -> str:
    """The table of flags of the docs."""
    rows = ["| flag | default | what |", "| --- | --- | --- |"]
    rows.append("| `--config FILE` | - | YAML or TOML file of the same settings; flags win. |")
    for name, declared in settings_of(kind).items():
        metavar = declared.metavar or name.upper()
        usage = flag(name) if declared.is_switch else f"{flag(name)} {metavar}"
        usage = usage.replace("|", "\\|")
        rows.append(f"| `{usage}` | {declared.default_text} | {declared.description} |")
    return "\n".join(rows)

"""The configuration file of `credence serve`: the command's options by their long names, the adapters, and vLLM's flags.

Its values become click's default map, so they pass through the same conversions and checks as a command line, and lose against the
command line and the environment. Everything is checked here first, because only here the file and the key are known.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
import yaml

ADAPTERS = "adapters"
VLLM = "vllm"
COMMAND_LINE_ONLY = ("config", "check", "help")
"""Parameters that are no settings of a server."""


def read(context: typer.Context, path: Path) -> dict[str, Any]:
    """Reads a configuration file.

    Args:
        context: of the command; its parameters are the keys that are allowed.

    Returns:
        Values by parameter name for ``Context.default_map``, and under :data:`VLLM` the file's flags for vLLM as a list of words.

    Raises:
        typer.BadParameter: one sentence with the file, the key and what is allowed.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _refused(path, f"cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _refused(path, f"is not YAML: {' '.join(str(error).split())}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise _refused(path, f"must be a mapping of keys to values, it is a {type(document).__name__}")
    parameters = {_key(parameter): parameter for parameter in settings(context.command)}
    allowed = sorted({*parameters, VLLM})
    values: dict[str, Any] = {}
    for key, value in document.items():
        if key not in allowed:
            raise _refused(path, f"has the unknown key {key!r}; allowed are {', '.join(allowed)}")
        if value is None:
            continue
        if key == VLLM:
            values[VLLM] = _flags(path, value)
        elif key == ADAPTERS:
            values["adapter"] = [f"{name}={folder}" for name, folder in _texts(path, key, value).items()]
        else:
            parameter = parameters[key]
            values[str(parameter.name)] = _converted(context, path, key, parameter, value)
    return values


def settings(command: Any) -> list[Any]:
    """The parameters of a command that are settings of a server."""
    return [parameter for parameter in command.params if parameter.name not in COMMAND_LINE_ONLY]


def joined(file: Sequence[str], given: Sequence[str]) -> list[str]:
    """vLLM's flags of the file that the command line does not give, then the command line's."""
    names = {_flag_name(word) for word in given if word.startswith("--")}
    kept = [word for flag in _grouped(file) if _flag_name(flag[0]) not in names for word in flag]
    return [*kept, *given]


def _key(parameter: Any) -> str:
    """How the file calls a parameter: by its long name; the repeated ``--adapter`` is a mapping, ``adapters``."""
    if parameter.name == "adapter":
        return ADAPTERS
    return str(parameter.name).replace("_", "-")


def _converted(context: typer.Context, path: Path, key: str, parameter: Any, value: object) -> object:
    """The value as the command line would have it; a number is passed on as its text, so that 1.5 and true are no integers."""
    if getattr(parameter, "is_flag", False):
        if not isinstance(value, bool):
            raise _refused(path, f"has {key}: {value!r}; give true or false")
        return value
    several = getattr(parameter, "multiple", False)
    if several != isinstance(value, list) or isinstance(value, dict):
        raise _refused(path, f"has {key}: {value!r}; give {'a list' if several else 'one value'}")
    words = [_word(path, key, item) for item in value] if isinstance(value, list) else _word(path, key, value)
    try:
        parameter.process_value(context, words)
    except typer.TyperException as error:
        raise _refused(path, f"has {key}: {value!r}: {error.message.rstrip('.')}") from None
    return words


def _word(path: Path, key: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _refused(path, f"has {key}: {value!r}; give a text or a number")
    return str(value)


def _texts(path: Path, key: str, value: object) -> Mapping[str, str]:
    if not isinstance(value, dict) or not all(isinstance(part, str) for pair in value.items() for part in pair):
        raise _refused(path, f"has {key}: {value!r}; give a mapping of names to folders")
    return value


def _flags(path: Path, value: object) -> list[str]:
    """vLLM's flags as the words of a command line: true is the flag alone, false its ``--no-`` form, a mapping JSON."""
    if not isinstance(value, dict):
        raise _refused(path, f"has {VLLM}: {value!r}; give a mapping of vLLM's flags to their values")
    words: list[str] = []
    for flag, given in value.items():
        if not isinstance(flag, str) or not flag or flag.startswith("-"):
            raise _refused(path, f"has {VLLM}.{flag}; name a flag without its dashes, for example max-model-len")
        name = flag.replace("_", "-")
        if isinstance(given, bool):
            words.append(f"--{name}" if given else f"--no-{name}")
        elif isinstance(given, list):
            words += [f"--{name}", *(_word(path, f"{VLLM}.{flag}", item) for item in given)]
        elif isinstance(given, dict):
            words += [f"--{name}", json.dumps(given)]
        else:
            words += [f"--{name}", _word(path, f"{VLLM}.{flag}", given)]
    return words


def _grouped(words: Sequence[str]) -> Iterator[list[str]]:
    """The words by flag."""
    flag: list[str] = []
    for word in words:
        if word.startswith("--") and flag:
            yield flag
            flag = []
        flag.append(word)
    if flag:
        yield flag


def _flag_name(word: str) -> str:
    return word.partition("=")[0].replace("_", "-").removeprefix("--").removeprefix("no-")


def _refused(path: Path, what: str) -> typer.BadParameter:
    return typer.BadParameter(f"the configuration file {path} {what}")

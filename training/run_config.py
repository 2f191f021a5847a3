"""The artifact's config.yaml: every setting of the run that made it, in the form that ``credence train --config`` takes."""

import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from credence.adapters.files import RUN_CONFIG
from credence.training.config import Section, TrainConfig
from credence.training.methods import Method


def run_config(
    config: TrainConfig,
    chosen: type[Method],
    method: Section,
    run: Mapping[str, Any],
    versions: Mapping[str, str],
    *,
    epochs: float,
    context: int,
) -> str:
    """Writes the settings, all defaults filled in, under comments with the command, the data's digests and the versions.

    It names no path: the base model, the data and ``lora.init`` are called by the last part of theirs. ``train.tensorboard`` says where
    to watch a run and is left out.

    Args:
        chosen, method: the method's class and its settings.
        run: description of the run, as run.json holds it.
        epochs: of a run that was given neither ``train.max_steps`` nor ``train.epochs``.
        context: longest row that the base model takes, in tokens.
    """
    lines = [
        _command(run),
        *_facts(run),
        "versions: " + ", ".join(f"{name} {value}" for name, value in versions.items()),
    ]
    header = "".join(f"# {_one_line(line)}\n" for line in lines)
    by_head = bool(run["rows"].get("by_head"))
    document = settings_document(config, chosen, method, epochs=epochs, context=context, by_head=by_head)
    return header + yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=140)


def settings_document(
    config: TrainConfig, chosen: type[Method], method: Section, *, epochs: float, context: int, by_head: bool = False
) -> dict[str, Any]:
    """The sections of the configuration with nothing left to a default; arguments as in :func:`run_config`.

    Args:
        by_head: whether the run trains a classification head, and so at a rate.
    """
    document = config.model_dump(mode="json", exclude={"train": {"tensorboard"}})
    train, defaults = document["train"], chosen.defaults_for(method).model_dump(mode="json")
    head_learning_rate = defaults.pop("head_learning_rate")
    for key, value in {**defaults, "max_length": context}.items():
        if train[key] is None:
            train[key] = value
    if by_head and train["head_learning_rate"] is None:
        train["head_learning_rate"] = head_learning_rate or train["learning_rate"]
    if train["max_steps"] is None and train["epochs"] is None:
        train["epochs"] = epochs
    return {**document, "method": method.model_dump(mode="json")}


def _command(run: Mapping[str, Any]) -> str:
    count = run.get("processes", 1)
    program = ["credence"] if count == 1 else ["torchrun", "--nproc-per-node", str(count), "-m", "credence.cli.main"]
    words = [*program, "train", "--base", run["base_model"]["name"], "--data", run["data"]["file"]]
    if run["validation"]:
        words += ["--validation", run["validation"]["file"]]
    words += ["--method", run["method"], "--config", RUN_CONFIG, "--seed", str(run["seed"]), "--output"]
    return f"{shlex.join(words)} DIR"


def _facts(run: Mapping[str, Any]) -> list[str]:
    base, start = run["base_model"], run["init"]
    lines = [f"base: {base['name']}" + (f", revision {base['revision']}" if base["revision"] else "")]
    for name in ("data", "validation"):
        if run[name]:
            lines.append(f"{name}: {run[name]['file']}, sha256 {run[name]['sha256']}")
    lines.append(f"method: {run['method']}, seed {run['seed']}")
    if start:
        lines.append(
            f"lora.init: a folder called {start['folder']}, {start['digest']}; give its path with --set lora.init=DIR"
        )
    return lines


def _one_line(text: str) -> str:
    """A comment ends with its line, so a file name must not start a new one."""
    return "".join(character if character.isprintable() else "?" for character in text)

"""Training checkpoints: where they lie, whether they belong to this run, and the adapter's part of them.

They lie beside the output, in ``.<output name>.checkpoints``, until the artifact is written; the output itself appears in one step.
``run.json`` says what the run is; a checkpoint is never continued under another configuration, data, method or seed.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from credence.training.errors import CheckpointError
from credence.training.methods.base import Method

RUN_FILE = "run.json"
ADAPTER_FILE = "credence_adapter.safetensors"
METHOD_FILE = "credence_method.safetensors"
TRAINER_STATE = "trainer_state.json"


def checkpoint_folder(output: Path) -> Path:
    """Folder of the checkpoints of the run that writes ``output``."""
    return output.parent / f".{output.name}.checkpoints"


def prepare_folder(output: Path, run: Mapping[str, Any], *, resume: bool) -> Path | None:
    """Makes the checkpoint folder ready and returns the checkpoint to continue from, or None to start from the beginning.

    Args:
        run: JSON description of the run; must equal that of the checkpoints found.

    Raises:
        CheckpointError: the output exists, or there are checkpoints and they were not asked for or are another run's.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} exists; choose another --output or remove it first")
    folder = checkpoint_folder(output)
    found = latest_checkpoint(folder)
    if found is not None and not resume:
        raise CheckpointError(
            f"{folder} holds checkpoints of an unfinished run (the last one: {found.name}); continue it with --resume, or delete "
            "the folder to start again"
        )
    if found is not None:
        _check_same_run(folder / RUN_FILE, run)
        return found
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / RUN_FILE).write_text(json.dumps(run, indent=2, sort_keys=True) + "\n")
    return None


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in ``folder``. One whose writing was interrupted is passed over."""
    complete = {}
    for path in folder.glob("checkpoint-*"):
        try:
            # The trainer writes its state last.
            state = json.loads((path / TRAINER_STATE).read_text())
        except (OSError, ValueError):
            continue
        complete[int(state["global_step"])] = path
    return complete[max(complete)] if complete else None


def save_method(method: Method, folder: Path) -> None:
    """Saves what a method keeps beside the parameters and the optimiser."""
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in method.state().items()}
    if state:
        save_file(state, folder / METHOD_FILE)


def load_method(method: Method, folder: Path) -> None:
    """Loads what :func:`save_method` saved."""
    if (folder / METHOD_FILE).exists():
        method.load_state(load_file(folder / METHOD_FILE))


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Saves every trainable parameter, bit for bit."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_file(tensors, folder / ADAPTER_FILE)


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Loads what :func:`save_adapter` saved.

    Raises:
        CheckpointError: the parameters are not the model's.
    """
    tensors = load_file(folder / ADAPTER_FILE)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if set(parameters) != set(tensors) or any(parameters[n].shape != t.shape for n, t in tensors.items()):
        raise CheckpointError(
            f"{folder} does not hold this model's adapter parameters; delete {folder.parent} to start again"
        )
    for name, tensor in tensors.items():
        parameters[name].data.copy_(tensor)


def _check_same_run(path: Path, run: Mapping[str, Any]) -> None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        raise CheckpointError(f"{path} cannot be read; delete {path.parent} to start again") from None
    difference = first_difference(found, run)
    if difference is not None:
        key, before, now = difference
        raise CheckpointError(
            f"the checkpoints in {path.parent} are of another run: {key} was {before!r} and is now {now!r}; "
            "resume with the same settings, or delete the folder to start again"
        )


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first dotted key, by name, in which two JSON descriptions differ, with its two values; None if they are equal."""
    old, new = _flat(json.loads(json.dumps(before))), _flat(json.loads(json.dumps(now)))
    differing = [(key, old.get(key), new.get(key)) for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    return differing[0] if differing else None


def _flat(document: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(document, dict):
        return {prefix: document}
    return {
        key: value
        for name, inner in document.items()
        for key, value in _flat(inner, f"{prefix}.{name}" if prefix else name).items()
    }

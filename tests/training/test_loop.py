"""Training runs end to end on a tiny model: resume, noise per step, artifacts, and refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from credence.adapters.artifact import load_artifact
from credence.adapters.kinds import (
    CorePosterior,
    DiagPosterior,
    EnsemblePosterior,
    FixedRowPosterior,
    KroneckerPosterior,
    LowRankPosterior,
    MaskPosterior,
    PointPosterior,
    RowPosterior,
)
from credence.adapters.sampling import NoiseSource
from credence.training.checkpoint import checkpoint_folder, latest_checkpoint
from credence.training.errors import CheckpointError, ConfigError, DataError, ModelError, TrainingError
from credence.training.loop import train
from credence.training.methods import METHODS
from tests.training.conftest import label_rows, quick_config

Write = Callable[..., Path]
KINDS = {
    "map": PointPosterior,
    "swa": PointPosterior,
    "swag": LowRankPosterior,
    "laplace": KroneckerPosterior,
    "monteclora": RowPosterior,
    "melora": CorePosterior,
    "blob": DiagPosterior,
    "ivon": DiagPosterior,
    "mcdropout": MaskPosterior,
    "tfb": FixedRowPosterior,
    "ensemble": EnsemblePosterior,
}


class StopAfter(TrainerCallback):  # type: ignore[misc]
    """Interrupts the run after an optimiser step, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


class FinalState(TrainerCallback):  # type: ignore[misc]
    """Keeps the optimiser's and the scheduler's state at the end of training."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimizer = kwargs["optimizer"].state_dict()
        self.scheduler = kwargs["lr_scheduler"].state_dict()


def flat(document: Any, prefix: str = "") -> dict[str, Any]:
    """A nested state as one dictionary."""
    if isinstance(document, dict):
        items = document.items()
    elif isinstance(document, (list, tuple)):
        items = enumerate(document)
    else:
        return {prefix: document}
    return {key: value for name, inner in items for key, value in flat(inner, f"{prefix}/{name}").items()}


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("save_steps", [2, 3])  # 3 steps are one epoch, so the second case resumes at its end
def test_a_resumed_run_is_bit_equal(
    method: str, save_steps: int, base: Path, train_file: Path, validation_file: Path, tmp_path: Path
) -> None:
    config = quick_config(
        method,
        "train.max_steps=7",
        "train.gradient_accumulation=2",
        "lora.dropout=0.2",
        f"train.save_steps={save_steps}",
        "train.logging_steps=1",
        "release.ks=[2]",
        "release.taus=[1]",
    )
    whole_state, resumed_state = FinalState(), FinalState()
    whole = train(base, train_file, validation_file, method, tmp_path / "whole", config, 5, callbacks=[whole_state])
    with pytest.raises(KeyboardInterrupt):
        train(base, train_file, validation_file, method, tmp_path / "cut", config, 5, callbacks=[StopAfter(5)])
    assert not (tmp_path / "cut").exists()
    found = latest_checkpoint(checkpoint_folder(tmp_path / "cut"))
    assert found is not None and found.name == f"checkpoint-{save_steps * (5 // save_steps)}"
    torch.manual_seed(99)  # the process that resumes is in another state
    resumed = train(
        base, train_file, validation_file, method, tmp_path / "cut", config, 5, True, callbacks=[resumed_state]
    )
    assert resumed.digest == whole.digest  # mean, posterior, loss curve, fitted values: every byte
    for attribute in ("optimizer", "scheduler"):
        expected, got = flat(getattr(whole_state, attribute)), flat(getattr(resumed_state, attribute))
        assert expected.keys() == got.keys()
        for key, value in expected.items():
            same = torch.equal(value, got[key]) if isinstance(value, torch.Tensor) else value == got[key]
            assert same, f"{attribute}{key}"
    if method == "ivon":
        assert any(key.endswith("/hess") for key in flat(whole_state.optimizer))
    assert not checkpoint_folder(tmp_path / "cut").exists()


@pytest.mark.parametrize("method", list(METHODS))
def test_the_artifact_of_a_run(
    method: str, base: Path, train_file: Path, validation_file: Path, tmp_path: Path
) -> None:
    result = train(base, train_file, validation_file, method, tmp_path / "out", quick_config(method), 1)
    artifact = load_artifact(result.path)
    assert artifact.digest == result.digest
    assert artifact.config.method == method
    assert all(isinstance(p, KINDS[method]) for p in artifact.posteriors.values())
    assert sorted(artifact.mean) == [f"model.layers.{i}.self_attn.{m}_proj" for i in (0, 1) for m in ("q", "v")]
    assert artifact.config.target_modules == ("q_proj", "v_proj")
    assert any(bool(factors.B.any()) for factors in artifact.mean.values())
    training = artifact.config.training
    assert training["labels"] == ["bird", "cat", "dog"]
    assert training["label_texts"] == ["A", "B", "C"]
    assert training["format"] == "label"
    assert training["data"] == {"file": "train.jsonl", "rows": 24, "sha256": training["data"]["sha256"]}
    assert set(artifact.calibration.temperature) == {0, 2, 4}
    assert set(artifact.config.tau) == (set() if KINDS[method] is PointPosterior else {2, 4})
    assert artifact.metrics == result.metrics and artifact.metrics["train"]["steps"] == 4
    card = (result.path / "README.md").read_text()
    assert f"`{method}`" in card and "bird `A`" in card
    for file in result.path.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), f"{file.name} holds a path of this machine"
    again = train(base, train_file, validation_file, method, tmp_path / "again", quick_config(method), 1)
    assert again.digest == result.digest
    other = train(base, train_file, validation_file, method, tmp_path / "other", quick_config(method), 2)
    assert other.digest != result.digest


class Gradients(TrainerCallback):  # type: ignore[misc]
    """Keeps the accumulated gradients of the first optimiser step."""

    gradients: dict[str, torch.Tensor] | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.gradients is None:
            self.gradients = {n: p.grad.clone() for n, p in kwargs["model"].named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["monteclora", "ivon", "melora", "blob"])
def test_the_noise_holds_through_accumulation_and_recomputation(
    method: str, base: Path, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four micro-batches with recomputed activations give the gradient of one batch without: one noise draw, one loss."""
    drawn: list[tuple[int, str]] = []
    original = NoiseSource.__init__

    def record(self: NoiseSource, seed: int, index: int, purpose: Any = "sample") -> None:
        original(self, seed, index, purpose)
        if purpose != "init":
            drawn.append((index, purpose))

    monkeypatch.setattr(NoiseSource, "__init__", record)
    plain, split = Gradients(), Gradients()
    shared = ["train.max_steps=2", "train.max_grad_norm=0", "method.kl_weight=0.01"][: 2 if method == "ivon" else 3]
    train(
        base,
        train_file,
        None,
        method,
        tmp_path / "a",
        quick_config(method, *shared, "train.batch_size=8"),
        callbacks=[plain],
    )
    assert drawn == [(0, "train"), (1, "train")]
    drawn.clear()
    options = [*shared, "train.batch_size=2", "train.gradient_accumulation=4", "train.gradient_checkpointing=true"]
    train(base, train_file, None, method, tmp_path / "b", quick_config(method, *options), callbacks=[split])
    assert drawn == [(0, "train"), (1, "train")]
    assert plain.gradients is not None and split.gradients is not None
    assert plain.gradients.keys() == split.gradients.keys()
    for name, expected in plain.gradients.items():
        torch.testing.assert_close(split.gradients[name], expected, rtol=1e-4, atol=1e-7)


def test_training_learns(base: Path, write: Write, tmp_path: Path) -> None:
    """60 steps separate three labels that a random model cannot."""
    data, held_out = write("t.jsonl", label_rows(30)), write("v.jsonl", label_rows(30, start=30))
    config = quick_config("map", "train.max_steps=60", "train.batch_size=8", "train.learning_rate=0.03")
    result = train(base, data, held_out, "map", tmp_path / "out", config)
    assert result.metrics["release"]["nll"]["0"] < 0.3  # ln 3 = 1.1 at chance


ROWS: dict[str, list[dict[str, Any]]] = {
    "choices": [
        {"prompt": "q", "choices": ["x", "y", "z"][: 2 + i % 2], "answer": i % 2} for i in range(12)
    ],  # 100 tokens
    "completion": [{"prompt": f"{i}", "completion": f" is {i}"} for i in range(12)],
    "messages": [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes"}]} for i in range(12)
    ],
}


@pytest.mark.parametrize("data_format", list(ROWS))
def test_other_formats_train_and_release(data_format: str, chat_base: Path, write: Write, tmp_path: Path) -> None:
    data = write("d.jsonl", ROWS[data_format])
    config = quick_config("ivon", "train.max_steps=2", "release.ks=[4]", "release.taus=[1]")
    result = train(chat_base, data, data, "ivon", tmp_path / "out", config)
    artifact = load_artifact(result.path)
    assert artifact.config.training["format"] == data_format
    assert "labels" not in artifact.config.training
    assert artifact.calibration.temperature[4].nll > 0


def test_without_validation_the_artifact_is_not_released(base: Path, train_file: Path, tmp_path: Path) -> None:
    result = train(base, train_file, None, "ivon", tmp_path / "out", quick_config("ivon"))
    artifact = load_artifact(result.path)
    assert artifact.config.tau == {} and artifact.calibration.temperature == {}
    assert "Not released" in (result.path / "README.md").read_text()
    assert "release" not in result.metrics


def test_existing_outputs_and_checkpoints_are_never_overwritten(base: Path, train_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    config = quick_config("map", "train.save_steps=2")
    with pytest.raises(KeyboardInterrupt):
        train(base, train_file, None, "map", output, config, callbacks=[StopAfter(3)])
    with pytest.raises(CheckpointError, match=r"checkpoint-2.*--resume"):
        train(base, train_file, None, "map", output, config)
    with pytest.raises(CheckpointError, match=r"config\.train\.learning_rate was 0\.01 and is now 0\.5"):
        train(
            base,
            train_file,
            None,
            "map",
            output,
            quick_config("map", "train.save_steps=2", "train.learning_rate=0.5"),
            0,
            True,
        )
    with pytest.raises(CheckpointError, match="seed was 0 and is now 1"):
        train(base, train_file, None, "map", output, config, 1, True)
    # A checkpoint whose writing was cut short is passed over.
    broken = checkpoint_folder(output) / "checkpoint-4"
    broken.mkdir()
    (broken / "trainer_state.json").write_text("{")
    result = train(base, train_file, None, "map", output, config, 0, True)
    assert load_artifact(result.path).metrics["train"]["steps"] == 4
    with pytest.raises(CheckpointError, match="exists; choose another --output"):
        train(base, train_file, None, "map", output, config)


def test_resume_without_checkpoints_starts_from_the_beginning(base: Path, train_file: Path, tmp_path: Path) -> None:
    first = train(base, train_file, None, "map", tmp_path / "a", quick_config("map"), 0, True)
    second = train(base, train_file, None, "map", tmp_path / "b", quick_config("map"), 0, False)
    assert first.digest == second.digest


def test_a_failed_run_leaves_nothing_at_the_output(
    base: Path, train_file: Path, validation_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("credence.training.loop.write_artifact", fail)
    config = quick_config("ivon", "train.save_steps=2")
    with pytest.raises(OSError, match="disk full"):
        train(base, train_file, validation_file, "ivon", tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    # Nothing was lost: the finished run is restored, not trained further.
    resumed = train(base, train_file, validation_file, "ivon", tmp_path / "out", config, 0, True)
    assert resumed.metrics["train"]["steps"] == 4
    whole = train(base, train_file, validation_file, "ivon", tmp_path / "whole", config)
    assert resumed.digest == whole.digest


@pytest.mark.parametrize(
    ("method", "overrides", "error", "message"),
    [
        ("sgd", [], ConfigError, "unknown method 'sgd'"),
        ("ivon", ["method.epsilon=1"], ConfigError, r"unknown configuration key method\.epsilon"),
        ("ivon", ["train.max_grad_norm=1"], ConfigError, "ivon takes 0 only"),
        ("map", ["train.max_length=129"], ConfigError, "the base model takes 128 tokens"),
        ("map", ["train.max_length=8"], DataError, r"train\.jsonl:1: has \d+ tokens, 8 are allowed"),
        ("map", ["lora.target_modules=[query]"], ModelError, r"linear layers are called .*q_proj"),
    ],
)
def test_refusals(
    method: str,
    overrides: list[str],
    error: type[Exception],
    message: str,
    base: Path,
    train_file: Path,
    tmp_path: Path,
) -> None:
    config = quick_config("map" if method == "sgd" else method, *overrides)
    with pytest.raises(error, match=message):
        train(base, train_file, None, method, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_stops_the_run(
    base: Path, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflow(*_: object, **__: object) -> torch.Tensor:
        return torch.tensor(float("inf"), requires_grad=True)

    monkeypatch.setattr("credence.training.methods.monteclora.MonteCLora.regulariser", overflow)
    with pytest.raises(TrainingError, match="the loss is inf at optimiser step 1: lower train.learning_rate"):
        train(base, train_file, None, "monteclora", tmp_path / "out", quick_config("monteclora"))


def test_inputs_that_cannot_be_used(base: Path, train_file: Path, write: Write, tmp_path: Path) -> None:
    config = quick_config("map")
    one_label = write("one.jsonl", [{"text": "a", "label": "x"}] * 3)
    with pytest.raises(DataError, match=r"one\.jsonl: has one label only"):
        train(base, one_label, None, "map", tmp_path / "out", config)
    with pytest.raises(DataError, match=r"few\.jsonl: holds 3 rows"):
        train(base, train_file, write("few.jsonl", label_rows(3)), "map", tmp_path / "out", config)
    with pytest.raises(DataError, match=r"new\.jsonl:2: has the label 'fish'; the adapter knows bird, cat, dog"):
        rows = [label_rows(1)[0], {"text": "fish", "label": "fish"}, *label_rows(8)]
        train(base, train_file, write("new.jsonl", rows), "map", tmp_path / "out", config)
    with pytest.raises(ModelError, match="cannot be loaded"):
        train(tmp_path, train_file, None, "map", tmp_path / "out", config)
    with pytest.raises(ConfigError, match="seed is -1"):
        train(base, train_file, None, "map", tmp_path / "out", config, -1)


@pytest.mark.parametrize("progress", [True, False])
def test_progress_goes_to_standard_error(
    progress: bool, base: Path, train_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = quick_config("map", "train.logging_steps=2")
    train(base, train_file, None, "map", tmp_path / "out", config, 0, False, progress)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("step 2/4  loss" in captured.err) is not progress
    assert ("4/4" in captured.err) is True


def test_the_checkpoint_holds_the_hessian(base: Path, train_file: Path, tmp_path: Path) -> None:
    config = quick_config("ivon", "train.save_steps=2")
    with pytest.raises(KeyboardInterrupt):
        train(base, train_file, None, "ivon", tmp_path / "out", config, callbacks=[StopAfter(3)])
    found = latest_checkpoint(checkpoint_folder(tmp_path / "out"))
    assert found is not None
    state = torch.load(found / "optimizer.pt", weights_only=True)["state"]
    assert len(state) == 8 and all(set(entry) == {"step", "momentum", "hess"} for entry in state.values())
    assert json.loads((found.parent / "run.json").read_text())["method"] == "ivon"

"""Evaluations during training leave it as it was; early stopping keeps the best step; a run repeats from its config.yaml."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import TrainerCallback

from credence.adapters.artifact import load_artifact
from credence.training import monitor as monitoring
from credence.training.checkpoint import checkpoint_folder
from credence.training.config import TrainConfig, load_config
from credence.training.errors import CheckpointError, ConfigError, TrainingError
from credence.training.evaluate import evaluate
from credence.training.loop import TrainResult, train
from credence.training.methods import Map
from credence.training.modeling import LoraSite, add_lora, load_base, set_factors
from credence.training.monitor import Evaluation, Monitor, Stopping, stopping, undisturbed
from credence.training.release import release
from tests.training.conftest import METHOD_OPTIONS, QUICK, label_rows, quick_config
from tests.training.test_distributed import free_ports

Write = Callable[..., Path]
ROOT = Path(__file__).parents[2]
TENSORS = ("adapter_model.safetensors", "posterior.safetensors")
STEADY = ("train.lr_scheduler=constant", "train.warmup_ratio=0", "train.max_steps=8")
"""Under these the first n steps of a run are a run of n steps."""
RUNS = {
    "map": ("map", []),
    "monteclora": ("monteclora", ["train.eval_samples=3"]),
    "ivon": ("ivon", ["train.eval_samples=3"]),
    "melora": ("melora", ["train.eval_samples=3"]),
    "blob": ("blob", ["train.eval_samples=3"]),
    "swag": ("swag", ["train.eval_samples=3"]),
    "mcdropout": ("mcdropout", ["train.eval_samples=3"]),
    "laplace": ("laplace", []),
    "tfb": ("tfb", []),
    "ensemble": ("ensemble", []),
    "ensemble of swag": ("ensemble", ["method.member=swag", "method.members=2"]),
    "ensemble of ivon": ("ensemble", ["method.member=ivon", "train.eval_samples=3"]),
    "checkpoints": ("ensemble", ["method.source=checkpoints", "method.members=2"]),
}


class StopAfter(TrainerCallback):  # type: ignore[misc]
    """Interrupts the run after an optimiser step, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def config_of(name: str, *overrides: str) -> tuple[str, TrainConfig]:
    """Method and configuration of one of ``RUNS``."""
    method, own = RUNS[name]
    if name == "ensemble of ivon":
        own = [*own, *METHOD_OPTIONS["ivon"][:1], "method.settings={ess: 1e5, hess_init: 0.01}"]
    return method, quick_config(method, *own, *overrides)


def tensors_of(result: TrainResult) -> list[bytes]:
    """The bytes of the mean and of the posterior."""
    return [(result.path / name).read_bytes() for name in TENSORS]


def script(monkeypatch: pytest.MonkeyPatch, nlls: dict[int, float]) -> list[int]:
    """Replaces the measured NLL by ``nlls[step]``; returns the steps that are evaluated."""
    asked: list[int] = []

    def scripted(self: Monitor, step: int) -> list[Evaluation]:
        asked.append(step)
        return [Evaluation(step=step, k=0, tau=0.0, nll=nlls[step], accuracy=0.5)]

    monkeypatch.setattr(Monitor, "_evaluate", scripted)
    return asked


@pytest.mark.parametrize("name", list(RUNS))
def test_evaluations_do_not_disturb_training(
    name: str, base: Path, train_file: Path, validation_file: Path, tmp_path: Path
) -> None:
    dropout = "lora.dropout=0.2"
    method, watched = config_of(name, dropout, "train.eval_steps=1", "train.gradient_accumulation=2")
    off = {"eval_steps": 0, "eval_samples": 0}
    plain = watched.model_copy(update={"train": watched.train.model_copy(update=off)})
    expected = train(base, train_file, validation_file, method, tmp_path / "a", plain, 3)
    result = train(base, train_file, validation_file, method, tmp_path / "b", watched, 3)
    assert tensors_of(result) == tensors_of(expected)
    assert result.metrics["train"]["curve"] == expected.metrics["train"]["curve"]
    assert result.metrics["release"] == expected.metrics["release"]
    assert "evaluations" not in expected.metrics["train"]
    found = result.metrics["train"]["evaluations"]
    assert [entry["step"] for entry in found if entry["k"] == 0] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "name", ["map", "monteclora", "ivon", "melora", "swag", "ensemble", "ensemble of ivon", "checkpoints"]
)
def test_the_last_evaluation_is_that_of_the_artifact(
    name: str, base: Path, train_file: Path, validation_file: Path, tmp_path: Path
) -> None:
    """`credence eval` of the finished adapter, on its own path from the files, gives the numbers of the last step."""
    method, config = config_of(name, "train.eval_steps=2", "train.eval_tau=2.5")
    result = train(base, train_file, validation_file, method, tmp_path / "out", config, 3)
    found = [entry for entry in result.metrics["train"]["evaluations"] if entry["step"] == 4]
    ks = {"map": [0], "ensemble": [0, 4], "checkpoints": [0, 2]}.get(name, [0, 3])
    assert [(entry["k"], entry["tau"]) for entry in found] == [(k, 2.5 if k else 0.0) for k in ks]
    measured = evaluate(result.path, base, validation_file, ks=ks, tau=2.5)["results"]
    at_one = {entry["k"]: entry for entry in reversed(measured) if entry["temperature"] == 1.0}
    for entry in found:
        assert entry["nll"] == pytest.approx(at_one[entry["k"]]["nll"], abs=1e-6)
        assert entry["accuracy"] == at_one[entry["k"]]["accuracy"]
    if len(ks) > 1:
        assert found[0]["nll"] != found[1]["nll"]


def test_free_text_is_evaluated_by_token(chat_base: Path, write: Write, tmp_path: Path) -> None:
    rows = write("d.jsonl", [{"prompt": f"{i}", "completion": f" is {i}"} for i in range(12)])
    result = train(chat_base, rows, rows, "ivon", tmp_path / "out", quick_config("ivon", "train.eval_steps=4"))
    (found,) = result.metrics["train"]["evaluations"]
    at_one = evaluate(result.path, chat_base, rows, ks=[0])["results"][0]
    assert found["nll"] == pytest.approx(at_one["nll"], abs=1e-5) and found["accuracy"] == at_one["accuracy"]


def test_the_rows_of_an_evaluation_are_capped_evenly(
    base: Path, train_file: Path, write: Write, tmp_path: Path
) -> None:
    """3 of 12 rows: the middle of each third, rows 2, 6 and 10 from 0."""
    rows = label_rows(12, start=24)
    config = quick_config("map", "train.eval_steps=4", "train.eval_rows=3")
    data = write("v.jsonl", rows)
    result = train(base, train_file, data, "map", tmp_path / "out", config)
    chosen = write("chosen.jsonl", [rows[2], rows[6], rows[10]])
    at_one = evaluate(result.path, base, chosen, ks=[0])["results"][0]
    assert result.metrics["train"]["evaluations"][0]["nll"] == pytest.approx(at_one["nll"], abs=1e-6)


def test_what_was_there_comes_back(base: Path) -> None:
    """Tensors (the objects' storage too), modes and torch's generator, also after an error and factors of another rank."""
    config = load_config(None, ["lora.r=4"]).lora
    model, sites = add_lora(load_base(base, "float32"), config)
    model.train()
    model.base_model.model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = [(site.mean.A.data_ptr(), site.mean.A.clone(), site.mean.B.clone()) for site in sites]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt), undisturbed(model, sites):
        model.eval()
        torch.rand(5)
        set_factors(sites, {site.name: _of_rank(site, 6) for site in sites})
        assert sites[0].mean.A.shape[0] == 6
        raise KeyboardInterrupt
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    for site, (pointer, A, B) in zip(sites, before, strict=True):
        assert site.mean.A.data_ptr() == pointer and torch.equal(site.mean.A, A) and torch.equal(site.mean.B, B)
    with undisturbed(model, sites):
        set_factors(sites, {site.name: _of_rank(site, 4) for site in sites})
    assert all(torch.equal(site.mean.A, A) for site, (_, A, _) in zip(sites, before, strict=True))


def _of_rank(site: LoraSite, rank: int) -> Any:
    mean = site.mean
    return type(mean)(A=torch.ones(rank, mean.A.shape[1]), B=torch.ones(mean.B.shape[0], rank))


def entries(nlls: Sequence[float]) -> list[Evaluation]:
    """Evaluations at steps 10, 20, ..., each with a much better one of K samples that must not count."""
    found = []
    for index, nll in enumerate(nlls):
        shared = {"step": 10 * (index + 1), "accuracy": 0.0}
        found.append(Evaluation(k=0, tau=0.0, nll=nll, **shared))  # type: ignore[arg-type]
        found.append(Evaluation(k=8, tau=1.0, nll=-100.0 - index, **shared))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(
    ("nlls", "patience", "expected"),
    [
        ([], 2, Stopping()),
        ([1.0], 1, Stopping(best_step=10, best_nll=1.0)),
        ([1.0, 0.9, 1.1, 0.95, 0.5], 2, Stopping(best_step=20, best_nll=0.9, stopped_at=40)),
        ([1.0, 1.1, 0.9, 1.0, 0.8], 2, Stopping(best_step=50, best_nll=0.8)),
        ([1.0, 1.0, 1.0], 2, Stopping(best_step=10, best_nll=1.0, stopped_at=30)),
        ([1.0, 2.0], 1, Stopping(best_step=10, best_nll=1.0, stopped_at=20)),
    ],
)
def test_stopping(nlls: list[float], patience: int, expected: Stopping) -> None:
    assert stopping(entries(nlls), patience) == expected


def test_stopping_against_its_definition() -> None:
    """It stops at the first n such that the earliest minimum of the first n lies ``patience`` evaluations back."""
    source = random.Random(0)
    for _ in range(300):
        nlls = [float(source.randrange(6)) for _ in range(source.randrange(1, 12))]
        patience = source.randrange(1, 5)
        seen, stopped = len(nlls), None
        for n in range(1, len(nlls) + 1):
            if n - 1 - nlls[:n].index(min(nlls[:n])) >= patience:
                seen, stopped = n, 10 * n
                break
        best = min(nlls[:seen])
        expected = Stopping(best_step=10 * (nlls.index(best) + 1), best_nll=best, stopped_at=stopped)
        assert stopping(entries(nlls), patience) == expected


WORSE_AFTER_FOUR = {2: 1.0, 4: 0.5, 6: 0.6, 8: 0.7}
STOPPABLE = [
    "map",
    "monteclora",
    "ivon",
    "melora",
    "blob",
    "mcdropout",
    "laplace",
    "tfb",
    "ensemble",
    "ensemble of ivon",
]


@pytest.mark.parametrize("name", STOPPABLE)
def test_the_best_step_is_kept(
    name: str,
    base: Path,
    train_file: Path,
    validation_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a constant learning rate the adapter of the best step is that of a run of so many steps."""
    method, short = config_of(name, *STEADY[:2], "train.max_steps=4", "train.eval_samples=0")
    expected = train(base, train_file, validation_file, method, tmp_path / "short", short, 3)
    script(monkeypatch, WORSE_AFTER_FOUR)
    watch = ("train.eval_steps=2", "train.early_stopping=2", "train.logging_steps=1")
    method, config = config_of(name, *STEADY[:2], "train.max_steps=20", *watch)
    result = train(base, train_file, validation_file, method, tmp_path / "out", config, 3)
    assert tensors_of(result) == tensors_of(expected)
    assert result.metrics["release"] == expected.metrics["release"]
    record = result.metrics["train"]
    assert (record["stopped_at"], record["best_step"], record["best_nll"], record["steps"]) == (8, 4, 0.5, 8)
    assert [entry["step"] for entry in record["curve"]] == list(range(1, 9))
    assert not checkpoint_folder(tmp_path / "out").exists()


def test_the_best_step_is_kept_without_an_early_end(
    base: Path, train_file: Path, validation_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, WORSE_AFTER_FOUR)
    config = quick_config("ivon", *STEADY, "train.eval_steps=2", "train.early_stopping=3")
    result = train(base, train_file, validation_file, "ivon", tmp_path / "out", config)
    record = result.metrics["train"]
    assert (record["stopped_at"], record["best_step"], record["steps"]) == (None, 4, 8)
    card = (result.path / "README.md").read_text()
    assert "8 optimiser steps of which the adapter after step 4 is kept (lowest validation NLL), seed 0" in card
    short = quick_config("ivon", *STEADY[:2], "train.max_steps=4")
    assert tensors_of(result) == tensors_of(train(base, train_file, None, "ivon", tmp_path / "short", short))


@pytest.mark.parametrize(("save_steps", "cut"), [(2, 3), (2, 5), (2, 7), (3, 4), (3, 5), (5, 6), (6, 7), (1, 7)])
def test_a_resumed_run_stops_at_the_same_step(
    save_steps: int,
    cut: int,
    base: Path,
    train_file: Path,
    validation_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The best step lies before, at or after the checkpoint that the run goes on from."""
    asked = script(monkeypatch, WORSE_AFTER_FOUR)
    options = ("train.max_steps=20", "train.eval_steps=2", "train.early_stopping=2", f"train.save_steps={save_steps}")
    config = quick_config("ivon", *options, "lora.dropout=0.2")
    whole = train(base, train_file, validation_file, "ivon", tmp_path / "whole", config, 5)
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        train(base, train_file, validation_file, "ivon", tmp_path / "cut", config, 5, callbacks=[StopAfter(cut)])
    last = save_steps * (cut // save_steps)
    resumed = train(base, train_file, validation_file, "ivon", tmp_path / "cut", config, 5, True)
    assert resumed.digest == whole.digest
    before, after = [step for step in (2, 4, 6, 8) if step <= cut], [step for step in (2, 4, 6, 8) if step > last]
    assert asked == [*before, *after]  # those of before the checkpoint are remembered, not repeated


@pytest.mark.parametrize("name", ["monteclora", "ivon", "swag", "ensemble", "checkpoints"])
def test_a_resumed_run_has_the_same_evaluations(
    name: str, base: Path, train_file: Path, validation_file: Path, tmp_path: Path
) -> None:
    method, config = config_of(
        name, "train.max_steps=6", "train.eval_steps=1", "train.save_steps=2", "lora.dropout=0.2"
    )
    whole = train(base, train_file, validation_file, method, tmp_path / "whole", config, 5)
    with pytest.raises(KeyboardInterrupt):
        train(base, train_file, validation_file, method, tmp_path / "cut", config, 5, callbacks=[StopAfter(5)])
    torch.manual_seed(99)
    resumed = train(base, train_file, validation_file, method, tmp_path / "cut", config, 5, True)
    assert len(whole.metrics["train"]["evaluations"]) >= 6
    assert resumed.digest == whole.digest


@pytest.mark.parametrize("save_steps", [3, 4])
def test_a_stopped_run_that_could_not_be_written_is_not_trained_further(
    save_steps: int,
    base: Path,
    train_file: Path,
    validation_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    asked = script(monkeypatch, WORSE_AFTER_FOUR)
    options = ("train.max_steps=20", "train.eval_steps=2", "train.early_stopping=2", f"train.save_steps={save_steps}")
    config = quick_config("ivon", *options)
    whole = train(base, train_file, validation_file, "ivon", tmp_path / "whole", config)
    with monkeypatch.context() as patch:
        patch.setattr("credence.training.loop.write_artifact", fail)
        with pytest.raises(OSError, match="disk full"):
            train(base, train_file, validation_file, "ivon", tmp_path / "out", config)
    kept = sorted(path.name for path in checkpoint_folder(tmp_path / "out").glob("best-*"))
    assert kept == ["best-4"]
    asked.clear()
    resumed = train(base, train_file, validation_file, "ivon", tmp_path / "out", config, 0, True)
    assert asked == [] and resumed.seconds < 1
    assert resumed.digest == whole.digest


def test_a_lost_best_adapter_is_an_error(
    base: Path, train_file: Path, validation_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, WORSE_AFTER_FOUR)
    options = ("train.max_steps=20", "train.eval_steps=2", "train.early_stopping=2", "train.save_steps=2")
    config = quick_config("map", *options)
    with pytest.raises(KeyboardInterrupt):
        train(base, train_file, validation_file, "map", tmp_path / "out", config, callbacks=[StopAfter(6)])
    (checkpoint_folder(tmp_path / "out") / "best-4").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"best-4 is missing; .*delete .* to start again"):
        train(base, train_file, validation_file, "map", tmp_path / "out", config, 0, True)
    assert not (tmp_path / "out").exists()


def test_an_earlier_checkpoint_still_finds_its_best_adapter(
    base: Path, train_file: Path, validation_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 4 was better than step 2, but is not when it is repeated from the checkpoint of step 3, as on a machine that rounds anew."""
    options = ("train.max_steps=20", "train.eval_steps=2", "train.early_stopping=2", "train.save_steps=3")
    config = quick_config("ivon", *STEADY[:2], *options)
    script(monkeypatch, {2: 0.5, 4: 0.4})
    with pytest.raises(KeyboardInterrupt):
        train(base, train_file, validation_file, "ivon", tmp_path / "out", config, callbacks=[StopAfter(5)])
    script(monkeypatch, {4: 0.6, 6: 0.7})
    result = train(base, train_file, validation_file, "ivon", tmp_path / "out", config, 0, True)
    assert (result.metrics["train"]["best_step"], result.metrics["train"]["stopped_at"]) == (2, 6)
    short = quick_config("ivon", *STEADY[:2], "train.max_steps=2")
    assert tensors_of(result) == tensors_of(train(base, train_file, None, "ivon", tmp_path / "short", short))


def test_superseded_adapters_are_removed(
    base: Path, train_file: Path, validation_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two checkpoints are kept, of steps 6 and 8; step 10 is a new best."""
    nlls = {step: 1.0 / step for step in range(1, 12)}
    script(monkeypatch, nlls)
    options = ("train.max_steps=20", "train.eval_steps=1", "train.early_stopping=2", "train.save_steps=2")
    config = quick_config("map", *options)
    with pytest.raises(KeyboardInterrupt):
        train(base, train_file, validation_file, "map", tmp_path / "out", config, callbacks=[StopAfter(9)])
    kept = sorted(path.name for path in checkpoint_folder(tmp_path / "out").glob("best-*"))
    assert kept == ["best-6", "best-8", "best-9"]


def test_the_method_goes_back_to_the_best_step_too(
    base: Path, train_file: Path, validation_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method with a state of its own beside parameters and optimiser."""
    restored: list[int] = []
    monkeypatch.setattr(Map, "end_step", lambda self, step: setattr(self, "counted", step))
    monkeypatch.setattr(Map, "state", lambda self: {"counted": torch.tensor(getattr(self, "counted", 0))})
    monkeypatch.setattr(Map, "load_state", lambda self, state: restored.append(int(state["counted"])))
    script(monkeypatch, WORSE_AFTER_FOUR)
    config = quick_config("map", "train.max_steps=20", "train.eval_steps=2", "train.early_stopping=2")
    train(base, train_file, validation_file, "map", tmp_path / "out", config)
    assert restored == [4]


def test_two_processes_stop_together(base: Path, write: Write, tmp_path: Path) -> None:
    """The validation rows are labelled wrongly, so that they become less likely while the training rows are learned."""
    data = write("train.jsonl", label_rows(24))
    wrong = {"dog": "cat", "cat": "bird", "bird": "dog"}
    held_out = write("wrong.jsonl", [{**row, "label": wrong[row["label"]]} for row in label_rows(12, start=24)])
    options = [
        *QUICK, "train.max_steps=40", "train.learning_rate=0.02", "train.eval_steps=2", "train.early_stopping=3",
        "train.logging_steps=1", "lora.dropout=0",
    ]  # fmt: skip
    job = {
        "name": "stop", "method": "map", "base": str(base), "data": str(data), "validation": str(held_out),
        "output": str(tmp_path / "two"), "options": [*options, "train.batch_size=2"], "port": free_ports(1)[0],
    }  # fmt: skip
    (tmp_path / "jobs.json").write_text(json.dumps([job]))
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.data_parallel", str(tmp_path / "jobs.json"), str(rank), "2"],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    seen = [torch.load(f"{tmp_path}/two.stop.rank{rank}.pt", weights_only=False) for rank in (0, 1)]
    assert "error" not in seen[0] and "error" not in seen[1], seen
    assert seen[0]["digest"] == seen[1]["digest"]
    record = seen[0]["metrics"]["train"]
    assert record["stopped_at"] == record["steps"] == record["best_step"] + 6 < 40
    assert errors[0].count("validation: mean:") == len(record["evaluations"]) and "validation:" not in errors[1]
    one = train(base, data, held_out, "map", tmp_path / "one", load_config(None, options), 5)
    expected = one.metrics["train"]
    assert (record["stopped_at"], record["best_step"]) == (expected["stopped_at"], expected["best_step"])
    for entry, alone in zip(record["evaluations"], expected["evaluations"], strict=True):
        assert entry["nll"] == pytest.approx(alone["nll"], rel=1e-3)
    text = (tmp_path / "two" / "config.yaml").read_text()
    assert text.startswith("# torchrun --nproc-per-node 2 -m credence.cli.main train --base")


@pytest.mark.parametrize(
    ("method", "overrides", "key", "message"),
    [
        ("map", ["train.early_stopping=2"], "train.early_stopping", "train.eval_steps 0, so nothing is evaluated"),
        ("ivon", ["train.eval_samples=2"], "train.eval_samples", "train.eval_steps 0, so nothing is evaluated"),
        ("map", ["train.eval_steps=2", "train.eval_samples=2"], "train.eval_samples", "map has no posterior"),
        ("swa", ["train.eval_steps=2", "train.eval_samples=2"], "train.eval_samples", "swa has no posterior"),
        (
            "laplace",
            ["train.eval_steps=2", "train.eval_samples=2"],
            "train.eval_samples",
            "laplace makes its posterior after",
        ),
        ("tfb", ["train.eval_steps=2", "train.eval_samples=2"], "train.eval_samples", "tfb makes its posterior after"),
        (
            "swa",
            ["train.eval_steps=2", "train.early_stopping=2"],
            "train.early_stopping",
            "this swa is made of the iterates",
        ),
        ("swag", ["train.eval_steps=2", "train.early_stopping=2"], "train.early_stopping", "this swag is made of"),
        (
            "ensemble",
            ["method.source=checkpoints", "train.eval_steps=2", "train.early_stopping=2"],
            "train.early_stopping",
            "this ensemble is made of the iterates",
        ),
        (
            "ensemble",
            ["method.member=swag", "train.eval_steps=2", "train.early_stopping=2"],
            "train.early_stopping",
            "this ensemble is made of the iterates",
        ),
        ("map", ["train.eval_steps=5", "train.early_stopping=2"], "train.eval_steps", "the run has 4 steps"),
        (
            "map",
            ["train.max_steps=null", "train.epochs=1", "train.eval_steps=7", "train.early_stopping=2"],
            "train.eval_steps",
            "the run has 6 steps",
        ),
    ],
)
def test_refusals(
    method: str,
    overrides: list[str],
    key: str,
    message: str,
    base: Path,
    train_file: Path,
    validation_file: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        train(base, train_file, validation_file, method, tmp_path / "out", quick_config(method, *overrides))
    assert caught.value.key == key
    assert not (tmp_path / "out").exists()


def test_evaluations_need_validation_rows(base: Path, train_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are no validation rows; give a validation file"):
        train(base, train_file, None, "map", tmp_path / "out", quick_config("map", "train.eval_steps=2"))


def test_an_nll_that_is_not_finite_ends_the_run(
    base: Path, train_file: Path, validation_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitoring, "measure", lambda *_: (float("nan"), 0.0))
    with pytest.raises(TrainingError, match=r"validation NLL is nan at optimiser step 2 \(mean:\)"):
        config = quick_config("map", "train.eval_steps=2")
        train(base, train_file, validation_file, "map", tmp_path / "out", config)


def test_progress_shows_the_evaluations(
    base: Path, train_file: Path, validation_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = quick_config("ivon", "train.eval_steps=2", "train.eval_samples=3")
    result = train(base, train_file, validation_file, "ivon", tmp_path / "out", config)
    mean, average = result.metrics["train"]["evaluations"][:2]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert (
        f"step 2/4  validation: mean: NLL {mean['nll']:.4f}, accuracy {mean['accuracy']:.3f}; "
        f"K = 3, tau 1: NLL {average['nll']:.4f}, accuracy {average['accuracy']:.3f}\n" in captured.err
    )


def test_tensorboard(base: Path, train_file: Path, validation_file: Path, tmp_path: Path) -> None:
    """Losses, learning rates and evaluations of an interrupted and resumed run, each step once; the artifact does not know of it."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = ("train.logging_steps=1", "train.eval_steps=2", "train.eval_samples=3", "train.save_steps=2")
    config = quick_config("ivon", *options, f"train.tensorboard={tmp_path / 'board'}")
    with pytest.raises(KeyboardInterrupt):
        train(base, train_file, validation_file, "ivon", tmp_path / "out", config, callbacks=[StopAfter(3)])
    result = train(base, train_file, validation_file, "ivon", tmp_path / "out", config, 0, True)
    board = events.EventAccumulator(str(tmp_path / "board"))
    board.Reload()

    def series(tag: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in board.Scalars(tag)]

    curve = [(int(entry["step"]), pytest.approx(entry["loss"], rel=1e-6)) for entry in result.metrics["train"]["curve"]]
    assert series("train/loss") == curve and len(curve) == 4
    assert [step for step, _ in series("train/learning_rate")] == [1, 2, 3, 4]
    found = result.metrics["train"]["evaluations"]
    for k, suffix in ((0, ""), (3, "_k3")):
        for name in ("nll", "accuracy"):
            expected = [(e["step"], pytest.approx(e[name], rel=1e-6)) for e in found if e["k"] == k]
            assert series(f"validation/{name}{suffix}") == expected and len(expected) == 2
    plain = quick_config("ivon", *options)
    assert train(base, train_file, validation_file, "ivon", tmp_path / "plain", plain).digest == result.digest


def test_tensorboard_that_is_not_installed(
    base: Path, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"cannot be imported .*pip install tensorboard") as caught:
        config = quick_config("map", f"train.tensorboard={tmp_path / 'board'}")
        train(base, train_file, None, "map", tmp_path / "out", config)
    assert caught.value.key == "train.tensorboard"


@pytest.mark.parametrize("method", ["map", "monteclora", "ivon", "swag", "ensemble", "tfb"])
def test_a_run_repeats_from_its_config(
    method: str, base: Path, train_file: Path, validation_file: Path, tmp_path: Path
) -> None:
    """The first run leaves learning rate, length and more to defaults; its file leaves nothing, and repeats itself exactly."""
    given = [
        option for option in [*QUICK, *METHOD_OPTIONS[method]] if not option.startswith(("train.l", "train.max_s"))
    ]
    first = train(base, train_file, validation_file, method, tmp_path / "a", load_config(None, given), 5)
    config = load_config(first.path / "config.yaml")
    second = train(base, train_file, validation_file, method, tmp_path / "b", config, 5)
    assert tensors_of(second) == tensors_of(first)
    assert second.metrics == first.metrics
    third = train(
        base, train_file, validation_file, method, tmp_path / "c", load_config(second.path / "config.yaml"), 5
    )
    assert third.digest == second.digest
    document = yaml.safe_load((first.path / "config.yaml").read_text())
    allowed_null = {"max_steps", "init", "quantization", "head_learning_rate"}
    for section in ("lora", "train", "data", "release"):
        expected = set(type(getattr(config, section)).model_fields) - {"tensorboard"}
        assert set(document[section]) == expected
        assert {key for key, value in document[section].items() if value is None} <= allowed_null
    assert document["train"]["epochs"] == 3.0 and document["train"]["max_length"] == 128
    text = (first.path / "config.yaml").read_text()
    training = load_artifact(first.path).config.training
    assert text.startswith(
        f"# credence train --base {base.name} --data train.jsonl --validation validation.jsonl --method {method} --config config.yaml "
        "--seed 5 --output DIR\n"
    )
    for record in (training["data"], training["validation"]):
        assert f": {record['file']}, sha256 {record['sha256']}\n" in text
    for name in ("torch", "transformers", "peft", "credence"):
        assert f"{name} " in text
    assert f"# method: {method}, seed 5\n" in text and str(tmp_path) not in text


def test_the_config_of_a_run_from_an_adapter(base: Path, train_file: Path, tmp_path: Path) -> None:
    start = train(base, train_file, None, "map", tmp_path / "start", quick_config("map"))
    options = ["train.max_steps=2", f"lora.init={start.path}"]
    first = train(base, train_file, None, "ivon", tmp_path / "a", load_config(None, [*options, "train.batch_size=4"]))
    text = (first.path / "config.yaml").read_text()
    assert f"# lora.init: a folder called start, {start.digest}; give its path with --set lora.init=DIR\n" in text
    assert "--validation" not in text
    config = load_config(first.path / "config.yaml", [f"lora.init={start.path}"])
    assert tensors_of(train(base, train_file, None, "ivon", tmp_path / "b", config)) == tensors_of(first)


def test_a_file_name_cannot_leave_its_comment(base: Path, write: Write, tmp_path: Path) -> None:
    data = write("a\ntrain: {max_steps: 0}\u2028b.jsonl", label_rows(12))
    result = train(base, data, None, "map", tmp_path / "out", quick_config("map"))
    assert load_config(result.path / "config.yaml").train.max_steps == 4


def test_a_release_keeps_the_config(base: Path, train_file: Path, validation_file: Path, tmp_path: Path) -> None:
    result = train(base, train_file, None, "ivon", tmp_path / "out", quick_config("ivon"))
    text = (result.path / "config.yaml").read_text()
    config = load_config(result.path / "config.yaml")
    release(result.path, base, validation_file, config.release)
    assert (result.path / "config.yaml").read_text() == text
    assert load_artifact(result.path).run_config == text

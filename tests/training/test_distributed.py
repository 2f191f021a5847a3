"""Data parallel training: two real processes against one with twice the batch."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from credence.adapters import load_artifact
from credence.training.checkpoint import checkpoint_folder
from credence.training.config import load_config
from credence.training.distributed import Processes, joined_processes
from credence.training.errors import TrainingError
from credence.training.loop import train
from credence.training.modeling import LoraSite
from tests.training.conftest import label_rows
from tests.training.test_loop import flat

ROOT = Path(__file__).parents[2]
COMMON = ["train.max_steps=4", "lora.r=4", "lora.alpha=8", "train.logging_steps=1", "train.save_steps=0"]
ADAM = "train.learning_rate=0.01"
IVON = ["train.learning_rate=1", "method.ess=1e5", "method.hess_init=1e-2", "method.beta2=0.99"]
CASES: dict[str, tuple[str, list[str]]] = {
    "map": ("map", [ADAM, "train.max_grad_norm=0.05"]),
    "monteclora": ("monteclora", [ADAM, "method.epsilon=0.05", "method.kl_weight=0.1"]),
    "ivon": ("ivon", IVON),
    "melora": ("melora", [ADAM, "method.initial_sd=0.1", "method.kl_weight=0.01"]),
    "blob": ("blob", [ADAM, "method.initial_sd=0.05", "method.kl_weight=0.01", "method.flipout=true"]),
    "swag": ("swag", [ADAM, "method.start=0", "method.interval=1"]),
    "laplace": ("laplace", [ADAM, "method.fisher=empirical"]),
    "ensemble": ("ensemble", [ADAM, "method.members=3", "method.member=monteclora", "train.max_grad_norm=0.05"]),
    "accumulation": ("monteclora", [ADAM, "method.epsilon=0.05", "train.gradient_accumulation=3"]),
}
"""By name the method and its options. Two processes take 3 rows each of 13: batches of 6, 6 and 1 row, of which the second process has 3, 3
and 0."""


def rows() -> list[dict[str, str]]:
    """13 rows whose completions differ in length, so that processes have different numbers of target tokens."""
    return [{"prompt": f"say {i} ", "completion": "abcdefghij"[: 1 + (i * 7) % 10]} for i in range(13)]


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def write_rows(path: Path, content: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


class Outcome:
    """What two processes left behind."""

    def __init__(self, folder: Path, data: Path, errors: list[str]) -> None:
        self.folder = folder
        self.data = data
        self.errors = errors

    def of(self, name: str, output: str | None = None) -> list[dict[str, Any]]:
        """Each process's record of a job."""
        files = [self.folder / f"{output or name}.{name}.rank{rank}.pt" for rank in (0, 1)]
        return [torch.load(file, weights_only=False) for file in files]


@pytest.fixture(scope="module")
def two(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    """All jobs, in one pair of processes: starting one costs more than the training."""
    folder = tmp_path_factory.mktemp("two")
    data = write_rows(folder / "train.jsonl", rows())
    labels = write_rows(folder / "labels.jsonl", label_rows(13))
    held_out = write_rows(folder / "validation.jsonl", label_rows(12, start=24))
    common = [*COMMON, "train.batch_size=3"]
    jobs: list[dict[str, Any]] = [
        {"name": name, "method": method, "options": [*common, *options]} for name, (method, options) in CASES.items()
    ]
    dropout = [*common, ADAM, "lora.dropout=0.3", "train.save_steps=2"]
    released = ["release.ks=[2]", "release.taus=[1]"]
    jobs += [
        {"name": "mcdropout", "method": "mcdropout", "options": dropout},
        {"name": "cut", "method": "mcdropout", "options": dropout, "output": "resumed", "fault": "raise:3:all"},
        {"name": "resumed", "method": "mcdropout", "options": dropout, "output": "resumed", "resume": True},
        {"name": "raise0", "method": "map", "options": common, "fault": "raise:2:0"},
        {"name": "raise1", "method": "map", "options": common, "fault": "raise:2:1"},
        {"name": "change", "method": "map", "options": common, "fault": "change:3:1"},
        {"name": "exists", "method": "map", "options": common, "output": "map"},
        {
            "name": "release", "method": "ivon", "options": [*common, *IVON, *released],
            "data": str(labels), "validation": str(held_out),
        },
    ]  # fmt: skip
    for job, port in zip(jobs, free_ports(len(jobs)), strict=True):
        job.setdefault("data", str(data))
        job["output"] = str(folder / job.get("output", job["name"]))
        job.update(base=str(base), port=port)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.data_parallel", str(folder / "jobs.json"), str(rank), "2"],
            cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=540)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    yield Outcome(folder, data, errors)


@pytest.mark.parametrize("case", list(CASES))
def test_two_processes_are_one_with_twice_the_batch(case: str, two: Outcome, base: Path, tmp_path: Path) -> None:
    method, options = CASES[case]
    config = load_config(None, [*COMMON, "train.batch_size=6", *options])
    one = train(base, two.data, None, method, tmp_path / "one", config, 5)
    expected, got = load_artifact(one.path), load_artifact(two.folder / case)
    assert got.config.training["processes"] == 2 and "processes" not in expected.config.training
    losses = [[entry["loss"] for entry in a.metrics["train"]["curve"]] for a in (expected, got)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    close = {"rtol": 1e-3, "atol": 2e-5}
    for name, mean in expected.mean.items():
        torch.testing.assert_close(got.mean[name].A, mean.A, **close)
        torch.testing.assert_close(got.mean[name].B, mean.B, **close)
        assert float(mean.B.abs().max()) > 1e-3
        tensors = got.posteriors[name].tensors()
        for key, tensor in expected.posteriors[name].tensors().items():
            if "vectors" in key:  # of unknown sign
                tensor, tensors[key] = tensor.abs(), tensors[key].abs()
            torch.testing.assert_close(tensors[key], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", [*CASES, "mcdropout", "resumed", "release"])
def test_all_processes_end_equal(case: str, two: Outcome) -> None:
    first, second = two.of(case)
    assert "error" not in first
    assert first["digest"] == second["digest"] == load_artifact(two.folder / case).digest
    assert first["metrics"] == second["metrics"]
    for key in ("parameters", "optimizer"):
        mine, theirs = flat(first[key]), flat(second[key])
        assert mine.keys() == theirs.keys() and mine
        for name, value in mine.items():
            same = torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor) else value == theirs[name]
            assert same, name
    assert not checkpoint_folder(two.folder / case).exists()


def test_dropout_differs_between_processes_and_resumes(two: Outcome) -> None:
    first, second = two.of("mcdropout")
    assert not torch.equal(first["random"], second["random"])
    assert all("out of memory here" in record["error"] for record in two.of("cut", "resumed"))
    assert two.of("resumed")[0]["digest"] == first["digest"]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_one_process_ends_all(rank: int, two: Outcome) -> None:
    records = two.of(f"raise{rank}")
    assert records[rank]["error"] == "RuntimeError: out of memory here"
    assert records[1 - rank]["error"].startswith("TrainingError: another process of the run ended")
    assert f"process {rank} of 2 ends: RuntimeError: out of memory here" in two.errors[rank]
    assert not (two.folder / f"raise{rank}").exists()


def test_processes_that_differ_write_nothing(two: Outcome) -> None:
    assert all("the 2 processes hold different adapters" in record["error"] for record in two.of("change"))
    assert not (two.folder / "change").exists()


def test_a_refusal_of_the_first_process_reaches_all(two: Outcome) -> None:
    first, second = two.of("exists", "map")
    assert first["error"].startswith("CheckpointError") and "exists; choose another --output" in first["error"]
    assert second["error"].startswith("TrainingError: another process of the run ended")


def test_only_the_first_process_reports(two: Outcome) -> None:
    assert "step 4/4  loss" in two.errors[0] and "held-out NLL" in two.errors[0]
    assert "loss " not in two.errors[1] and "held-out" not in two.errors[1]


def test_torchrun(base: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "train.jsonl", rows())
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_ports(1)[0]),
        "-m", "credence.cli.main", "train", "--base", str(base), "--data", str(data), "--method", "map",
        "--output", str(tmp_path / "out"), "--set", "train.max_steps=3", "--set", "train.batch_size=3", "--json", "-",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["digest"] == load_artifact(tmp_path / "out").digest  # printed once


def test_incomplete_variables_of_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(TrainingError, match="WORLD_SIZE is 2 and LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"):
        with joined_processes():
            pass


def test_shares_and_places() -> None:
    items = list(range(7))
    assert [list(Processes(rank, 3).share(items, 3)) for rank in range(3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(Processes(1, 2).share([1], 3)) == []
    calls = []

    def signs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(count)
        return torch.arange(count), torch.arange(count)

    site = LoraSite("m", None, row_signs=signs)
    Processes(2, 3).place_signs([site], 4)
    assert site.row_signs is not None
    assert site.row_signs(2)[0].tolist() == [8, 9] and calls == [10]

"""The artifact on disk: what is written is read back, PEFT reads the mean, and whatever is wrong is refused by name and kept nowhere."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from credence.adapters import (
    Artifact,
    ArtifactError,
    BaseModelRef,
    Calibration,
    DiagPosterior,
    Fit,
    LoraFactors,
    LowRankPosterior,
    PointPosterior,
    Posterior,
    PosteriorConfig,
    PosteriorError,
    RowPosterior,
    load_artifact,
    write_artifact,
    write_sample,
)
from credence.adapters.artifact import peft_tensors
from tests.corrupted import describe, edit_json, edit_tensors, write_manifest

RANK, ALPHA = 3, 4.5
FIRST, SECOND = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
PREFIX = "base_model.model."
ROW_SETTINGS = {"epsilon": 0.3, "dof": 3.0, "floor": 1e-3}
WEIGHTS = ("adapter_model.safetensors", "posterior.safetensors")
REQUIRED = ("adapter_config.json", "posterior.json", *WEIGHTS)
EVERY_FILE = (*REQUIRED, "calibration.json", "metrics.json", "README.md", "config.yaml")


def parts(kind: str = "diag", seed: int = 0) -> dict[str, Any]:
    """Arguments of write_artifact for two modules of different shapes."""
    generator = torch.Generator().manual_seed(seed)
    mean: dict[str, LoraFactors] = {}
    posteriors: dict[str, Posterior] = {}
    for module, n_in, n_out in ((FIRST, 5, 7), (SECOND, 6, 4)):
        A, B = torch.randn(RANK, n_in, generator=generator), torch.randn(n_out, RANK, generator=generator)
        mean[module] = LoraFactors(A=A, B=B)
        if kind == "diag":
            posteriors[module] = DiagPosterior(log_sd_A=A * 0.1 - 1, log_sd_B=B * 0.1 - 1)
        elif kind == "row":
            posteriors[module] = RowPosterior(
                rho=torch.randn(RANK, generator=generator), beta=torch.randn(4, generator=generator), **ROW_SETTINGS
            )
        elif kind == "lowrank":
            posteriors[module] = LowRankPosterior(
                log_sd=torch.randn(RANK * (n_in + n_out), generator=generator),
                deviations=torch.randn(4, RANK * (n_in + n_out), generator=generator),
            )
        else:
            posteriors[module] = PointPosterior()
    return {
        "adapter_config": {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj"]},
        "mean": mean,
        "posteriors": posteriors,
        "config": PosteriorConfig(
            kind=kind,  # type: ignore[arg-type]
            method="test",
            credence_version="0",
            base_model=BaseModelRef(name="base", revision="main"),
            rank=RANK,
            lora_alpha=ALPHA,
            target_modules=("q_proj",),
            settings=ROW_SETTINGS if kind == "row" else {},
            tau={8: Fit(value=0.5, nll=0.25)},
            training={"seed": 1},
        ),
        "calibration": Calibration(temperature={0: Fit(value=1.5, nll=0.5)}),
        "metrics": {"accuracy": 0.75},
        "card": "# A card\n",
        "run_config": "# à la main\nlora: {r: 3}\n",
    }


def write(path: Path, kind: str = "diag", **changes: Any) -> str:
    return write_artifact(path, **{**parts(kind), **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid artifact with every optional file."""
    write(tmp_path / "artifact")
    return tmp_path / "artifact"


def refused(folder: Path, reason: str, message: str, *, max_bytes: int = 2**30) -> None:
    """The artifact is refused with this reason and message, and the store holds nothing of it."""
    store = folder.parent / "store"
    with pytest.raises(ArtifactError, match=message) as caught:
        load_artifact(folder, store=store, max_bytes=max_bytes)
    assert caught.value.reason == reason
    assert str(folder) in caught.value.path
    assert not store.exists() or list(store.iterdir()) == []


def same_factors(a: dict[str, LoraFactors], b: dict[str, LoraFactors]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[m].A, b[m].A) and torch.equal(a[m].B, b[m].B) for m in a)


# --- writing and reading ---


@pytest.mark.parametrize("kind", ["diag", "row", "lowrank", "point"])
def test_round_trip(tmp_path: Path, kind: str) -> None:
    given = parts(kind)
    digest = write_artifact(tmp_path / "a", **given)
    artifact = load_artifact(tmp_path / "a")
    assert artifact.digest == digest
    assert digest == "sha256:" + hashlib.sha256((tmp_path / "a/manifest.json").read_bytes()).hexdigest()
    assert artifact.path == tmp_path / "a"
    assert same_factors(artifact.mean, given["mean"])
    for module, posterior in given["posteriors"].items():
        read = artifact.posteriors[module].tensors()
        assert set(read) == set(posterior.tensors())
        assert all(torch.equal(read[name], tensor) for name, tensor in posterior.tensors().items())
    assert artifact.config == given["config"]
    assert artifact.adapter_config == given["adapter_config"]
    assert artifact.calibration == given["calibration"]
    assert artifact.metrics == given["metrics"]
    assert (tmp_path / "a/README.md").read_text() == given["card"]
    assert (tmp_path / "a/config.yaml").read_text() == artifact.run_config == given["run_config"]
    assert artifact.has_posterior == (kind != "point")


def test_optional_files_may_be_absent(tmp_path: Path) -> None:
    write(tmp_path / "a", calibration=None, metrics=None, card=None, run_config=None)
    artifact = load_artifact(tmp_path / "a")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted([*REQUIRED, "manifest.json"])
    assert artifact.calibration == Calibration() and artifact.metrics == {} and artifact.run_config is None


def test_one_sided_noise_round_trips(tmp_path: Path) -> None:
    given = parts()
    given["posteriors"] = {m: DiagPosterior(log_sd_A=torch.zeros_like(f.A)) for m, f in given["mean"].items()}
    write_artifact(tmp_path / "a", **given)
    assert load_artifact(tmp_path / "a").posteriors[FIRST].tensors().keys() == {"log_sd_A"}


def test_whatever_holds_the_tensors_float32_is_stored(tmp_path: Path) -> None:
    """Parameters with gradients, transposed views, bfloat16 and tensors that share memory."""
    given = parts()
    A = torch.nn.Parameter(torch.randn(5, RANK)).t()
    given["mean"][FIRST] = LoraFactors(A=A, B=torch.randn(7, RANK).bfloat16())
    shared = torch.full((RANK, 5), -1.0)
    given["posteriors"][FIRST] = DiagPosterior(log_sd_A=shared)
    write_artifact(tmp_path / "a", **given)
    artifact = load_artifact(tmp_path / "a")
    assert torch.equal(artifact.mean[FIRST].A, A) and torch.equal(
        artifact.mean[FIRST].B, given["mean"][FIRST].B.float()
    )
    assert all(tensor.dtype == torch.float32 for tensor in load_file(tmp_path / "a/adapter_model.safetensors").values())


def test_equal_content_has_an_equal_digest_and_any_change_another(tmp_path: Path) -> None:
    digest = write(tmp_path / "a")
    assert write(tmp_path / "b") == digest
    given = parts()
    nudged = {**given["mean"], FIRST: LoraFactors(A=given["mean"][FIRST].A.clone(), B=given["mean"][FIRST].B)}
    nudged[FIRST].A[0, 0] = torch.nextafter(nudged[FIRST].A[0, 0], torch.tensor(9.0))
    changes: list[dict[str, Any]] = [
        {"mean": nudged},
        {"posteriors": parts(seed=1)["posteriors"]},
        {"adapter_config": {**given["adapter_config"], "lora_dropout": 0.1}},
        {"config": given["config"].model_copy(update={"default_seed": 1})},
        {"calibration": Calibration()},
        {"calibration": None},
        {"metrics": {"accuracy": 0.5}},
        {"card": "# Another card\n"},
    ]
    digests = {write(tmp_path / str(index), **change) for index, change in enumerate(changes)}
    assert len(digests | {digest}) == len(changes) + 1


def test_unlisted_files_are_ignored_and_not_kept(folder: Path) -> None:
    """An editor's backup or a Git folder beside the files is no part of the artifact."""
    before = load_artifact(folder).digest
    (folder / "README.md~").write_bytes(b"# An older card")
    (folder / ".git").mkdir()
    (folder / "signature.json").write_text("{}")
    artifact = load_artifact(folder, store=folder.parent / "store")
    assert artifact.digest == before
    assert sorted(path.name for path in artifact.path.iterdir()) == sorted([*EVERY_FILE, "manifest.json"])


@pytest.mark.parametrize("name", ["adapter_model.bin", "training_args.PT", "model.safetensors", "modeling.py"])
def test_unlisted_files_that_some_tool_would_load_are_refused(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")
    refused(folder, "unsupported", f"holds {name}, which manifest.json does not list")


@pytest.mark.parametrize("name", ["calibration.json", "metrics.json", "config.yaml"])
def test_a_known_file_that_the_manifest_does_not_list_is_refused(folder: Path, name: str) -> None:
    """Whoever looks into the folder would think that it counts."""
    document = json.loads((folder / "manifest.json").read_text())
    del document["files"][name]
    (folder / "manifest.json").write_text(json.dumps(document))
    refused(folder, "unsupported", f"holds {name}, which manifest.json does not list")


HEAD = {"classifier.dense.weight": torch.eye(3), "classifier.dense.bias": torch.ones(3)}


def with_head(path: Path, head: dict[str, torch.Tensor] | None = None, task: str | None = "SEQ_CLS") -> str:
    adapter_config = {**parts()["adapter_config"], "task_type": task}
    return write(path, adapter_config=adapter_config, head=HEAD if head is None else head)


def test_a_classification_head_round_trips(tmp_path: Path) -> None:
    digest = with_head(tmp_path / "a", {name: tensor.double() for name, tensor in HEAD.items()})
    artifact = load_artifact(tmp_path / "a", store=tmp_path / "store")
    assert artifact.digest == digest and artifact.head.keys() == HEAD.keys()
    assert all(torch.equal(artifact.head[n], t) and artifact.head[n].dtype == t.dtype for n, t in HEAD.items())
    assert (artifact.path / "head.safetensors").is_file(), "the copy in the store is complete"
    assert with_head(tmp_path / "b", {n: t + 1e-6 for n, t in HEAD.items()}) != digest
    assert load_artifact(tmp_path / "a").head.keys() == HEAD.keys()


def test_an_adapter_has_a_head_exactly_if_it_classifies(folder: Path, tmp_path: Path) -> None:
    assert load_artifact(folder).head == {} and not (folder / "head.safetensors").exists()
    for task in (None, "CAUSAL_LM"):
        with pytest.raises(ArtifactError, match=f"task_type {task!r} and there is a head.safetensors"):
            with_head(tmp_path / "a", task=task)
    with pytest.raises(ArtifactError, match="task_type 'SEQ_CLS' and there is no head.safetensors"):
        with_head(tmp_path / "a", {})
    with_head(tmp_path / "b")
    (tmp_path / "b/head.safetensors").unlink()
    refused(tmp_path / "b", "missing", r"head\.safetensors is missing")
    write_manifest(tmp_path / "b")
    refused(tmp_path / "b", "missing", "there is no head.safetensors")


def test_a_damaged_head_is_refused(tmp_path: Path) -> None:
    def damaged(name: str, change: Callable[[dict[str, Any]], None]) -> Path:
        with_head(tmp_path / name)
        edit_tensors(tmp_path / name / "head.safetensors", change)
        return tmp_path / name

    refused(
        damaged("a", lambda head: head["classifier.dense.bias"].add_(1)), "hash_mismatch", "head.safetensors is not"
    )
    cases: dict[str, tuple[Callable[[dict[str, Any]], None], str, str]] = {
        "b": (lambda head: head["classifier.dense.bias"].fill_(float("nan")), "not_finite", "not finite"),
        "c": (lambda head: head.update(x=torch.ones(2, dtype=torch.float16)), "unsupported", "x is torch.float16"),
        "d": (lambda head: head.clear(), "malformed", "holds no tensor"),
    }
    for name, (change, reason, message) in cases.items():
        changed = damaged(name, change)
        write_manifest(changed)
        refused(changed, reason, message)


def test_a_sample_of_a_classifier_holds_its_head(tmp_path: Path) -> None:
    with_head(tmp_path / "a", {**HEAD, "pooler.dense.weight": torch.eye(2)})
    write_sample(tmp_path / "s", load_artifact(tmp_path / "a"), seed=0, index=0, tau=1.0)
    saved = json.loads((tmp_path / "s/adapter_config.json").read_text())["modules_to_save"]
    assert saved == ["classifier", "pooler.dense"]
    written = load_file(tmp_path / "s/adapter_model.safetensors")
    assert all(torch.equal(written[PREFIX + name], tensor) for name, tensor in HEAD.items())
    assert load_artifact(tmp_path / "a").adapter_config.get("modules_to_save") is None


def test_an_existing_path_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    before = load_artifact(folder).digest
    with pytest.raises(ArtifactError, match="exists; choose another folder or remove it first") as caught:
        write(folder, card="another")
    assert caught.value.reason == "exists"
    assert load_artifact(folder).digest == before
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(ArtifactError, match="exists"):
        write(file)
    assert file.read_text() == "precious"
    (tmp_path / "empty").mkdir()
    assert write(tmp_path / "empty") == before


def test_replace_swaps_the_whole_folder(folder: Path) -> None:
    (folder / "stray").write_text("x")
    digest = write(folder, calibration=None, card=None, run_config=None, replace=True)
    assert load_artifact(folder).digest == digest
    assert sorted(path.name for path in folder.iterdir()) == sorted([*REQUIRED, "metrics.json", "manifest.json"])
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def nan_mean() -> dict[str, LoraFactors]:
    mean = parts()["mean"]
    mean[FIRST].A[1, 2] = float("nan")
    return dict(mean)


@pytest.mark.parametrize(
    ("changes", "reason", "message"),
    [
        ({"mean": nan_mean()}, "not_finite", "q_proj.lora_A.weight has entries that are not finite"),
        ({"posteriors": {FIRST: parts()["posteriors"][FIRST]}}, "wrong_shape", "must be the same modules"),
        ({"mean": {}, "posteriors": {}}, "malformed", "holds no LoRA module"),
        ({"posteriors": parts("row")["posteriors"]}, "malformed", "kind diag has no .*beta"),
        (
            {"adapter_config": {"peft_type": "LORA", "r": 8, "lora_alpha": ALPHA}},
            "malformed",
            "r is 8, posterior.json says 3",
        ),
    ],
)
def test_a_refused_write_leaves_what_was_there(
    folder: Path, changes: dict[str, Any], reason: str, message: str
) -> None:
    before = load_artifact(folder).digest
    for target, replace in ((folder, True), (folder.parent / "new", False)):
        with pytest.raises(ArtifactError, match=message) as caught:
            write(target, replace=replace, **changes)
        assert caught.value.reason == reason
    assert load_artifact(folder).digest == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("failing", ["write_bytes", "rename"])
def test_a_full_disk_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    before = load_artifact(folder).digest
    original = getattr(Path, failing)

    def fail(self: Path, *args: Any) -> Any:
        # the third file of the new folder, or the step that puts the new folder into place
        if self.name in ("posterior.json", "new"):
            raise OSError(28, "No space left on device")
        return original(self, *args)

    monkeypatch.setattr(Path, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        write(folder, card="another", replace=True)
    monkeypatch.undo()
    assert load_artifact(folder).digest == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


# --- what is refused ---


@pytest.mark.parametrize("name", EVERY_FILE)
@pytest.mark.parametrize("position", [0.0, 0.5, 1.0])
def test_a_flipped_bit_is_refused(folder: Path, name: str, position: float) -> None:
    data = bytearray((folder / name).read_bytes())
    data[round(position * (len(data) - 1))] ^= 1
    (folder / name).write_bytes(data)
    refused(folder, "hash_mismatch", f"{name} is not what the manifest describes .* changed or damaged")


def test_a_flipped_bit_anywhere_in_the_manifest_is_refused(folder: Path) -> None:
    """Every seventh byte. It describes all others, so nothing in it may be free to change."""
    path = folder / "manifest.json"
    data = path.read_bytes()
    for position in range(0, len(data), 7):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(ArtifactError) as caught:
            load_artifact(folder)
        assert caught.value.reason in ("malformed", "unsupported", "hash_mismatch", "missing"), position


@pytest.mark.parametrize("name", EVERY_FILE)
@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\n", lambda data: b""])
def test_a_file_of_another_length_is_refused(folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    refused(folder, "hash_mismatch", f"{name} is not what the manifest describes")


@pytest.mark.parametrize("name", [*EVERY_FILE, "manifest.json"])
def test_a_missing_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(folder, "missing", f"{name} is missing; an artifact needs manifest.json and adapter_config.json")


def test_a_config_that_is_no_text_is_refused(folder: Path) -> None:
    (folder / "config.yaml").write_bytes(b"\xff")
    write_manifest(folder)
    refused(folder, "malformed", "config.yaml is not UTF-8 text")


@pytest.mark.parametrize("name", [*EVERY_FILE, "manifest.json"])
def test_a_symbolic_link_in_place_of_a_file_is_refused(folder: Path, name: str) -> None:
    """Even to the very same bytes."""
    elsewhere = folder.parent / "elsewhere"
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)
    refused(folder, "symlink", r"cannot be opened: .* \(symbolic links are not followed\)")


def test_a_symbolic_link_in_place_of_the_folder_is_refused(folder: Path) -> None:
    link = folder.parent / "link"
    link.symlink_to(folder)
    refused(link, "symlink", "link is a symbolic link; give the folder itself")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "manifest.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_pipe_or_folder_in_place_of_a_file_is_refused_at_once(
    folder: Path, name: str, make: Callable[[Path], None]
) -> None:
    (folder / name).unlink()
    make(folder / name)
    refused(folder, "malformed", f"{name} is not a regular file")


def test_what_is_not_a_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "missing", "nothing does not exist")
    (tmp_path / "file").write_text("{}")
    refused(tmp_path / "file", "not_a_folder", "is not a folder; an artifact is a folder holding manifest.json")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "missing", "manifest.json is missing")


def test_a_file_that_cannot_be_read_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdopen", fail)
    refused(folder, "io", "manifest.json cannot be read: Input/output error")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_refused(folder: Path) -> None:
    (folder / "posterior.json").chmod(0)
    refused(folder, "io", "posterior.json cannot be opened: Permission denied")


def test_the_size_limit_holds_for_all_files_together(folder: Path) -> None:
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert load_artifact(folder, max_bytes=size).digest
    refused(folder, "too_large", r"has \d+ bytes, \d+ are left of the limit", max_bytes=size - 1)
    refused(folder, "too_large", "manifest.json has", max_bytes=10)


def test_a_huge_file_is_refused_without_being_read(folder: Path) -> None:
    os.truncate(folder / "posterior.safetensors", 2**40)  # sparse: no byte of it is on the disk
    refused(folder, "too_large", f"posterior.safetensors has {2**40} bytes")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", WEIGHTS)
def test_numbers_that_are_not_finite_are_refused(folder: Path, name: str, value: float) -> None:
    edit_tensors(folder / name, lambda tensors: tensors[sorted(tensors)[0]].view(-1)[-1:].fill_(value))
    write_manifest(folder)
    refused(folder, "not_finite", f"{name}: .*{FIRST}.* has entries that are not finite")


def replace_tensor(name: str, make: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        made = make(tensors.pop(name)) if name in tensors else make(torch.zeros(1))
        if made is not None:
            tensors[name] = made

    return change


LORA_A, LORA_B = f"{PREFIX}{FIRST}.lora_A.weight", f"{PREFIX}{FIRST}.lora_B.weight"


@pytest.mark.parametrize(
    ("name", "tensor", "make", "reason", "message"),
    [
        (WEIGHTS[0], LORA_A, lambda t: t[:2], "wrong_shape", r"lora_A \(2, 5\) and lora_B \(7, 3\), the rank is 3"),
        (WEIGHTS[0], LORA_B, lambda t: t.t(), "wrong_shape", r"lora_A \(3, 5\) and lora_B \(3, 7\), the rank is 3"),
        (WEIGHTS[0], LORA_A, lambda t: t[0], "wrong_shape", "needs two matrices, lora_A .* and lora_B"),
        (WEIGHTS[0], LORA_B, lambda t: None, "wrong_shape", "needs two matrices, lora_A .* and lora_B"),
        (
            WEIGHTS[0],
            LORA_A,
            lambda t: t[:, :4],
            "wrong_shape",
            r"log_sd_A for .* has shape \(3, 5\), .* needs \(3, 4\)",
        ),
        (WEIGHTS[0], LORA_A, lambda t: t.half(), "unsupported", "is torch.float16, means and posteriors are float32"),
        (WEIGHTS[0], LORA_B, lambda t: t.bfloat16(), "unsupported", "is torch.bfloat16"),
        (WEIGHTS[0], f"{PREFIX}lm_head.weight", lambda t: t, "unsupported", "lm_head.weight is not a LoRA factor"),
        (
            WEIGHTS[0],
            f"{PREFIX}{FIRST}.lora_embedding_A",
            lambda t: t,
            "unsupported",
            "lora_embedding_A is not a LoRA factor",
        ),
        (WEIGHTS[0], f"{FIRST}.lora_A.weight", lambda t: t, "unsupported", "is not a LoRA factor"),
        (WEIGHTS[1], f"{FIRST}.log_sd_A", lambda t: t.t(), "wrong_shape", r"log_sd_A for .* has shape \(5, 3\)"),
        (WEIGHTS[1], f"{FIRST}.log_sd_A", lambda t: t.double(), "unsupported", "is torch.float64"),
        (WEIGHTS[1], f"{FIRST}.log_sd_A", lambda t: t + 100, "not_finite", "log_sd_A for .* no sample would be finite"),
        (WEIGHTS[1], f"{FIRST}.log_var", lambda t: t, "malformed", r"kind diag has no \['log_var'\]"),
        (
            WEIGHTS[1],
            "model.layers.9.self_attn.q_proj.log_sd_A",
            lambda t: t,
            "wrong_shape",
            "layers.9.* belongs to no module of the mean adapter",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    folder: Path, name: str, tensor: str, make: Callable[[torch.Tensor], torch.Tensor | None], reason: str, message: str
) -> None:
    edit_tensors(folder / name, replace_tensor(tensor, make))
    write_manifest(folder)
    refused(folder, reason, message)


@pytest.mark.parametrize(
    ("kind", "modules", "message"),
    [
        ("diag", (FIRST, SECOND), "neither log_sd_A nor log_sd_B"),
        ("lowrank", (FIRST, SECOND), "kind lowrank needs the tensors"),
        ("row", (SECOND,), "kind row needs the tensors"),
    ],
)
def test_a_posterior_without_the_tensors_it_needs_is_refused(
    tmp_path: Path, kind: str, modules: tuple[str, ...], message: str
) -> None:
    write(tmp_path / "artifact", kind)

    def drop(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith(modules)]:
            del tensors[name]

    edit_tensors(tmp_path / "artifact/posterior.safetensors", drop)
    write_manifest(tmp_path / "artifact")
    refused(tmp_path / "artifact", "malformed", message)


@pytest.mark.parametrize("kind", ["diag", "lowrank"])
def test_a_module_may_be_deterministic_beside_others(tmp_path: Path, kind: str) -> None:
    """Last-layer Laplace: the modules before the last block have no noise."""
    given = parts(kind)
    given["posteriors"][FIRST] = PointPosterior()
    write_artifact(tmp_path / "a", **given)
    artifact = load_artifact(tmp_path / "a")
    assert artifact.has_posterior and artifact.posteriors[FIRST] == PointPosterior()
    drawn, mean = artifact.draw(seed=0, index=0, tau=1.0), artifact.mean
    assert torch.equal(drawn[FIRST].A, mean[FIRST].A) and torch.equal(drawn[FIRST].B, mean[FIRST].B)
    assert not torch.equal(drawn[SECOND].A, mean[SECOND].A) and not torch.equal(drawn[SECOND].B, mean[SECOND].B)


@pytest.mark.parametrize(
    ("settings", "reason", "message"),
    [
        ({"epsilon": 0.0}, "malformed", "epsilon > 0, dof > 0 and floor >= 0, got epsilon=0.0"),
        ({"epsilon": -0.1}, "malformed", "got epsilon=-0.1"),
        ({"dof": -1.0}, "malformed", "dof=-1.0"),
        ({"floor": -1.0}, "malformed", "floor=-1.0"),
        ({"sigma": 1.0}, "malformed", "kind row needs the tensors rho and beta and the settings"),
        ({"epsilon": float("nan")}, "malformed", "posterior.json is not JSON: NaN is no number of JSON"),
        ({"epsilon": "large"}, "malformed", "posterior.json: settings.epsilon"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path: Path, settings: dict[str, Any], reason: str, message: str) -> None:
    folder = tmp_path / "artifact"
    write(folder, "row")
    edit_json(folder / "posterior.json", settings={**ROW_SETTINGS, **settings})
    write_manifest(folder)
    refused(folder, reason, message)


@pytest.mark.parametrize(
    ("file", "changes", "reason", "message"),
    [
        (
            "posterior.json",
            {"format_version": 2},
            "unsupported",
            "has format version 2; this release .* reads version 1",
        ),
        ("posterior.json", {"format_version": "1"}, "unsupported", "has format version '1'"),
        ("calibration.json", {"format_version": 2}, "unsupported", "calibration.json has format version 2"),
        ("posterior.json", {"sampler": "x"}, "malformed", "posterior.json: sampler: Extra inputs"),
        (
            "posterior.json",
            {"kind": "horseshoe"},
            "malformed",
            "posterior.json: kind: Input should be 'point', 'diag',",
        ),
        ("posterior.json", {"generator": "torch"}, "malformed", "posterior.json: generator"),
        ("posterior.json", {"settings": {"epsilon": 1.0}}, "malformed", r"kind diag has no \['epsilon'\]"),
        ("posterior.json", {"tau": {"8": {"value": -1, "nll": 0}}}, "malformed", "posterior.json: tau.8.value"),
        ("calibration.json", {"temperatures": {}}, "malformed", "calibration.json: temperatures: Extra inputs"),
        ("posterior.json", {"rank": 4}, "malformed", "r is 3, posterior.json says 4"),
        ("posterior.json", {"lora_alpha": 4.0}, "malformed", "lora_alpha is 4.5, posterior.json says 4.0"),
        ("adapter_config.json", {"r": 4}, "malformed", "r is 4, posterior.json says 3"),
        ("adapter_config.json", {"peft_type": "IA3"}, "unsupported", "peft_type is 'IA3', only LORA is supported"),
        ("adapter_config.json", {"bias": "all"}, "unsupported", "bias is 'all'; .* plain LoRA, with bias 'none'"),
        ("adapter_config.json", {"use_dora": True}, "unsupported", "use_dora is True"),
        ("adapter_config.json", {"use_rslora": True}, "unsupported", "use_rslora is True"),
        ("adapter_config.json", {"lora_bias": True}, "unsupported", "lora_bias is True"),
        ("adapter_config.json", {"fan_in_fan_out": True}, "unsupported", "fan_in_fan_out is True"),
        ("adapter_config.json", {"use_qalora": True}, "unsupported", "use_qalora is True"),
        ("adapter_config.json", {"rank_pattern": {"q_proj": 2}}, "unsupported", "rank_pattern is {'q_proj': 2}"),
        ("adapter_config.json", {"alpha_pattern": {"q_proj": 2}}, "unsupported", "alpha_pattern is"),
        ("adapter_config.json", {"modules_to_save": ["lm_head"]}, "unsupported", r"modules_to_save is \['lm_head'\]"),
        ("adapter_config.json", {"auto_mapping": {"base_model_class": "X"}}, "unsupported", "auto_mapping is"),
        ("adapter_config.json", {"trainable_token_indices": [1]}, "unsupported", "trainable_token_indices is"),
        ("adapter_config.json", {"target_parameters": ["w"]}, "unsupported", "target_parameters is"),
        ("adapter_config.json", {"layer_replication": [[0, 2]]}, "unsupported", "layer_replication is"),
        ("adapter_config.json", {"alora_invocation_tokens": [5]}, "unsupported", "alora_invocation_tokens is"),
        ("adapter_config.json", {"monteclora_config": {}}, "unsupported", "monteclora_config is"),
        ("adapter_config.json", {"arrow_config": {}}, "unsupported", "arrow_config is"),
        ("adapter_config.json", {"kasa_config": {}}, "unsupported", "kasa_config is"),
        ("adapter_config.json", {"use_bdlora": True}, "unsupported", "use_bdlora is"),
    ],
)
def test_documents_that_do_not_fit_are_refused(
    folder: Path, file: str, changes: dict[str, Any], reason: str, message: str
) -> None:
    edit_json(folder / file, **changes)
    write_manifest(folder)
    refused(folder, reason, message)


@pytest.mark.parametrize("name", ["adapter_config.json", "posterior.json", "calibration.json", "metrics.json"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "is not JSON"),
        (b"[1]", "holds a JSON list, an object is needed"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 200_000, "is not JSON"),  # deeper than the parser's stack
    ],
)
def test_documents_that_are_not_json_objects_are_refused(folder: Path, name: str, data: bytes, message: str) -> None:
    (folder / name).write_bytes(data)
    write_manifest(folder)
    refused(folder, "malformed", f"{name} {message}")


@pytest.mark.parametrize("data", [b"", b"nonsense", b"[]", b"{}", b"[" * 200_000])
def test_a_manifest_that_is_none_is_refused(folder: Path, data: bytes) -> None:
    (folder / "manifest.json").write_bytes(data)
    refused(folder, "malformed", "manifest.json")


def test_a_manifest_of_another_format_is_refused(folder: Path) -> None:
    edit_json(folder / "manifest.json", format_version=2)
    refused(folder, "unsupported", "manifest.json has format version 2")


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "sub/adapter_model.safetensors", "./posterior.json", "tokenizer.json", ""]
)
def test_a_manifest_names_known_files_only(folder: Path, name: str) -> None:
    """A name is compared with the list of known names and never joined to a path before."""
    (folder.parent / "outside").write_text("secret")
    files = json.loads((folder / "manifest.json").read_text())["files"]
    files[name] = describe(folder.parent / "outside")
    (folder / "manifest.json").write_text(json.dumps({"format_version": 1, "files": files}))
    with pytest.raises(ArtifactError, match="lists unknown files") as caught:
        load_artifact(folder)
    assert caught.value.reason == "malformed" and "secret" not in str(caught.value)


@pytest.mark.parametrize("name", REQUIRED)
def test_a_manifest_lists_every_required_file(folder: Path, name: str) -> None:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    del files[name]
    (folder / "manifest.json").write_text(json.dumps({"format_version": 1, "files": files}))
    refused(folder, "malformed", rf"lists unknown files \[\] and lacks \['{name}'\]")


def test_a_manifest_that_describes_other_tensors_is_refused(folder: Path) -> None:
    document = json.loads((folder / "manifest.json").read_text())
    document["files"]["posterior.safetensors"]["tensors"][f"{FIRST}.log_sd_A"] = ["float32", [5, 3]]
    (folder / "manifest.json").write_text(json.dumps(document))
    refused(folder, "malformed", "posterior.safetensors holds other tensors than its manifest entry describes")


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_a_pickle_is_never_opened(folder: Path) -> None:
    """Neither as adapter_model.bin nor under the name of a safetensors file."""
    proof = folder.parent / "executed"
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(pickle.dumps(Payload(proof)))
    write_manifest(folder)
    refused(folder, "malformed", "adapter_model.safetensors is not a safetensors file")
    weights.rename(folder / "adapter_model.bin")
    write_manifest(folder)
    refused(folder, "malformed", r"unknown files \['adapter_model.bin'\] and lacks \['adapter_model.safetensors'\]")
    assert not proof.exists()


# --- the store ---


def test_the_store_is_addressed_by_content(folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "deep" / "store"
    artifact = load_artifact(folder, store=store)
    assert artifact.path == store / artifact.digest.removeprefix("sha256:")
    assert load_artifact(artifact.path).digest == artifact.digest
    for path in folder.iterdir():
        assert (artifact.path / path.name).read_bytes() == path.read_bytes()
        assert not (artifact.path / path.name).is_symlink()
    other = write(folder, card="another", replace=True)
    again = load_artifact(folder, store=store)
    assert again.digest == other and sorted(p.name for p in store.iterdir()) == sorted(
        digest.removeprefix("sha256:") for digest in (artifact.digest, other)
    )
    assert load_artifact(artifact.path).digest == artifact.digest  # what is being served stays


def test_an_intact_copy_is_left_alone(folder: Path, tmp_path: Path) -> None:
    first = load_artifact(folder, store=tmp_path / "store").path
    before = {path.name: path.stat().st_ino for path in first.iterdir()}
    load_artifact(folder, store=tmp_path / "store")
    assert {path.name: path.stat().st_ino for path in first.iterdir()} == before


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "folder"])
@pytest.mark.parametrize("name", ["manifest.json", "posterior.safetensors", "README.md"])
def test_a_damaged_copy_is_repaired(folder: Path, tmp_path: Path, damage: str, name: str) -> None:
    artifact = load_artifact(folder, store=tmp_path / "store")
    file = artifact.path / name
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[5] ^= 1
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(data[:7])
    else:
        file.unlink()
        if damage == "folder":
            file.mkdir()
    repaired = load_artifact(folder, store=tmp_path / "store")
    assert repaired.path == artifact.path
    assert load_artifact(artifact.path).digest == artifact.digest
    assert [path.name for path in (tmp_path / "store").iterdir()] == [artifact.path.name]


def test_a_store_that_cannot_be_written_is_reported(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    with pytest.raises(ArtifactError, match="the artifact store .* cannot be written") as caught:
        load_artifact(folder, store=tmp_path / "store")
    assert caught.value.reason == "io"


# --- samples ---


@pytest.mark.parametrize("kind", ["diag", "row", "point"])
def test_a_draw_is_a_pure_function(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "a", kind)
    artifact, other = load_artifact(tmp_path / "a"), load_artifact(tmp_path / "a")
    first = artifact.draw(seed=3, index=1, tau=0.7)
    artifact.draw(seed=9, index=0, tau=2.0)
    assert same_factors(artifact.draw(seed=3, index=1, tau=0.7), first)
    assert same_factors(other.draw(seed=3, index=1, tau=0.7), first)
    assert same_factors(artifact.draw(seed=3, index=1, tau=0.0), artifact.mean)
    differs = kind != "point"
    for change in ({"seed": 4}, {"index": 2}, {"tau": 0.8}):
        changed = artifact.draw(**{"seed": 3, "index": 1, "tau": 0.7, **change})  # type: ignore[arg-type]
        assert same_factors(changed, first) is not differs


@pytest.mark.parametrize("tau", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["diag", "row", "point"])
def test_a_drawn_sample_is_the_callers_own(tmp_path: Path, kind: str, tau: float) -> None:
    """vLLM multiplies B by alpha/r in place; the artifact must not notice, whatever factors have noise."""
    write(tmp_path / "a", kind)
    artifact, untouched = load_artifact(tmp_path / "a"), load_artifact(tmp_path / "a")
    before = artifact.draw(seed=0, index=0, tau=tau)
    drawn = artifact.draw(seed=0, index=0, tau=tau)
    for factors in drawn.values():
        factors.A.mul_(3)
        factors.B.mul_(3)
    assert same_factors(artifact.mean, untouched.mean)
    assert same_factors(artifact.draw(seed=0, index=0, tau=tau), before)
    for tensor in peft_tensors(artifact.mean).values():
        tensor.zero_()
    assert same_factors(artifact.mean, untouched.mean)


def test_draws_out_of_range_are_refused(folder: Path) -> None:
    artifact = load_artifact(folder)
    with pytest.raises(PosteriorError, match="tau must be a finite number of 0 or more"):
        artifact.draw(seed=0, index=0, tau=-1.0)
    with pytest.raises(ValueError, match="seed and index must be 0 or more, got seed=0, index=-1"):
        artifact.draw(seed=0, index=-1, tau=1.0)


def test_a_written_sample_is_the_drawn_one_as_plain_peft(folder: Path, tmp_path: Path) -> None:
    artifact = load_artifact(folder)
    write_sample(tmp_path / "s", artifact, seed=2, index=5, tau=0.5)
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert json.loads((tmp_path / "s/adapter_config.json").read_text()) == artifact.adapter_config
    written, drawn = load_file(tmp_path / "s/adapter_model.safetensors"), artifact.draw(seed=2, index=5, tau=0.5)
    assert set(written) == {f"{PREFIX}{m}.lora_{side}.weight" for m in (FIRST, SECOND) for side in "AB"}
    for module, factors in drawn.items():
        assert torch.equal(written[f"{PREFIX}{module}.lora_A.weight"], factors.A)
        assert torch.equal(written[f"{PREFIX}{module}.lora_B.weight"], factors.B)


def test_written_samples_are_pure_and_tau_zero_is_the_mean(folder: Path, tmp_path: Path) -> None:
    artifact = load_artifact(folder)
    weights: dict[str, bytes] = {}
    for name, (seed, index, tau) in {
        "a": (2, 5, 0.5), "again": (2, 5, 0.5), "index": (2, 6, 0.5), "seed": (3, 5, 0.5), "tau": (2, 5, 1.0), "mean": (2, 5, 0.0),
    }.items():  # fmt: skip
        write_sample(tmp_path / name, artifact, seed=seed, index=index, tau=tau)
        weights[name] = (tmp_path / name / "adapter_model.safetensors").read_bytes()
    assert weights["a"] == weights["again"]
    assert len({weights[name] for name in ("a", "index", "seed", "tau", "mean")}) == 5
    assert weights["mean"] == (folder / "adapter_model.safetensors").read_bytes()


def test_a_sample_is_not_written_over_anything_nor_at_a_bad_tau(folder: Path, tmp_path: Path) -> None:
    artifact = load_artifact(folder)
    with pytest.raises(ArtifactError, match="exists"):
        write_sample(folder, artifact, seed=0, index=0, tau=1.0)
    with pytest.raises(PosteriorError, match="tau must be"):
        write_sample(tmp_path / "s", artifact, seed=0, index=0, tau=float("nan"))
    assert not (tmp_path / "s").exists()


# --- PEFT ---


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import make_model

    return make_model(tmp_path_factory.mktemp("base"))


def merged_logits(base: Path, artifact: Artifact, factors: dict[str, LoraFactors], ids: torch.Tensor) -> torch.Tensor:
    """Logits of the base model with W0 + (alpha / r) B A written into its weights."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    scaling = artifact.config.lora_alpha / artifact.config.rank
    with torch.no_grad():
        for module, pair in factors.items():
            model.get_submodule(module).weight += scaling * pair.B @ pair.A
        logits: torch.Tensor = model(input_ids=ids).logits
    return logits


@pytest.mark.parametrize("kind", ["diag", "row"])
def test_peft_loads_the_mean_and_samples_and_computes_the_same(base: Path, tmp_path: Path, kind: str) -> None:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    from tests.tiny import make_artifact

    artifact = make_artifact(tmp_path / "artifact", form=kind)
    write_sample(tmp_path / "sample", artifact, seed=1, index=2, tau=1.0)
    ids = torch.arange(10, 34).reshape(2, 12)
    logits = []
    for path, factors in (
        (tmp_path / "artifact", artifact.mean),
        (tmp_path / "sample", artifact.draw(seed=1, index=2, tau=1.0)),
    ):
        model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, str(path)).eval()
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits)
        expected = merged_logits(base, artifact, factors, ids)
        torch.testing.assert_close(logits[-1], expected, rtol=1e-3, atol=1e-4)
    assert float((logits[0] - logits[1]).abs().max()) > 0.1

"""`credence import` on what the installed PEFT writes and on a run of ours that stopped: what becomes of it, and what is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, MontecloraConfig, get_peft_model
from peft.tuners.lora.monteclora import MontecloraSampler
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from credence.adapters import Artifact, DiagPosterior, FixedRowPosterior, PointPosterior, RowPosterior, load_artifact
from credence.training.checkpoint import checkpoint_folder, latest_checkpoint
from credence.training.loop import train
from tests.cli.conftest import Command
from tests.training.conftest import base, label_rows, one_thread, quick_config, train_file, validation_file, write

__all__ = ["base", "one_thread", "train_file", "validation_file", "write"]  # fixtures

QUICK = ["--set", "release.ks=[2]", "--set", "release.taus=[1]", "--set", "method.samples=2"]
SCALER, COMPONENTS, RANK = 0.05, 3, 4


def peft_lora(base: Path, folder: Path, **options: Any) -> Path:
    """Two steps of PEFT's own LoRA on the tiny model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=RANK, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    model = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    ids = torch.arange(24).reshape(2, 12) + 40
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def lora(base: Path, tmp_path: Path) -> Path:
    return peft_lora(base, tmp_path / "lora")


@pytest.fixture
def monteclora(base: Path, tmp_path: Path) -> Path:
    sampler = MontecloraConfig(num_samples=COMPONENTS, sample_scaler=SCALER, buffer_size=4)
    return peft_lora(base, tmp_path / "monteclora", monteclora_config=sampler)


def stored_factors(folder: Path) -> dict[str, Tensor]:
    return {
        name.removeprefix("base_model.model.").removesuffix(".weight"): tensor
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }


def same_mean(artifact: Artifact, folder: Path) -> bool:
    stored = stored_factors(folder)
    return all(
        torch.equal(pair.A, stored[f"{name}.lora_A"]) and torch.equal(pair.B, stored[f"{name}.lora_B"])
        for name, pair in artifact.mean.items()
    )


def hide_nothing_of_this_machine(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        assert str(tmp_path.parent.parent).encode() not in file.read_bytes(), (
            f"{file.name} holds a path of this machine"
        )


def test_a_peft_lora_gets_a_posterior(
    credence: Command, lora: Path, base: Path, train_file: Path, validation_file: Path, tmp_path: Path
) -> None:
    outcome = credence(
        "import", lora, "--format", "peft", "--output", tmp_path / "out", "--base", base, "--data", train_file,
        "--validation", validation_file, "--json", "-", *QUICK,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    artifact = load_artifact(tmp_path / "out")
    assert json.loads(outcome.out) == {"path": str(tmp_path / "out"), "digest": artifact.digest}
    assert (artifact.config.method, artifact.config.kind, artifact.config.lora_alpha) == ("tfb", "row", 8)
    assert all(isinstance(posterior, FixedRowPosterior) for posterior in artifact.posteriors.values())
    assert set(artifact.config.tau) == {2} and artifact.config.training["labels"] == ["bird", "cat", "dog"]
    stored = stored_factors(lora)
    assert len(artifact.mean) == 4
    for name, pair in artifact.mean.items():
        torch.testing.assert_close(
            pair.B @ pair.A, stored[f"{name}.lora_B"] @ stored[f"{name}.lora_A"], rtol=1e-4, atol=1e-6
        )
    hide_nothing_of_this_machine(tmp_path / "out", tmp_path)


def test_a_peft_lora_is_stored_as_it_is(credence: Command, lora: Path, tmp_path: Path) -> None:
    outcome = credence("import", lora, "--format", "peft", "--method", "map", "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "wrote" in outcome.out and "not released" in outcome.out
    artifact = load_artifact(tmp_path / "out")
    assert same_mean(artifact, lora)
    assert all(isinstance(posterior, PointPosterior) for posterior in artifact.posteriors.values())
    assert artifact.config.base_model.name == "tiny"
    assert artifact.config.training["imported"]["folder"] == "lora"
    hide_nothing_of_this_machine(tmp_path / "out", tmp_path)


def test_map_with_data_is_released(
    credence: Command, lora: Path, base: Path, train_file: Path, validation_file: Path, tmp_path: Path
) -> None:
    outcome = credence(
        "import", lora, "--format", "peft", "--method", "map", "--output", tmp_path / "out", "--base", base,
        "--data", train_file, "--validation", validation_file, *QUICK[:4],
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    artifact = load_artifact(tmp_path / "out")
    assert 0 in artifact.calibration.temperature and same_mean(artifact, lora)
    evaluated = credence("eval", tmp_path / "out", "--base", base, "--data", validation_file, "--k", "0", "--json", "-")
    assert evaluated.code == 0, evaluated.err


def test_pefts_monteclora_keeps_its_posterior(credence: Command, monteclora: Path, tmp_path: Path) -> None:
    """Parameters bit for bit; and 3,000 draws have the mean, variance and kurtosis of PEFT's own sampler with those parameters."""
    outcome = credence("import", monteclora, "--format", "peft-monteclora", "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    artifact = load_artifact(tmp_path / "out")
    stored = load_file(monteclora / "adapter_model.safetensors")
    assert artifact.config.settings == {"epsilon": SCALER, "dof": float(RANK), "floor": 1e-3}
    assert artifact.config.method == "monteclora" and artifact.adapter_config["monteclora_config"] is None
    for name, pair in artifact.mean.items():
        prefix, posterior = f"base_model.model.{name}", artifact.posteriors[name]
        assert isinstance(posterior, RowPosterior)
        assert torch.equal(posterior.rho, stored[f"{prefix}.lora_monteclora_sampler.std_prior"])
        assert torch.equal(posterior.beta, stored[f"{prefix}.lora_monteclora_sampler.expert_weights_prior"])
        assert torch.equal(pair.A, stored[f"{prefix}.lora_A.weight"])
    # The posterior's own tensors and no last draw.
    assert len(load_file(tmp_path / "out/posterior.safetensors")) == 2 * len(artifact.mean)

    draws, name = 3000, sorted(artifact.mean)[0]
    mean, posterior = artifact.mean[name], artifact.posteriors[name]
    n_in = mean.A.shape[1]
    torch.manual_seed(0)
    sampler = MontecloraSampler(n_in, RANK, COMPONENTS, sample_scaler=SCALER, buffer_size=draws, device="cpu")
    prefix = f"base_model.model.{name}.lora_monteclora_sampler."
    sampler.load_state_dict({key.removeprefix(prefix): t for key, t in stored.items() if key.startswith(prefix)})
    with torch.no_grad():
        # As MontecloraLinearVariant.forward mixes them.
        theirs = torch.stack(
            [torch.einsum("n,nij->ij", pi, mean.A.T + noise).T for noise, pi in (sampler() for _ in range(draws))]
        )
    ours = torch.stack([artifact.draw(seed=0, index=i, tau=1.0)[name].A for i in range(draws)])

    def moments(samples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = (samples - mean.A).double().transpose(0, 1).flatten(1)
        return rows.mean(1), rows.var(1), (rows**4).mean(1) / rows.var(1) ** 2

    (mean_o, variance_o, kurtosis_o), (mean_t, variance_t, kurtosis_t) = moments(ours), moments(theirs)
    bound = 4.5 * (variance_t / (draws * n_in)).sqrt()
    assert bool((mean_o.abs() < bound).all()) and bool((mean_t.abs() < bound).all())
    torch.testing.assert_close(variance_o, variance_t, rtol=0.07, atol=0)
    torch.testing.assert_close(kurtosis_o, kurtosis_t, rtol=0.15, atol=0)


def stop_before_the_artifact(
    base: Path, train_file: Path, output: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str
) -> Path:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="disk full"):
        patched.setattr("credence.training.loop.write_artifact", fail)
        train(base, train_file, None, "ivon", output, quick_config("ivon", "train.save_steps=2", *overrides))
    found = latest_checkpoint(checkpoint_folder(output))
    assert found is not None
    return found


def test_an_ivon_checkpoint_is_the_posterior_of_its_step(
    credence: Command,
    base: Path,
    train_file: Path,
    validation_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last checkpoint of a run imports as the very posterior the run writes when it is resumed."""
    checkpoint = stop_before_the_artifact(base, train_file, tmp_path / "run", monkeypatch)
    outcome = credence("import", checkpoint, "--format", "ivon-checkpoint", "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    imported = load_artifact(tmp_path / "out")
    config = quick_config("ivon", "train.save_steps=2")
    finished = load_artifact(train(base, train_file, None, "ivon", tmp_path / "run", config, 0, True).path)
    assert (imported.config.rank, imported.config.lora_alpha) == (4, 8)
    assert imported.config.base_model == finished.config.base_model
    for name, pair in finished.mean.items():
        assert torch.equal(imported.mean[name].A, pair.A) and torch.equal(imported.mean[name].B, pair.B)
        ours, theirs = imported.posteriors[name], finished.posteriors[name]
        assert isinstance(ours, DiagPosterior) and isinstance(theirs, DiagPosterior)
        for got, expected in ((ours.log_sd_A, theirs.log_sd_A), (ours.log_sd_B, theirs.log_sd_B)):
            assert got is not None and expected is not None
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert imported.config.training["labels"] == finished.config.training["labels"]
    released = credence(
        "release", tmp_path / "out", "--base", base, "--validation", validation_file, "--set", "release.ks=[2]",
        "--set", "release.taus=[1]",
    )  # fmt: skip
    assert released.code == 0, released.err


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


MODULE = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{MODULE}.lora_monteclora_sampler.std_prior"), "needs std_prior"),
        (
            lambda t: t.update({f"{MODULE}.lora_monteclora_sampler.new": torch.ones(2)}),
            "lora_monteclora_sampler.new is no",
        ),
        (
            lambda t: t.update({f"{MODULE}.lora_monteclora_sampler.expert_weights_prior": torch.ones(5)}),
            "num_samples = 3",
        ),
        (
            lambda t: t.update({f"{MODULE}.lora_monteclora_sampler.std_prior": torch.ones(3)}),
            r"rho for .* shape \(3,\)",
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if name.startswith(f"{MODULE}.lora_monteclora_sampler.")],
            "has a LoRA or a sampler, not both",
        ),
    ],
)
def test_sampler_tensors_that_are_refused(
    change: Callable[[dict[str, Tensor]], None], message: str, credence: Command, monteclora: Path, tmp_path: Path
) -> None:
    edit_tensors(monteclora, change)
    outcome = credence("import", monteclora, "--format", "peft-monteclora", "--output", tmp_path / "out")
    assert outcome.code == 1 and not (tmp_path / "out").exists()
    assert re.search(message, outcome.err), outcome.err


def test_sampler_settings_that_are_refused(credence: Command, monteclora: Path, tmp_path: Path) -> None:
    sampler = json.loads((monteclora / "adapter_config.json").read_text())["monteclora_config"]
    for changes, message in (
        ({**sampler, "flow": 1}, "monteclora_config.flow is a setting that is not understood"),
        ({**sampler, "sample_scaler": 0}, "sample_scaler is 0, a number above 0"),
        (None, "this is not a MonteCLoRA adapter; use the format peft"),
    ):
        edit_config(monteclora, monteclora_config=changes)
        outcome = credence("import", monteclora, "--format", "peft-monteclora", "--output", tmp_path / "out")
        assert outcome.code == 1 and message in outcome.err, outcome.err


def test_arguments_that_are_refused(
    credence: Command, lora: Path, monteclora: Path, base: Path, train_file: Path, validation_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with_base = ["--base", base]
    for arguments, message in (
        ([lora, "--format", "zip"], "unknown format 'zip'; allowed: peft, peft-monteclora, ivon-checkpoint"),
        ([lora, "--format", "peft"], "--base is missing; give it, or use --method map"),
        ([lora, "--format", "peft", *with_base], "--data is missing"),
        ([monteclora, "--format", "peft"], "import this adapter with the format peft-monteclora"),
        ([monteclora, "--format", "peft-monteclora", "--method", "tfb"], "leave --method out"),
        ([lora, "--format", "peft", "--method", "map", "--validation", validation_file], "give --base"),
        (
            [lora, "--format", "peft", "--method", "map", "--data", train_file],
            "--data needs the base model's tokenizer",
        ),
        ([lora, "--format", "peft", "--method", "map", *with_base, "--validation", validation_file], "with --data"),
        (
            [lora, "--format", "peft", *with_base, "--data", train_file, "--set", "train.max_steps=3"],
            "an import takes no steps",
        ),
        ([lora, "--format", "peft", *with_base, "--data", train_file, "--method", "ivon"], "ivon is trained by steps"),
        ([lora, "--format", "ivon-checkpoint"], "a checkpoint of a run is a folder checkpoint-N"),
    ):
        outcome = credence("import", *arguments, "--output", output)
        assert outcome.code == 1 and message in outcome.err, outcome.err
        assert not output.exists()
    edit_config(lora, base_model_name_or_path=None)
    outcome = credence("import", lora, "--format", "peft", "--method", "map", "--output", output)
    assert "does not say which base model it belongs to" in outcome.err


@pytest.mark.parametrize(
    ("given", "stored"),
    [("org/name", "org/name"), ("/data/models/llama", "llama"), ("../llama/", "llama"), ("C:\\models\\llama", "llama")],
)
def test_the_base_model_is_named_without_a_path(
    given: str, stored: str, credence: Command, lora: Path, tmp_path: Path
) -> None:
    edit_config(lora, base_model_name_or_path=given)
    assert credence("import", lora, "--format", "peft", "--method", "map", "--output", tmp_path / "out").code == 0
    artifact = load_artifact(tmp_path / "out")
    assert artifact.config.base_model.name == artifact.adapter_config["base_model_name_or_path"] == stored


def test_a_failed_release_leaves_nothing(
    credence: Command, lora: Path, base: Path, train_file: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    few = write("few.jsonl", label_rows(3))
    outcome = credence(
        "import", lora, "--format", "peft", "--method", "map", "--output", tmp_path / "out", "--base", base,
        "--data", train_file, "--validation", few,
    )  # fmt: skip
    assert outcome.code == 1 and "holds 3 rows" in outcome.err
    assert not (tmp_path / "out").exists()


def test_an_ivon_checkpoint_that_is_refused(
    credence: Command, base: Path, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = stop_before_the_artifact(base, train_file, tmp_path / "run", monkeypatch)
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    arguments = ["import", checkpoint, "--format", "ivon-checkpoint", "--output", tmp_path / "out"]

    def refused(document: object, message: str) -> None:
        torch.save(document, checkpoint / "optimizer.pt")
        outcome = credence(*arguments)
        assert outcome.code == 1 and message in outcome.err, outcome.err

    refused({"state": {}}, "is not the state of an IVON optimiser")
    refused(Path, "is not the state of an IVON optimiser")  # a pickle that names code
    hess = state["state"][1]["hess"]
    state["state"][1]["hess"] = hess.T.contiguous()
    refused(state, "the Hessian of lora_B of model.layers.0.self_attn.q_proj has shape (4, 32)")
    state["state"][1]["hess"] = hess - 1
    refused(state, "is not positive and finite everywhere")
    run = checkpoint.parent / "run.json"
    run.write_text(json.dumps({**json.loads(run.read_text()), "method": "map"}))
    outcome = credence(*arguments)
    assert "is a checkpoint of method 'map'" in outcome.err


def test_several_adapters_become_an_ensemble(
    credence: Command, lora: Path, base: Path, train_file: Path, validation_file: Path, tmp_path: Path
) -> None:
    trained = [tmp_path / "first", tmp_path / "second"]
    for seed, folder in enumerate(trained):
        train(base, train_file, None, "map", folder, quick_config("map"), seed)
    outcome = credence(
        "import", *trained, "--format", "ensemble", "--base", base, "--data", train_file, "--validation", validation_file,
        "--output", tmp_path / "out", "--set", "release.ks=[2]",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    artifact = load_artifact(tmp_path / "out")
    assert (artifact.config.kind, artifact.config.method, artifact.config.mean) == (
        "ensemble",
        "ensemble",
        "first member",
    )
    assert (artifact.config.rank, artifact.num_distinct_samples, set(artifact.config.tau)) == (4, 2, {2})
    for index, folder in enumerate(trained):
        sample, member = artifact.draw(seed=0, index=index, tau=1.0), load_artifact(folder).mean
        assert all(torch.equal(sample[name].A, pair.A) for name, pair in member.items())
    # A plain LoRA of another rank and scale is the same product in the ensemble's rank and scale.
    wide = peft_lora(base, tmp_path / "wide", use_rslora=False)
    config = json.loads((wide / "adapter_config.json").read_text())
    (wide / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 24}))
    assert credence("import", lora, wide, "--format", "ensemble", "--output", tmp_path / "mixed").code == 0
    mixed, stored = load_artifact(tmp_path / "mixed"), stored_factors(wide)
    assert mixed.config.lora_alpha / mixed.config.rank == 2
    for name, pair in mixed.draw(seed=0, index=1, tau=1.0).items():
        expected = 6 * stored[f"{name}.lora_B"] @ stored[f"{name}.lora_A"]
        torch.testing.assert_close(2 * pair.B @ pair.A, expected, rtol=1e-5, atol=1e-7)


def test_members_with_posteriors_make_a_mixture(
    credence: Command, base: Path, train_file: Path, tmp_path: Path
) -> None:
    members = [tmp_path / "first", tmp_path / "second"]
    for seed, folder in enumerate(members):
        train(base, train_file, None, "ivon", folder, quick_config("ivon"), seed)
    outcome = credence("import", *members, "--format", "ensemble", "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    artifact = load_artifact(tmp_path / "out")
    assert artifact.config.member is not None and artifact.config.member.kind == "diag"
    own = load_artifact(members[1]).draw(seed=3, index=5, tau=0.5)
    for name, pair in artifact.draw(seed=3, index=5, tau=0.5).items():
        assert torch.equal(pair.A, own[name].A) and torch.equal(pair.B, own[name].B)


def test_members_that_do_not_fit_are_refused(
    credence: Command, lora: Path, base: Path, train_file: Path, tmp_path: Path
) -> None:
    train(base, train_file, None, "ivon", tmp_path / "ivon", quick_config("ivon"))
    options = ["lora.target_modules=[q_proj]"]
    train(base, train_file, None, "map", tmp_path / "narrow", quick_config("map", *options))
    train(base, train_file, None, "ensemble", tmp_path / "ensemble", quick_config("ensemble"))
    for sources, message in (
        ([lora], "an ensemble has 2 or more members"),
        ([lora, tmp_path / "narrow"], "differ in 2 modules"),
        ([lora, tmp_path / "ivon"], "has a posterior of kind diag"),
        ([lora, tmp_path / "ensemble"], "is an ensemble; give its members"),
    ):
        outcome = credence("import", *sources, "--format", "ensemble", "--output", tmp_path / "out")
        assert outcome.code == 1 and message in outcome.err and "Traceback" not in outcome.err
    outcome = credence("import", lora, lora, "--format", "peft", "--method", "map", "--output", tmp_path / "out")
    assert outcome.code == 1 and "2 adapters were given; format peft takes one" in outcome.err
    assert not (tmp_path / "out").exists()

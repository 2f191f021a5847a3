"""Deep and checkpoint ensembles: members trained side by side against members trained alone."""

from pathlib import Path

import pytest
import torch

from credence.adapters import load_artifact
from credence.adapters.kinds import EnsemblePosterior
from credence.training import trainer
from credence.training.errors import ConfigError
from credence.training.loop import train
from credence.training.methods import METHODS
from tests.training.conftest import METHOD_OPTIONS, quick_config

COMMON = ["train.max_steps=6", "train.batch_size=4", "train.max_grad_norm=0.05", "lora.r=4", "lora.alpha=8"]
ALONE = {
    "map": ["train.learning_rate=0.01"],
    "ivon": ["train.learning_rate=1", "train.max_grad_norm=0", "method.ess=1e5", "method.hess_init=1e-2"],
    "monteclora": ["train.learning_rate=0.01", "method.epsilon=0.05", "method.kl_weight=0.01"],
    "melora": ["train.learning_rate=0.01", "method.kl_weight=0.01"],
    "blob": ["train.learning_rate=0.01", "method.kl_weight=0.01"],
    "swa": ["train.learning_rate=0.01", "method.start=0", "method.interval=1"],
    "swag": ["train.learning_rate=0.01", "method.start=0", "method.interval=1"],
}


def of_members(options: list[str]) -> list[str]:
    """A method's options as those of an ensemble of it."""
    return [option.replace("method.", "method.settings.", 1) for option in options]


@pytest.mark.parametrize("member", list(ALONE))
@pytest.mark.parametrize("accumulation", [1, 2])
def test_members_are_the_adapters_trained_alone(
    member: str, accumulation: int, base: Path, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "SMALLEST_GROUP", 3)  # one row of each member
    options = [*COMMON, f"train.gradient_accumulation={accumulation}", *ALONE[member]]
    joint = quick_config("map", *of_members(options), "method.members=3", f"method.member={member}")
    result = train(base, train_file, None, "ensemble", tmp_path / "joint", joint, 5)
    ensemble = load_artifact(result.path)
    assert ensemble.num_distinct_samples == (3 if member in ("map", "swa") else None)
    losses = []
    for index in range(3):
        alone = train(
            base, train_file, None, member, tmp_path / f"alone{index}", quick_config("map", *options), 5 + index
        )
        artifact = load_artifact(alone.path)
        losses.append(alone.metrics["train"]["curve"])
        for name, posterior in ensemble.posteriors.items():
            assert isinstance(posterior, EnsemblePosterior)
            own = posterior.members[index]
            for got, expected in (
                (own.mean.A, artifact.mean[name].A),
                (own.mean.B, artifact.mean[name].B),
                *(
                    (tensor, artifact.posteriors[name].tensors()[key])
                    for key, tensor in own.posterior.tensors().items()
                ),
            ):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)
        if member == "map":
            sample = ensemble.draw(seed=9, index=index, tau=1.0)
            assert all(torch.equal(sample[name].A, ensemble.posteriors[name].members[index].mean.A) for name in sample)
    # The members differ by far more than rounding.
    first, second = (load_artifact(tmp_path / f"alone{index}").mean for index in (0, 1))
    assert all(float((first[name].A - second[name].A).abs().max()) > 0.05 for name in first)
    if ensemble.config.member is not None:
        assert ensemble.config.member.kind == artifact.config.kind
        assert ensemble.config.member.settings == artifact.config.settings


def test_a_joint_batch_is_split_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = torch.tensor([9, 2, 5, 7, 3, 4, 8, 6, 1, 9])  # five rows of each of two members
    mask = (torch.arange(9) < lengths[:, None]).long()
    batch = {"input_ids": torch.arange(90).view(10, 9), "attention_mask": mask, "labels": mask * 100}
    monkeypatch.setattr(trainer, "SMALLEST_GROUP", 5)
    short, long = trainer.by_length(batch, 2)
    assert short["attention_mask"].sum(1).tolist() == [2, 3, 5, 1, 4, 6]
    assert long["attention_mask"].sum(1).tolist() == [7, 9, 8, 9]
    assert short["input_ids"][:, 0].tolist() == [9 * row for row in (1, 4, 2, 8, 5, 7)]
    assert short["labels"].shape == (6, 6) and long["labels"].shape == (4, 9)
    monkeypatch.setattr(trainer, "SMALLEST_GROUP", 6)
    assert trainer.by_length(batch, 2) == [batch]
    assert trainer.by_length(batch, 1) == [batch]


def test_flipout_rows_stay_in_their_places(
    base: Path, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*COMMON, *ALONE["blob"], "method.flipout=true"]
    found = []
    for smallest in (3, 1000):
        monkeypatch.setattr(trainer, "SMALLEST_GROUP", smallest)
        joint = quick_config("map", *of_members(options), "method.members=3", "method.member=blob")
        found.append(train(base, train_file, None, "ensemble", tmp_path / str(smallest), joint, 5).digest)
    assert found[0] == found[1]


def test_the_mean_adapter_is_the_mean_of_the_products(base: Path, train_file: Path, tmp_path: Path) -> None:
    options = [*COMMON, *ALONE["map"], "method.members=3", "method.mean=exact"]
    exact = load_artifact(train(base, train_file, None, "ensemble", tmp_path / "a", quick_config("map", *options)).path)
    assert exact.config.mean == "exact" and exact.config.rank == 12 and exact.config.lora_alpha == 24
    assert exact.adapter_config["r"] == 12 and exact.adapter_config["lora_alpha"] == 24
    for name, posterior in exact.posteriors.items():
        products = [member.mean.B.double() @ member.mean.A.double() for member in posterior.members]  # type: ignore[attr-defined]
        mean = exact.mean[name].B.double() @ exact.mean[name].A.double()
        torch.testing.assert_close(mean, sum(products) / 3, rtol=1e-5, atol=1e-8)
    options.remove("method.mean=exact")
    first = load_artifact(train(base, train_file, None, "ensemble", tmp_path / "b", quick_config("map", *options)).path)
    assert first.config.mean == "first member" and first.config.rank == 4
    for name, posterior in first.posteriors.items():
        assert torch.equal(first.mean[name].A, posterior.members[0].mean.A)  # type: ignore[attr-defined]


def test_checkpoints_are_stages_of_one_run(base: Path, train_file: Path, tmp_path: Path) -> None:
    options = ["train.learning_rate=0.01", "train.max_steps=8", "lora.r=4", "train.lr_scheduler=constant"]
    config = quick_config("map", *options, "method.source=checkpoints", "method.members=2", "method.start=0.25")
    ensemble = load_artifact(train(base, train_file, None, "ensemble", tmp_path / "c", config, 3).path)
    for index, steps in enumerate((8, 5)):
        options[1] = f"train.max_steps={steps}"
        alone = load_artifact(
            train(
                base,
                train_file,
                None,
                "map",
                tmp_path / f"{steps}",
                quick_config("map", *options, "train.warmup_ratio=0"),
                3,
            ).path
        )
        for name, posterior in ensemble.posteriors.items():
            torch.testing.assert_close(posterior.members[index].mean.A, alone.mean[name].A)  # type: ignore[attr-defined]


def test_a_mixture_is_released(base: Path, train_file: Path, validation_file: Path, tmp_path: Path) -> None:
    options = of_members([*COMMON, *ALONE["ivon"]])
    config = quick_config(
        "map", *options, "method.members=2", "method.member=ivon", "release.ks=[2, 4]", "release.taus=[1]"
    )
    artifact = load_artifact(train(base, train_file, validation_file, "ensemble", tmp_path / "m", config).path)
    assert set(artifact.config.tau) == {2, 4}
    assert {point.value for point in artifact.config.tau[2].curve} >= {0.0, 1e-12, 1.0}
    assert artifact.config.member is not None and artifact.config.member.kind == "diag"
    points = quick_config("map", *COMMON, *ALONE["map"], "method.members=3", "release.ks=[2, 8]")
    artifact = load_artifact(train(base, train_file, validation_file, "ensemble", tmp_path / "p", points).path)
    # Eight samples of three members would count two of them three times: the fit is that of all three.
    assert {k: fit.value for k, fit in artifact.config.tau.items()} == {2: 1.0, 3: 1.0}
    assert set(artifact.calibration.temperature) == {0, 2, 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["method.member=ensemble"], "members of an ensemble can be of the methods map"),
        (["method.member=laplace"], "members of an ensemble can be of the methods map"),
        (["method.members=1"], "greater than or equal to 2"),
        (["method.settings.epsilon=1"], "unknown configuration key"),
        (["method.source=checkpoints", "method.member=ivon"], "checkpoints are those of map"),
        (["method.source=checkpoints", "method.members=5", "method.start=0.5"], "2 of 4 steps lie after method.start"),
        (["method.member=ivon", "train.max_grad_norm=1"], "takes 0 only"),
    ],
)
def test_refusals(options: list[str], message: str, base: Path, train_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        train(base, train_file, None, "ensemble", tmp_path / "out", quick_config("map", *options))
    assert not (tmp_path / "out").exists()


def test_every_method_that_can_be_a_member_is_tested() -> None:
    able = {name for name, method in METHODS.items() if method.can_be_member}
    assert able == set(ALONE)
    assert set(METHOD_OPTIONS) == set(METHODS)

"""Kind ensemble: members in turn, mixtures of posteriors, the exact mean, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from credence.adapters import (
    ArtifactError,
    LoraFactors,
    NoiseSource,
    PosteriorError,
    config_of_rank,
    delta,
    draw,
    load_artifact,
    write_artifact,
    write_sample,
)
from credence.adapters.kinds import EnsemblePosterior, Member, PointPosterior, exact_mean
from credence.adapters.precision import check_precision
from tests.tiny import make_artifact, random_factors, random_posterior

N_OUT, N_IN, RANK = 5, 7, 3


def members(form: str, count: int = 3) -> tuple[Member, ...]:
    generator = torch.Generator().manual_seed(1)
    means = [random_factors(N_OUT, N_IN, RANK, generator) for _ in range(count)]
    return tuple(Member(mean=mean, posterior=random_posterior(form, mean, generator)) for mean in means)


def test_sample_k_is_member_k_modulo_m() -> None:
    posterior = EnsemblePosterior(members=members("point"))
    mean = exact_mean([member.mean for member in posterior.members])
    for index in range(7):
        for tau in (1.0, 0.25):  # there is no variance to scale
            sample = draw(posterior, mean, NoiseSource(8, index), "m", tau)
            expected = posterior.members[index % 3].mean
            assert torch.equal(sample.A, expected.A) and torch.equal(sample.B, expected.B)
            assert sample.A.data_ptr() != expected.A.data_ptr(), "whoever changes a sample would change the ensemble"
    assert draw(posterior, mean, NoiseSource(8, 1), "m", 0.0) is mean
    assert not posterior.has_posteriors


@pytest.mark.parametrize("form", ["diag", "row", "core", "swag", "kronecker", "mask"])
def test_a_mixture_draws_from_its_members_posteriors(form: str) -> None:
    posterior = EnsemblePosterior(members=members(form))
    mean = exact_mean([member.mean for member in posterior.members])
    for index in (0, 1, 2, 4):
        member = posterior.members[index % 3]
        sample = draw(posterior, mean, NoiseSource(8, index), "m", 0.7)
        expected = draw(member.posterior, member.mean, NoiseSource(8, index), "m", 0.7)
        assert torch.equal(sample.A, expected.A) and torch.equal(sample.B, expected.B)
        assert not torch.equal(sample.A, member.mean.A)
    # Samples 1 and 4 belong to one member and are two draws.
    first, second = (draw(posterior, mean, NoiseSource(8, index), "m", 0.7) for index in (1, 4))
    assert not torch.equal(first.A, second.A)
    assert posterior.has_posteriors


def test_the_exact_mean_is_the_mean_of_the_products() -> None:
    means = [member.mean for member in members("point", 4)]
    mean = exact_mean(means)
    expected = np.zeros((N_OUT, N_IN))
    for pair in means:
        for i in range(N_OUT):
            for j in range(N_IN):
                expected[i, j] += sum(float(pair.B[i, k]) * float(pair.A[k, j]) for k in range(RANK)) / 4
    np.testing.assert_allclose((mean.B.double() @ mean.A.double()).numpy(), expected, rtol=1e-5, atol=1e-9)
    assert mean.rank == 4 * RANK
    average = sum(pair.B for pair in means) / 4 @ (sum(pair.A for pair in means) / 4)
    assert (
        float((average - torch.from_numpy(expected).float()).abs().max()) > 1e-3
    )  # the mean factors are something else


@pytest.mark.parametrize("form", ["ensemble", "mixture"])
def test_an_ensemble_survives_its_artifact(form: str, tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "a", form=form)
    again = load_artifact(tmp_path / "a")
    assert again.config.kind == "ensemble"
    assert again.num_distinct_samples == (3 if form == "ensemble" else None)
    for name, posterior in again.posteriors.items():
        for key, tensor in posterior.tensors().items():
            assert torch.equal(tensor, artifact.posteriors[name].tensors()[key])
    report = check_precision(again, tau=1.0)
    labels = {entry.module for entry in report.factors}
    assert labels == (
        set() if form == "ensemble" else {f"{name}, member {index}" for name in again.mean for index in range(3)}
    )


def test_an_exact_mean_has_a_rank_of_its_own(tmp_path: Path) -> None:
    given = make_artifact(tmp_path / "given", form="ensemble", rank=4, alpha=6)
    mean = {
        name: exact_mean([member.mean for member in posterior.members])  # type: ignore[attr-defined]
        for name, posterior in given.posteriors.items()
    }
    config = given.config.model_copy(update={"rank": 12, "lora_alpha": 18.0, "mean": "exact"})
    adapter_config = config_of_rank(given.adapter_config, mean)
    assert (adapter_config["r"], adapter_config["lora_alpha"]) == (12, 18)
    write_artifact(
        tmp_path / "exact", adapter_config=adapter_config, mean=mean, posteriors=given.posteriors, config=config
    )
    artifact = load_artifact(tmp_path / "exact")
    write_sample(tmp_path / "sample", artifact, seed=0, index=1, tau=1.0)
    text = (tmp_path / "sample/adapter_config.json").read_text()
    assert '"r": 4' in text and '"lora_alpha": 6' in text, "the sample's rank, and alpha in proportion"
    # On the merged model a sample is its difference from that mean.
    sample = artifact.draw(seed=0, index=1, tau=1.0)
    for name, pair in delta(sample, artifact.mean).items():
        assert pair.rank == 16
        expected = sample[name].B @ sample[name].A - artifact.mean[name].B @ artifact.mean[name].A
        torch.testing.assert_close(pair.B @ pair.A, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"must have one rank, got \[4, 12\]"):
        config_of_rank(adapter_config, {"a": next(iter(mean.values())), "b": next(iter(sample.values()))})


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    good = EnsemblePosterior(members=members("diag"))
    mean = good.members[0].mean
    good.check("m", mean)
    odd = Member(mean=random_factors(N_OUT, N_IN + 1, RANK, torch.Generator()), posterior=PointPosterior())
    with pytest.raises(PosteriorError, match=r"member 2 of m has factors of shapes \(3, 8\)"):
        EnsemblePosterior(members=(*good.members[:2], odd)).check("m", mean)
    narrow = LoraFactors(A=mean.A[:2], B=mean.B[:, :2])
    with pytest.raises(PosteriorError, match="member 1 of m has factors"):
        EnsemblePosterior(members=(good.members[0], replace(good.members[1], mean=narrow))).check("m", mean)
    broken = replace(good.members[1].posterior, log_sd_A=torch.zeros(1, 1))  # type: ignore[type-var]
    with pytest.raises(PosteriorError, match="log_sd_A for m, member 1 has shape"):
        EnsemblePosterior(members=(good.members[0], replace(good.members[1], posterior=broken))).check("m", mean)
    tensors = good.tensors()
    with pytest.raises(PosteriorError, match="needs the tensors A and B"):
        EnsemblePosterior.from_members({key: t for key, t in tensors.items() if key != "B"}, None)
    with pytest.raises(PosteriorError, match="needs the tensors A and B"):
        EnsemblePosterior.from_members(tensors, None)
    with pytest.raises(PosteriorError, match="stacked over its members, 2 or more"):
        EnsemblePosterior.from_members({"A": tensors["A"][:1], "B": tensors["B"][:1]}, None)
    with pytest.raises(PosteriorError, match="stacked over its members"):
        EnsemblePosterior.from_members({"A": tensors["A"], "B": tensors["B"][:2]}, None)
    artifact = make_artifact(tmp_path / "a", form="mixture")
    for change, message in (
        ({"settings": {"p": 0.1}}, "has no settings of its own"),
        ({"member": None}, "needs the tensors A and B"),
        ({"member": {"kind": "ensemble", "settings": {}}}, "cannot be of kind ensemble"),
    ):
        config = type(artifact.config).model_validate({**artifact.config.model_dump(), **change})
        with pytest.raises(ArtifactError, match=message):
            write_artifact(
                tmp_path / "bad",
                adapter_config=artifact.adapter_config,
                mean=artifact.mean,
                posteriors=artifact.posteriors,
                config=config,
            )

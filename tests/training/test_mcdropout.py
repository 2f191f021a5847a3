"""MC-dropout: the posterior's p is the training's dropout, and where there is none it is refused."""

from pathlib import Path

import pytest
import torch

from credence.adapters.artifact import load_artifact
from credence.adapters.kinds import MaskPosterior
from credence.adapters.posterior import LoraFactors
from credence.training.errors import ConfigError
from credence.training.loop import train
from credence.training.methods import McDropout
from credence.training.methods.base import NoSettings
from credence.training.modeling import MemberSite
from tests.training.conftest import quick_config


def test_it_is_map_with_dropout_and_a_posterior(base: Path, train_file: Path, tmp_path: Path) -> None:
    dropped = train(base, train_file, None, "mcdropout", tmp_path / "a", quick_config("mcdropout"))
    plain = train(base, train_file, None, "map", tmp_path / "b", quick_config("map", "lora.dropout=0.2"))
    artifact, reference = load_artifact(dropped.path), load_artifact(plain.path)
    assert artifact.config.kind == "mask" and artifact.config.settings == {"p": 0.2}
    for name, factors in reference.mean.items():
        assert torch.equal(artifact.mean[name].A, factors.A) and torch.equal(artifact.mean[name].B, factors.B)
        posterior = artifact.posteriors[name]
        assert isinstance(posterior, MaskPosterior) and posterior.p == 0.2
    sample = artifact.draw(seed=0, index=0, tau=1.0)
    share = torch.cat([(factors.A == 0).all(0) for factors in sample.values()]).float().mean()
    assert 0.05 < float(share) < 0.4


def test_without_dropout_it_is_refused(base: Path, train_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora\.dropout is 0; .* set lora\.dropout above 0") as caught:
        train(base, train_file, None, "mcdropout", tmp_path / "a", quick_config("mcdropout", "lora.dropout=0"))
    assert caught.value.key == "lora.dropout"


def test_members_of_an_ensemble_are_refused() -> None:
    site = MemberSite("m", LoraFactors(A=torch.ones(2, 3), B=torch.ones(4, 2)))
    with pytest.raises(ConfigError, match="cannot be a member of an ensemble"):
        McDropout(NoSettings(), [site])

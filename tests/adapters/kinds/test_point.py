"""Kind point: every draw is the mean."""

import pytest
import torch

from credence.adapters import KINDS, NoiseSource, PointPosterior, PosteriorError, draw
from tests.adapters.kinds.moments import MODULE, mean_factors


def test_every_draw_is_the_mean() -> None:
    mean = mean_factors()
    posterior = PointPosterior()
    posterior.check(MODULE, mean)
    assert posterior.noise(NoiseSource(0, 0), MODULE, mean) == {}
    for tau in (0.0, 1.0, 100.0):
        assert draw(posterior, mean, NoiseSource(4, 2), MODULE, tau) is mean


def test_it_stores_nothing() -> None:
    assert PointPosterior().tensors() == {}
    assert PointPosterior.from_tensors({}, {}) == PointPosterior()
    with pytest.raises(PosteriorError, match=r"kind point stores nothing, got \['log_sd_A', 'epsilon'\]"):
        PointPosterior.from_tensors({"log_sd_A": torch.zeros(1)}, {"epsilon": 1.0})


def test_the_kinds_are_registered_by_name() -> None:
    assert sorted(KINDS) == ["core", "diag", "lowrank", "mask", "point", "row"]
    assert all(cls.kind == name for name, cls in KINDS.items())

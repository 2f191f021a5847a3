"""What the comparison with PEFT's port says about the port is true of the PEFT that is installed."""

from pathlib import Path

import pytest
import torch
from peft.tuners.lora.monteclora import MontecloraSampler

from credence.adapters.kinds.row import kl_dirichlet
from credence.benchmarks import peft_monteclora
from credence.training.methods import monteclora

BASE = Path(__file__).parents[2] / "demo" / "model"


def test_the_imitated_terms_are_the_ports() -> None:
    sampler = MontecloraSampler(6, 3, peft_monteclora.COMPONENTS, buffer_size=1, device="cpu")
    beta = torch.tensor([0.3, -0.2, 0.9, 0.1])
    expected = float(sampler.dirichlet_kl(beta.exp()))
    assert float(peft_monteclora.wrong_dirichlet(beta, 1.0)) == pytest.approx(expected, abs=1e-5)
    assert float(kl_dirichlet(beta, 1.0)) != pytest.approx(expected, abs=1e-2)
    variances = torch.tensor([0.5, 1.5, 4.0])
    expected = float(sampler.multivariate_kl(torch.diag(variances)))
    assert float(peft_monteclora.normal_of_every_component(variances)) == pytest.approx(expected, rel=1e-5)


def test_a_term_is_put_back_after_its_run() -> None:
    original = monteclora.kl_dirichlet
    with peft_monteclora.replaced("kl_dirichlet", peft_monteclora.wrong_dirichlet):
        assert monteclora.kl_dirichlet is peft_monteclora.wrong_dirichlet
    assert monteclora.kl_dirichlet is original


def test_gradient_checkpointing_changes_the_ports_gradient_and_not_ours() -> None:
    port, ours = peft_monteclora.checkpointing_error(BASE)
    assert port > 1e-3
    assert ours == 0.0


def test_the_faults_of_the_port() -> None:
    usual, low_memory = peft_monteclora.reloaded_difference(BASE)
    assert usual == 0.0
    assert low_memory > 0.0
    assert "Error" in peft_monteclora.low_precision(BASE)
    some, every = peft_monteclora.overflowing_components(starts=5)
    assert 2 < some <= every
    n_in, rank, components = 7, 3, 5
    expected = 11 * 4 * (components * n_in * rank + rank * rank + components)
    assert peft_monteclora.buffer_bytes(n_in, rank, components, 11) == expected

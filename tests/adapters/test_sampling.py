"""The noise convention philox4x64-sha256-numpy-v1: fixed streams, pure draws, independent keys, right moments.

The golden values are part of the artifact format: if they change (a numpy release, an edit here), every served sample changes with
them, and the convention needs a new name.
"""

import hashlib
import itertools
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from credence.adapters.config import PosteriorConfig
from credence.adapters.sampling import GENERATOR, NoiseSource, inverse_cdf, token_uniform

Q_PROJ, DOWN_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.31.mlp.down_proj"


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


@pytest.mark.parametrize(
    ("source", "module", "stream", "golden"),
    [
        (NoiseSource(0, 0), Q_PROJ, "A", [[1.094872, -0.206158921], [0.198696628, -1.67434835]]),
        (NoiseSource(0, 1), Q_PROJ, "A", [[-0.336315006, 1.63827562], [0.879751623, 0.0952631459]]),
        (NoiseSource(12345, 7, "train"), DOWN_PROJ, "z", [[0.666373193, -0.542899668], [-1.45618951, 2.30162287]]),
        (NoiseSource(2**40, 0), "m", "B", [[0.714198828, 0.535597742], [-0.821552217, -0.115101799]]),
    ],
)
def test_golden_normals(source: NoiseSource, module: str, stream: str, golden: list[list[float]]) -> None:
    drawn = source.normal(module, stream, (2, 2))
    assert drawn.dtype == torch.float32 and drawn.device.type == "cpu"
    assert torch.equal(drawn, torch.tensor(golden))


@pytest.mark.parametrize(
    ("source", "module", "dof", "golden"),
    [
        (NoiseSource(0, 0), Q_PROJ, 16.0, [9.54574871, 10.0454226, 14.5470514]),
        (NoiseSource(0, 1), Q_PROJ, 16.0, [8.24095726, 17.4716396, 7.69756126]),
        (NoiseSource(12345, 7, "train"), DOWN_PROJ, 2.5, [0.239838585, 0.571488082, 5.82678127]),
        (NoiseSource(1, 2), "m", 0.7, [2.66347814, 0.0791254863, 2.15233445]),
    ],
)
def test_golden_chi_squares(source: NoiseSource, module: str, dof: float, golden: list[float]) -> None:
    drawn = source.chi2(module, "chi2", dof, 3)
    assert drawn.dtype == torch.float32 and drawn.device.type == "cpu"
    assert torch.equal(drawn, torch.tensor(golden))


def test_golden_streams() -> None:
    """4096 values each: the rejection steps and the tails of both samplers are in them."""
    source = NoiseSource(3, 4)
    digests = [
        hashlib.sha256(bits(tensor)).hexdigest()
        for tensor in (source.normal("m", "z", (4096,)), source.chi2("m", "chi2", 8.0, 4096))
    ]
    assert digests == [
        "47830f16fc3a0b62b236257e9d60369a86155d0a8b1941324ca7a6a6fe0823bb",
        "7f3217ab5356102561a57e9243380315dd25dcecf1a9b2b6a9f9c2fa9c40d787",
    ]


def test_artifacts_name_this_convention() -> None:
    assert PosteriorConfig.model_fields["generator"].default == GENERATOR


def test_a_draw_depends_on_nothing_but_its_key() -> None:
    source = NoiseSource(5, 2)
    first = source.normal("a", "A", (3, 4))
    others = [source.chi2("a", "chi2", 4.0, 9), source.normal("b", "A", (100,))]
    torch.manual_seed(99)
    again = source.normal("a", "A", (3, 4))
    fresh = NoiseSource(5, 2).normal("a", "A", (3, 4))
    assert torch.equal(first, again) and torch.equal(first, fresh)
    first.zero_()  # a caller's change stays with the caller
    assert torch.equal(source.normal("a", "A", (3, 4)), again)
    assert torch.equal(others[0], NoiseSource(5, 2).chi2("a", "chi2", 4.0, 9))


def test_drawing_leaves_torchs_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    NoiseSource(0, 0).normal("a", "A", (10,))
    assert torch.equal(before, torch.get_rng_state())


def test_another_process_draws_the_same_bits() -> None:
    program = (
        "from credence.adapters.sampling import NoiseSource as S; s = S(8, 3);"
        "print((s.normal('m.x', 'A', (7, 5)).numpy().tobytes() + s.chi2('m.x', 'c', 2.5, 6).numpy().tobytes()).hex())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    source = NoiseSource(8, 3)
    assert (
        done.stdout.strip() == (bits(source.normal("m.x", "A", (7, 5))) + bits(source.chi2("m.x", "c", 2.5, 6))).hex()
    )


def test_every_part_of_the_key_gives_an_independent_stream() -> None:
    """Correlations of n = 20,000 normals have standard error 1/sqrt(n) = 0.0071; 55 pairs, bound 4.5 standard errors."""
    n = 20_000
    streams = [
        NoiseSource(*args).normal(module, stream, (n,))  # type: ignore[arg-type]
        for args, module, stream in (
            ((0, 0), "layers.0", "A"),
            ((0, 0), "layers.0", "B"),
            ((0, 0), "layers.1", "A"),
            ((0, 0), "layers.10", "A"),
            ((0, 1), "layers.0", "A"),
            ((0, 10), "layers.0", "A"),
            ((1, 0), "layers.0", "A"),
            ((10, 0), "layers.0", "A"),
            ((1, 1), "layers.0", "A"),
            ((0, 0, "train"), "layers.0", "A"),
            ((0, 1, "train"), "layers.0", "A"),
        )
    ]
    correlation = torch.corrcoef(torch.stack(streams).double())
    off_diagonal = correlation - torch.eye(len(streams), dtype=torch.float64)
    assert float(off_diagonal.abs().max()) < 4.5 / n**0.5
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(streams, 2))


def test_neighbouring_parts_of_the_key_do_not_run_together() -> None:
    """(seed 1, index 11) and (seed 11, index 1), module "a" + stream "bc" and "ab" + "c" are different keys."""
    assert not torch.equal(NoiseSource(1, 11).normal("m", "A", (4,)), NoiseSource(11, 1).normal("m", "A", (4,)))
    assert not torch.equal(NoiseSource(0, 0).normal("a", "bc", (4,)), NoiseSource(0, 0).normal("ab", "c", (4,)))


def test_moments_of_the_normals() -> None:
    """n = 400,000: standard errors 1/sqrt(n) of the mean, sqrt(2/n) of the variance, sqrt(24/n) of the kurtosis; bound 4."""
    n = 400_000
    drawn = NoiseSource(1, 0).normal("m", "A", (400, 1000)).double().flatten()
    assert abs(float(drawn.mean())) < 4 / n**0.5
    assert float(drawn.var()) == pytest.approx(1, abs=4 * (2 / n) ** 0.5)
    standard = (drawn - drawn.mean()) / drawn.std()
    assert abs(float((standard**3).mean())) < 4 * (6 / n) ** 0.5
    assert float((standard**4).mean()) == pytest.approx(3, abs=4 * (24 / n) ** 0.5)


@pytest.mark.parametrize("dof", [0.7, 1.0, 2.5, 8.0, 16.0, 33.3, 4096.0])
def test_moments_of_the_chi_squares(dof: float) -> None:
    """Mean dof, variance 2 dof, excess kurtosis 12 / dof; n = 200,000, bound 4 standard errors of mean and variance.

    The standard error of the variance is sqrt((kurtosis - 1) / n) times it. The sample kurtosis has heavy tails; its bound is coarse.
    """
    n = 200_000
    drawn = NoiseSource(2, 0).chi2("m", "chi2", dof, n).double()
    excess = 12 / dof
    assert float(drawn.min()) >= 0
    assert float(drawn.mean()) == pytest.approx(dof, abs=4 * (2 * dof / n) ** 0.5)
    assert float(drawn.var()) == pytest.approx(2 * dof, rel=4 * ((excess + 2) / n) ** 0.5)
    standard = (drawn - drawn.mean()) / drawn.std()
    assert float((standard**4).mean()) == pytest.approx(3 + excess, rel=0.1)


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (0, -1)])
def test_negative_numbers_are_refused(seed: int, index: int) -> None:
    with pytest.raises(ValueError, match=f"0 or more, got seed={seed}, index={index}"):
        NoiseSource(seed, index)


def test_token_uniforms_are_uniform_and_pinned() -> None:
    values = torch.tensor([token_uniform(seed, step) for seed in range(200) for step in range(50)], dtype=torch.float64)
    assert values.min() >= 0 and values.max() < 1
    counts = torch.histc(values, bins=20, min=0, max=1)
    assert (((counts - 500) ** 2) / 500).sum() < 60
    # Served answers with a seed must not change between releases.
    assert token_uniform(0, 0) == pytest.approx(PINNED[0], abs=0) and token_uniform(2**64 - 1, 12345) == pytest.approx(
        PINNED[1], abs=0
    )
    for seed, step in ((-1, 0), (2**64, 0), (0, -1)):
        with pytest.raises(ValueError, match="seed must be in"):
            token_uniform(seed, step)


PINNED = (0.4048814919348268, 0.09777638010534451)


def test_seeds_of_texts_are_distinct_and_pinned() -> None:
    seeds = {
        NoiseSource(s, index, "tokens").token_seed(str(row))
        for s in range(3)
        for index in range(5)
        for row in range(50)
    }
    assert len(seeds) == 3 * 5 * 50 and all(0 <= seed < 2**63 for seed in seeds)
    assert NoiseSource(0, 0, "tokens").token_seed("0") == PINNED_TOKEN_SEED


PINNED_TOKEN_SEED = 7024483617008254031


def test_inverse_cdf_draws_each_position_by_its_weight() -> None:
    weights = torch.tensor([[0.0, 1.0, 3.0, 0.0], [2.0, 0.0, 0.0, 2.0]], dtype=torch.float64)
    for u, expected in (
        (0.0, [1, 0]),
        (0.2499, [1, 0]),
        (0.25, [2, 0]),
        (0.4999, [2, 0]),
        (0.5, [2, 3]),
        (0.9999, [2, 3]),
    ):
        assert inverse_cdf(weights, torch.full((2, 1), u)).tolist() == expected
        assert [int(inverse_cdf(row, u)) for row in weights] == expected

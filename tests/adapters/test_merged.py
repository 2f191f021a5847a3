"""The merged layout: deltas against their definition, merged weights against exact sums, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from credence.adapters import (
    Artifact,
    ArtifactError,
    BaseModelRef,
    DiagPosterior,
    LoraFactors,
    NoiseSource,
    PointPosterior,
    Posterior,
    PosteriorError,
    RowPosterior,
    config_of_rank,
    delta,
    draw,
    is_merged,
    load_artifact,
    load_merged,
    merge,
    write_delta,
    write_sample,
)
from credence.adapters.merged import MergedDtype, MergeReport, delta_rank
from tests.tiny import ALPHA, HIDDEN, INTERMEDIATE, LAYERS, RANK, SHAPES, make_artifact, make_model

LINEAR = {f"model.layers.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in SHAPES.items()}
Q_PROJ = "model.layers.0.self_attn.q_proj"
R, N_OUT, N_IN = 3, 40, 24


def mean_of(seed: int = 0, *, n_out: int = N_OUT, n_in: int = N_IN, r: int = R) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    return LoraFactors(
        A=0.2 * torch.randn(r, n_in, generator=generator), B=0.1 * torch.randn(n_out, r, generator=generator)
    )


def posterior_of(kind: str, mean: LoraFactors) -> Posterior:
    log_sd_A, log_sd_B = torch.full_like(mean.A, -3.0), torch.full_like(mean.B, -4.0)
    posteriors: dict[str, Posterior] = {
        "diag": DiagPosterior(log_sd_A=log_sd_A, log_sd_B=log_sd_B),
        "diag A": DiagPosterior(log_sd_A=log_sd_A),
        "diag B": DiagPosterior(log_sd_B=log_sd_B),
        "row": RowPosterior(rho=torch.zeros(mean.rank), beta=torch.zeros(4), epsilon=0.05, dof=float(mean.rank)),
        "point": PointPosterior(),
    }
    return posteriors[kind]


def draw_modules(
    kinds: dict[str, str], tau: float = 1.0, index: int = 0
) -> tuple[dict[str, LoraFactors], dict[str, LoraFactors]]:
    """Means of different shapes and their sample, by module; ``kinds`` names each module's posterior."""
    means = {
        module: mean_of(number, n_out=N_OUT + 8 * number, n_in=N_IN + 4 * number) for number, module in enumerate(kinds)
    }
    sample = {
        module: draw(posterior_of(kind, means[module]), means[module], NoiseSource(3, index), module, tau)
        for module, kind in kinds.items()
    }
    return sample, means


def product(factors: LoraFactors) -> torch.Tensor:
    return factors.B.double() @ factors.A.double()


@pytest.mark.parametrize("tau", [0.25, 1.0, 100.0])
@pytest.mark.parametrize(
    ("kind", "rank"), [("diag", 2 * R), ("diag A", R), ("diag B", 2 * R), ("row", R), ("point", R)]
)
def test_the_product_is_the_difference_of_the_products(kind: str, rank: int, tau: float) -> None:
    sample, mean = draw_modules({"m0": kind, "m1": kind}, tau)
    factors = delta(sample, mean)
    for module, pair in factors.items():
        assert pair.A.shape == (rank, mean[module].A.shape[1]) and pair.B.shape == (mean[module].B.shape[0], rank)
        assert pair.A.dtype == pair.B.dtype == torch.float32
        expected = product(sample[module]) - product(mean[module])
        # Only the subtractions A_s - A and B_s - B round.
        size = (sample[module].B.abs().double() @ (sample[module].A.abs() + mean[module].A.abs()).double()).max()
        torch.testing.assert_close(product(pair), expected, rtol=0, atol=2.0**-23 * float(size))
        assert kind == "point" or float(expected.abs().max()) > 1e-3, "there is no noise: the comparison proves nothing"


def test_one_module_with_a_random_B_widens_all_of_them() -> None:
    sample, mean = draw_modules({"m0": "row", "m1": "diag", "m2": "point"})
    factors = delta(sample, mean)
    assert {pair.rank for pair in factors.values()} == {2 * R}
    for module, pair in factors.items():
        torch.testing.assert_close(product(pair), product(sample[module]) - product(mean[module]), rtol=0, atol=1e-6)
    assert not product(factors["m2"]).any(), "a module without noise adds nothing, not even rounding"


@pytest.mark.parametrize("kind", ["diag", "row", "point"])
def test_at_tau_0_the_delta_is_exactly_zero_and_narrow(kind: str) -> None:
    factors = delta(*draw_modules({"m0": kind, "m1": kind}, tau=0.0))
    for pair in factors.values():
        assert pair.rank == R and not pair.A.any() and not product(pair).any()


def test_samples_of_other_modules_or_shapes_are_refused() -> None:
    sample, mean = draw_modules({"m0": "row", "m1": "row"})
    with pytest.raises(PosteriorError, match="differ in 1 modules, first m1"):
        delta({"m0": sample["m0"]}, mean)
    with pytest.raises(PosteriorError, match=r"m1: the sample has A \(3, 24\)"):
        delta({**sample, "m1": sample["m0"]}, mean)


@pytest.mark.parametrize(("kind", "times"), [("row", 1), ("diag", 2)])
@pytest.mark.parametrize("alpha", [5, 0.75])
def test_the_configuration_keeps_the_scale(kind: str, times: int, alpha: float) -> None:
    config = {"peft_type": "LORA", "r": R, "lora_alpha": alpha, "target_modules": ["q_proj"]}
    changed = config_of_rank(config, delta(*draw_modules({"m0": kind})))
    assert changed == {**config, "r": times * R, "lora_alpha": times * alpha}
    assert type(changed["lora_alpha"]) is type(alpha) and changed["lora_alpha"] / changed["r"] == alpha / R
    assert config["r"] == R, "the artifact's own configuration is left alone"


@pytest.mark.parametrize(("kind", "rank"), [("row", 4), ("diag", 8), ("point", 4)])
@pytest.mark.parametrize("noise", [1.0, 1e-12])
def test_the_widest_rank_is_known_before_any_draw(tmp_path: Path, kind: str, rank: int, noise: float) -> None:
    """Also where the noise at tau = 1 rounds away, and at a larger tau does not."""
    artifact = make_artifact(tmp_path / "a", form=kind, rank=4, noise=noise)
    assert delta_rank(artifact) == rank
    for tau in (0.0, 1.0, 1e8):
        factors = delta(artifact.draw(seed=1, index=2, tau=tau), artifact.mean)
        assert {pair.rank for pair in factors.values()} <= {artifact.config.rank, rank}


# Merged folders


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def sharded(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in several bfloat16 shards, with one tensor the base keeps in float32."""
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base") / "sharded"
    LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="200KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"]["model.norm.weight"]
    tensors = load_file(shard)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float() + 1e-4
    save_file(tensors, shard, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("artifacts")
    return {kind: make_artifact(folder / kind, form=kind) for kind in ("diag", "row", "point")}


def run(adapter: Path, base: Path, output: Path, dtype: MergedDtype | None = None, **changes: Any) -> MergeReport:
    options = {"linear_modules": LINEAR, "base_model": BaseModelRef(name="tiny"), "name": "triage", **changes}
    return merge(adapter, base, output, dtype=dtype, **options)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def merged(base: Path, artifacts: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with the mean of ``diag``, float32. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("merged") / "model"
    run(artifacts["diag"].path, base, folder)
    return folder


@pytest.mark.parametrize(
    ("source", "dtype", "eps"),
    [("base", "float32", 2.0**-23), ("base", "bfloat16", 2.0**-7), ("sharded", "bfloat16", 2.0**-7)],
)
def test_weights_are_the_exact_sums_rounded_once(
    request: pytest.FixtureRequest,
    artifacts: dict[str, Artifact],
    tmp_path: Path,
    source: str,
    dtype: MergedDtype,
    eps: float,
) -> None:
    folder: Path = request.getfixturevalue(source)
    artifact = artifacts["diag"]
    report = run(artifact.path, folder, tmp_path / "out", dtype)
    before, after = weights_of(folder), weights_of(tmp_path / "out")
    assert set(before) == set(after)
    moved = 0.0
    for key, weight in before.items():
        module = key.removesuffix(".weight")
        if module not in artifact.mean:
            kept = source == "sharded" and key == "model.norm.weight"
            assert torch.equal(after[key], weight if kept else weight.to(getattr(torch, dtype)))
            continue
        assert after[key].dtype == getattr(torch, dtype)
        pair = artifact.mean[module]
        update = ALPHA / RANK * np.einsum("or,ri->oi", pair.B.double().numpy(), pair.A.double().numpy())
        exact = weight.double().numpy() + update
        half_ulp = eps / 2 * 2.0 ** np.floor(np.log2(np.abs(exact)))
        error = after[key].double().numpy() - exact
        # A half, and the float32 that torch rounds to on the way from float64 to bfloat16.
        assert (np.abs(error) <= half_ulp * (1 + 1e-4)).all()
        expected = np.linalg.norm(error) / np.linalg.norm(update)
        assert report.rounding[module] == pytest.approx(expected, rel=1e-9)
        moved = max(moved, float(np.abs(update).max()))
    assert set(report.rounding) == set(artifact.mean)
    assert moved > 0.1, "the mean changes nothing: the comparison proves nothing"


def test_the_folder_is_a_whole_model_with_its_artifact(
    sharded: Path, base: Path, artifacts: dict[str, Artifact], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(sharded, source)
    for path in base.glob("tokenizer*"):
        shutil.copy(path, source)
    config = json.loads((source / "config.json").read_text())
    nested = {"vision_config": {"torch_dtype": "bfloat16", "width": 1}, "auto_map": {"AutoModel": "code.Model"}}
    (source / "config.json").write_text(json.dumps({**config, **nested}))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    for name in ("LICENSE", "code.py", "pytorch_model.bin", "adapter_config.json", "README.md", "params.json"):
        (source / name).write_text("{}")
    report = run(artifacts["row"].path, source, tmp_path / "out", "float32")
    out = tmp_path / "out"
    shards = {path.name for path in source.glob("model-*.safetensors")}
    assert len(shards) > 2
    assert {path.name for path in out.iterdir()} == shards | {
        "LICENSE", "additional_chat_templates", "chat_template.jinja", "config.json", "credence", "credence_merged.json",
        "generation_config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    for name in ("tokenizer.json", "LICENSE", "chat_template.jinja", "additional_chat_templates/tools.jinja"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((out / "config.json").read_text()) == {
        **config,
        "dtype": "float32",
        "vision_config": {"torch_dtype": "float32", "width": 1},
    }
    before, after = (json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (source, out))
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights_of(out).values())
    original = artifacts["row"]
    for path in original.path.iterdir():
        assert (out / "credence" / path.name).read_bytes() == path.read_bytes()
    model = load_merged(out, store=tmp_path / "store")
    assert model.artifact.digest == report.model.artifact.digest == original.digest
    assert model.artifact.path == tmp_path / "store" / original.digest.removeprefix("sha256:")
    assert (model.name, model.dtype, model.rank) == ("triage", "float32", RANK)
    assert set(model.manifest.weights) == shards | {"model.safetensors.index.json"}
    assert is_merged(out) and not is_merged(source) and not is_merged(original.path)


def test_the_dtype_of_a_configuration_without_one_is_written(
    base: Path, artifacts: dict[str, Artifact], tmp_path: Path
) -> None:
    from transformers import AutoConfig

    source = tmp_path / "source"
    shutil.copytree(base, source)
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config))
    run(artifacts["row"].path, source, tmp_path / "out", "bfloat16")
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["diag", "row", "point"])
def test_merged_mean_and_deltas_are_the_adapter_on_its_base(
    base: Path, artifacts: dict[str, Artifact], tmp_path: Path, kind: str
) -> None:
    """PEFT's view: logits of OUT are those of base + mean; of OUT + delta those of base + sample."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    artifact, out = artifacts[kind], tmp_path / "out"
    run(artifact.path, base, out)
    tokens = torch.arange(3, 40)[None]

    def logits(model: Path, adapter: Path | None) -> torch.Tensor:
        loaded = LlamaForCausalLM.from_pretrained(model)
        assert loaded.dtype == torch.float32
        with torch.no_grad():
            found: torch.Tensor = (loaded if adapter is None else PeftModel.from_pretrained(loaded, adapter))(
                input_ids=tokens
            ).logits
        return found

    mean = logits(base, artifact.path)
    torch.testing.assert_close(logits(out, None), mean, rtol=0, atol=1e-4)
    assert float((mean - logits(base, None)).abs().max()) > 0.1, "the mean changes nothing"
    for index, tau in ((0, 1.0), (1, 0.25), (0, 0.0)):
        write_sample(tmp_path / f"sample-{index}-{tau}", artifact, seed=4, index=index, tau=tau)
        write_delta(tmp_path / f"delta-{index}-{tau}", artifact, seed=4, index=index, tau=tau)
        sample = logits(base, tmp_path / f"sample-{index}-{tau}")
        torch.testing.assert_close(logits(out, tmp_path / f"delta-{index}-{tau}"), sample, rtol=0, atol=1e-4)
        assert kind == "point" or tau == 0 or float((sample - mean).abs().max()) > 0.1, "the sample is the mean"
    config = json.loads((tmp_path / "delta-0-1.0" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == ((2 * RANK, 2 * ALPHA) if kind == "diag" else (RANK, ALPHA))


def edit_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")

    return apply


def bad_index(weight_map: object) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map})) and None
    )


@pytest.mark.parametrize(
    ("change", "reason", "message"),
    [
        (edit_config(quantization_config={"bits": 4}), "unsupported", "is a quantised model"),
        (lambda f: (f / "config.json").unlink(), "missing", "config.json is missing"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "missing", "has neither model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x"), "malformed", "cannot be read as safetensors"),
        (lambda f: (f / "credence_merged.json").write_text("{}"), "unsupported", "is a merged model already"),
        (bad_index({"lm_head.weight": "../model.safetensors"}), "malformed", "weight_map must name"),
        (bad_index({"lm_head.weight": "model.bin"}), "malformed", "weight_map must name"),
        (bad_index({"lm_head.weight": "model.safetensors"}), "malformed", "differ in 20 tensors"),
        (bad_index({"lm_head.weight": "other.safetensors"}), "missing", "other.safetensors is missing"),
        (
            edit_tensors(lambda t: {k: v for k, v in t.items() if k != f"{Q_PROJ}.weight"}),
            "unsupported",
            f"{Q_PROJ} has no weight of its name",
        ),
        (
            edit_tensors(lambda t: {**t, f"{Q_PROJ}.weight": torch.zeros(HIDDEN, INTERMEDIATE)}),
            "wrong_shape",
            r"q_proj is \(96, 160\) in .*, the adapter is for \(128, 96\): this is not the adapter's base model",
        ),
        (
            edit_tensors(lambda t: {**t, f"{Q_PROJ}.weight": t[f"{Q_PROJ}.weight"].to(torch.int8)}),
            "unsupported",
            "q_proj.weight is I8; merging needs floating-point weights",
        ),
        (
            edit_tensors(lambda t: {**t, f"{Q_PROJ}.weight": torch.full_like(t[f"{Q_PROJ}.weight"], torch.inf)}),
            "not_finite",
            "q_proj.weight of .* is not finite in bfloat16 after merging",
        ),
        (
            edit_tensors(lambda t: {**t, "model.norm.weight": torch.full_like(t["model.norm.weight"], 3.4e38)}),
            "not_finite",
            "model.norm.weight of .* is not finite in bfloat16",
        ),
    ],
)  # fmt: skip
def test_a_base_that_does_not_fit_is_refused_and_nothing_is_written(
    base: Path,
    artifacts: dict[str, Artifact],
    tmp_path: Path,
    change: Callable[[Path], None],
    reason: str,
    message: str,
) -> None:
    source = tmp_path / "source"
    shutil.copytree(base, source)
    change(source)
    with pytest.raises(ArtifactError, match=message) as failure:
        run(artifacts["row"].path, source, tmp_path / "out", "bfloat16")
    assert failure.value.reason == reason
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_infinite_constant_of_the_base_is_its_own_business(
    base: Path, artifacts: dict[str, Artifact], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(base, source)
    edit_tensors(lambda t: {**t, "mask": torch.full((4,), -torch.inf), "ids": torch.arange(5)})(source)
    run(artifacts["row"].path, source, tmp_path / "out", "bfloat16")
    found = weights_of(tmp_path / "out")
    assert found["mask"].dtype == torch.bfloat16 and found["ids"].dtype == torch.int64


@pytest.mark.parametrize(
    ("modules", "reason", "message"),
    [
        ({k: v for k, v in LINEAR.items() if k != Q_PROJ}, "unsupported", f"changes {Q_PROJ}, .* has no plain linear layer"),
        ({**LINEAR, Q_PROJ: (HIDDEN, 128)}, "wrong_shape", "this is not the adapter's base model"),
    ],
)  # fmt: skip
def test_modules_that_are_not_plain_linear_layers_are_refused(
    base: Path,
    artifacts: dict[str, Artifact],
    tmp_path: Path,
    modules: dict[str, tuple[int, ...]],
    reason: str,
    message: str,
) -> None:
    with pytest.raises(ArtifactError, match=message) as failure:
        run(artifacts["row"].path, base, tmp_path / "out", linear_modules=modules)
    assert failure.value.reason == reason and not any(tmp_path.iterdir())


def test_the_dtype_is_the_bases_own_and_float16_needs_a_choice(
    base: Path, sharded: Path, artifacts: dict[str, Artifact], tmp_path: Path
) -> None:
    assert run(artifacts["row"].path, base, tmp_path / "a").model.dtype == "float32"
    assert run(artifacts["row"].path, sharded, tmp_path / "b").model.dtype == "bfloat16"
    half = tmp_path / "half"
    shutil.copytree(base, half)
    edit_tensors(lambda tensors: {key: tensor.half() for key, tensor in tensors.items()})(half)
    with pytest.raises(ArtifactError, match="torch.float16 weights; say which dtype"):
        run(artifacts["row"].path, half, tmp_path / "c")
    run(artifacts["row"].path, half, tmp_path / "c", "float32")
    assert {tensor.dtype for tensor in weights_of(tmp_path / "c").values()} == {torch.float32}


@pytest.mark.parametrize("name", ["Triage", "", "a/b", "-a", "a" * 65, "a\n"])
def test_names_that_cannot_be_served_are_refused(
    base: Path, artifacts: dict[str, Artifact], tmp_path: Path, name: str
) -> None:
    with pytest.raises(ValueError, match="must match"):
        run(artifacts["row"].path, base, tmp_path / "out", name=name)


def test_a_folder_with_something_in_it_is_left_alone(
    base: Path, artifacts: dict[str, Artifact], tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ArtifactError, match="choose another folder") as failure:
        run(artifacts["row"].path, base, tmp_path)
    assert failure.value.reason == "exists"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "reason", "message"),
    [
        (lambda f: flip_last_byte(f / "model.safetensors"), "hash_mismatch", "model.safetensors is not the file"),
        (lambda f: (f / "model.safetensors").unlink(), "missing", r"lacks the weight files \['model.safetensors'\]"),
        (lambda f: (f / "more.safetensors").touch(), "malformed", r"has \['more.safetensors'\] that `credence merge`"),
        (lambda f: (f / "model.pt").touch(), "malformed", "did not write"),
        (lambda f: flip_last_byte(f / "credence" / "posterior.safetensors"), "hash_mismatch", "posterior.safetensors"),
        (lambda f: (f / "credence_merged.json").write_text("{}"), "malformed", "name: Field required"),
        (lambda f: (f / "credence_merged.json").unlink(), "missing", "credence_merged.json is missing"),
    ],
)
def test_a_changed_folder_is_refused(
    merged: Path, tmp_path: Path, change: Callable[[Path], object], reason: str, message: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(merged, folder)
    load_merged(folder)
    change(folder)
    with pytest.raises(ArtifactError, match=message) as failure:
        load_merged(folder)
    assert failure.value.reason == reason


def test_another_good_artifact_beside_the_weights_is_refused(
    merged: Path, artifacts: dict[str, Artifact], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(merged, folder)
    shutil.rmtree(folder / "credence")
    shutil.copytree(artifacts["row"].path, folder / "credence")
    load_artifact(folder / "credence")
    with pytest.raises(ArtifactError, match="the weights were merged with sha256:") as failure:
        load_merged(folder, verify_weights=False)
    assert failure.value.reason == "hash_mismatch"


# Why the layout exists


def served(factors: LoraFactors, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B as vLLM holds them in bfloat16: cast, then B times lora_alpha / r in that dtype. Returned in float64."""
    A, B = factors.A.bfloat16(), factors.B.bfloat16()
    B *= scaling
    return A.double(), B.double()


def test_small_noise_drowns_in_the_shared_layout_and_survives_in_the_delta_layout() -> None:
    """MonteCLoRA's published epsilon on a trained A (entries of 0.2): the noise is 15 times smaller than bfloat16's ulp there."""
    scaling, r = 2.0, 16
    mean = mean_of(1, n_out=96, n_in=128, r=r)
    posterior = RowPosterior(rho=torch.zeros(r), beta=torch.zeros(4), epsilon=2.5e-5, dof=float(r))
    mean_A, mean_B = served(mean, scaling)
    survived, shared_error, delta_error, ratio = [], [], [], []
    for index in range(8):
        sample = draw(posterior, mean, NoiseSource(0, index), "m", 1.0)
        exact = scaling * (product(sample) - product(mean))
        shared_A, shared_B = served(sample, scaling)
        shared = shared_B @ shared_A - mean_B @ mean_A
        delta_A, delta_B = served(delta({"m": sample}, {"m": mean})["m"], scaling)
        alone = delta_B @ delta_A
        survived.append(float((shared_A != mean_A).double().mean()))
        shared_error.append(float((shared - exact).norm() / exact.norm()))
        delta_error.append(float((alone - exact).norm() / exact.norm()))
        ratio.append(float(alone.std() / exact.std()))
    assert max(survived) < 0.2, "four of five entries of A are served as the mean's"
    assert min(shared_error) > 1, "what is left of the noise is rounding, larger than the noise"
    assert max(delta_error) < 0.01
    assert ratio == pytest.approx([1.0] * 8, abs=0.01)

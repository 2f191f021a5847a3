"""A tiny random Llama with grouped-query attention, its tokenizer and artifacts that fit it, for tests that run real engines."""

import math
from pathlib import Path
from typing import Any

import torch

from credence.adapters import (
    Artifact,
    BaseModelRef,
    Calibration,
    CorePosterior,
    DiagPosterior,
    EnsemblePosterior,
    Fit,
    KroneckerPosterior,
    LoraFactors,
    LowRankPosterior,
    MemberPosterior,
    PointPosterior,
    Posterior,
    PosteriorConfig,
    RowPosterior,
    load_artifact,
    write_artifact,
)
from credence.adapters.kinds import FixedRowPosterior, KroneckerCurvature, MaskPosterior, Member

VOCABULARY = 128
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 96, 160, 2, 4, 2, 32
RANK, ALPHA = 16, 24
WORDS = [f"w{number}" for number in range(VOCABULARY - 3)]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] == 'user' and 'w1' or 'w2' }} {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}w2 {% endif %}"
)
"""``w1`` opens what the user says, ``w2`` what the assistant says."""
SHAPES = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def make_model(path: Path, seed: int = 11) -> Path:
    """Writes the model, float32, with a word-level tokenizer (``w0 w1 ...``; 0 = bos, 1 = eos, 2 = unknown)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=256,
        initializer_range=0.15,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).to(torch.float32).save_pretrained(path)
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("w", " w"), decoders.Fuse()])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(path)
    return path


KIND_OF = {
    "diag": "diag",
    "row": "row",
    "fixed row": "row",
    "point": "point",
    "core": "core",
    "swag": "lowrank",
    "kronecker": "lowrank",
    "mask": "mask",
    "ensemble": "ensemble",
    "mixture": "ensemble",
}
"""Kind of each form of posterior that an artifact can hold."""


def random_factors(n_out: int, n_in: int, rank: int, generator: torch.Generator) -> LoraFactors:
    """A of size 0.2 and B of size 0.05."""
    A = 0.2 * torch.randn(rank, n_in, generator=generator)
    return LoraFactors(A=A, B=0.05 * torch.randn(n_out, rank, generator=generator))


def random_posterior(form: str, mean: LoraFactors, generator: torch.Generator, noise: float = 1.0) -> Posterior:
    """A posterior with noise of about the size of ``mean``."""
    rank, n_in, n_out = mean.rank, mean.A.shape[1], mean.B.shape[0]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def basis(size: int, count: int) -> torch.Tensor:
        return torch.linalg.qr(normal(size, count).double()).Q.float()

    def curvature(m: int, n: int) -> KroneckerCurvature:
        return KroneckerCurvature(
            in_vectors=basis(n, 3),
            in_values=100 * normal(3).square(),
            out_vectors=basis(m, 2),
            out_values=normal(2).square(),
        )

    if form == "diag":
        return DiagPosterior(
            log_sd_A=torch.full_like(mean.A, 0.15 * noise).log(), log_sd_B=torch.full_like(mean.B, 0.05 * noise).log()
        )
    if form == "row":
        return RowPosterior(rho=0.1 * normal(rank), beta=0.1 * normal(4), epsilon=0.3 * noise, dof=float(rank))
    if form == "fixed row":
        return FixedRowPosterior(rho=0.1 * normal(rank) + math.log(0.15 * noise))
    if form == "core":
        M = torch.eye(rank) + 0.1 * normal(rank, rank)
        return CorePosterior(M=M, log_sd=torch.full_like(M, 0.3 * noise).log())
    if form == "swag":
        size = rank * (n_in + n_out)
        return LowRankPosterior(log_sd=torch.full((size,), 0.1 * noise).log(), deviations=0.1 * noise * normal(4, size))
    if form == "kronecker":
        prior = math.log(0.15 * noise)
        return KroneckerPosterior(A=curvature(rank, n_in), B=curvature(n_out, rank), prior_log_sd=prior)
    if form == "mask":
        return MaskPosterior(p=0.3)
    if form in ("ensemble", "mixture"):
        others = [random_factors(n_out, n_in, rank, generator) for _ in range(2)]
        own = "diag" if form == "mixture" else "point"
        return EnsemblePosterior(
            members=tuple(
                Member(mean=factors, posterior=random_posterior(own, factors, generator, noise))
                for factors in (mean, *others)
            )
        )
    return PointPosterior()


def make_artifact(
    path: Path,
    *,
    form: str = "diag",
    seed: int = 5,
    rank: int = RANK,
    alpha: float = ALPHA,
    modules: tuple[str, ...] = tuple(SHAPES),
    shapes: dict[str, tuple[int, int]] = SHAPES,
    layers: int = LAYERS,
    noise: float = 1.0,
    tau: dict[int, float] | None = None,
    temperature: dict[int, float] | None = None,
    training: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
) -> Artifact:
    """Writes an artifact with visible noise on every adapted module; alpha / r is no power of two by default.

    Args:
        form: one of ``KIND_OF``.
    """
    generator = torch.Generator().manual_seed(seed)
    mean: dict[str, LoraFactors] = {}
    posteriors: dict[str, Posterior] = {}
    for layer in range(layers):
        for name in modules:
            n_out, n_in = shapes[name]
            module = f"model.layers.{layer}.{name}"
            mean[module] = random_factors(n_out, n_in, rank, generator)
            posteriors[module] = random_posterior(form, mean[module], generator, noise)
    targets = tuple(sorted({name.split(".")[1] for name in modules}))
    settings = {
        "row": {"epsilon": 0.3 * noise, "dof": float(rank), "floor": 1e-3},
        "kronecker": {"prior_log_sd": math.log(0.15 * noise)},
        "mask": {"p": 0.3},
    }.get(form, {})
    write_artifact(
        path,
        adapter_config={
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": list(targets),
            "bias": "none",
            "base_model_name_or_path": "tiny",
        },
        mean=mean,
        posteriors=posteriors,
        config=PosteriorConfig(
            kind=KIND_OF[form],  # type: ignore[arg-type]
            method={"diag": "ivon", "row": "monteclora", "point": "map"}.get(form, form),
            member=MemberPosterior(kind="diag") if form == "mixture" else None,
            mean="first member" if form in ("ensemble", "mixture") else "exact",
            credence_version="0",
            base_model=BaseModelRef(name="tiny"),
            rank=rank,
            lora_alpha=alpha,
            target_modules=targets,
            settings=settings,
            tau={k: Fit(value=value, nll=0.0) for k, value in (tau or {}).items()},
            training=training or {},
        ),
        calibration=Calibration(temperature={k: Fit(value=value, nll=0.0) for k, value in (temperature or {}).items()}),
        metrics=metrics,
    )
    return load_artifact(path)

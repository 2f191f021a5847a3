"""A tiny random Llama with grouped-query attention, its tokenizer and artifacts that fit it, for tests that run real engines."""

from pathlib import Path
from typing import Any

import torch

from credence.adapters import (
    Artifact,
    BaseModelRef,
    Calibration,
    DiagPosterior,
    Fit,
    LoraFactors,
    PointPosterior,
    Posterior,
    PosteriorConfig,
    RowPosterior,
    load_artifact,
    write_artifact,
)

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


def make_artifact(
    path: Path,
    *,
    kind: str = "diag",
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
) -> Artifact:
    """Writes an artifact with visible noise on every adapted module; alpha / r is no power of two by default."""
    generator = torch.Generator().manual_seed(seed)
    mean: dict[str, LoraFactors] = {}
    posteriors: dict[str, Posterior] = {}
    for layer in range(layers):
        for name in modules:
            n_out, n_in = shapes[name]
            module = f"model.layers.{layer}.{name}"
            A = 0.2 * torch.randn(rank, n_in, generator=generator)
            B = 0.05 * torch.randn(n_out, rank, generator=generator)
            mean[module] = LoraFactors(A=A, B=B)
            if kind == "diag":
                posteriors[module] = DiagPosterior(
                    log_sd_A=torch.full_like(A, 0.15 * noise).log(), log_sd_B=torch.full_like(B, 0.05 * noise).log()
                )
            elif kind == "row":
                posteriors[module] = RowPosterior(
                    rho=0.1 * torch.randn(rank, generator=generator),
                    beta=0.1 * torch.randn(4, generator=generator),
                    epsilon=0.3 * noise,
                    dof=float(rank),
                )
            else:
                posteriors[module] = PointPosterior()
    targets = tuple(sorted({name.split(".")[1] for name in modules}))
    settings = {"epsilon": 0.3 * noise, "dof": float(rank), "floor": 1e-3} if kind == "row" else {}
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
            kind=kind,
            method={"diag": "ivon", "row": "monteclora", "point": "map"}[kind],
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
    )
    return load_artifact(path)

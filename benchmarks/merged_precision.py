"""Does bfloat16 keep the noise of a posterior? The shared layout (A_s, B_s) against the delta layout of a merged model.

    python benchmarks/merged_precision.py [--samples 8] [--write]

A random Llama whose weights are bfloat16 numbers, LoRA of rank 16 on all linear layers (A as PEFT initialises it, B ~ N(0, 0.02^2),
lora_alpha / r = 2) and MonteCLoRA's posterior on A (kind row) for several epsilon. The factors are held in bfloat16 as vLLM holds them:
cast, then B times lora_alpha / r in that dtype. Three questions:

1. Weights: how far is the noise that is served, s (B'A' or B_s A_s - B A), from the noise that was drawn? Relative error in the Frobenius
   norm, its size relative to the drawn one, and the share of A's entries that are not served as the mean's.
2. Logits, rounding of the numbers only: bfloat16 weights and factors in float32 arithmetic. Correlation (Pearson) of the deviations
   sample - mean with those of unrounded numbers in float32, over samples, positions and vocabulary; and their size relative to those.
3. Logits, all of it: the same in bfloat16 arithmetic, which rounds every layer's output.

Prints the tables and, last, one JSON line; --write puts them into benchmarks/results/.
"""

import argparse
import json
import platform
import sys
from collections.abc import Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from credence.adapters import LoraFactors, NoiseSource, RowPosterior, delta, draw

EPSILONS = (2.5e-5, 1e-4, 1e-3, 5e-3)
RANK, SCALING = 16, 2.0
PROMPTS, LENGTH, VOCABULARY = 4, 48, 512
RESULTS = Path(__file__).parent / "results"

Factors = Mapping[str, LoraFactors]


def make_model() -> LlamaForCausalLM:
    """A random Llama in float32 whose weights bfloat16 holds exactly."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=128, initializer_range=0.05, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model: LlamaForCausalLM = LlamaForCausalLM(config).bfloat16().float().eval()
    return model


def linear_layers(model: LlamaForCausalLM) -> dict[str, nn.Linear]:
    """The adapted layers by name: all linear ones but the output layer."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"
    }


def make_mean(layers: Mapping[str, nn.Linear]) -> dict[str, LoraFactors]:
    """A uniform in +-1/sqrt(n_in), PEFT's initialisation; B as if trained."""
    mean = {}
    for name, layer in layers.items():
        A = (2 * torch.rand(RANK, layer.in_features) - 1) / layer.in_features**0.5
        mean[name] = LoraFactors(A=A, B=0.02 * torch.randn(layer.out_features, RANK))
    return mean


def held(factors: Factors) -> dict[str, tuple[Tensor, Tensor]]:
    """A and scaled B as vLLM holds them in bfloat16."""
    return {name: (pair.A.bfloat16(), pair.B.bfloat16() * SCALING) for name, pair in factors.items()}


def exact(factors: Factors) -> dict[str, tuple[Tensor, Tensor]]:
    """A and scaled B, float32."""
    return {name: (pair.A, pair.B * SCALING) for name, pair in factors.items()}


@torch.no_grad()
def logits_of(
    model: LlamaForCausalLM, lora: Mapping[str, tuple[Tensor, Tensor]], tokens: Tensor, dtype: torch.dtype
) -> Tensor:
    """Logits [P, T, V] of the model with LoRA rows added to its linear layers, in ``dtype`` arithmetic; returned in float32."""
    model.to(dtype)
    layers = linear_layers(model)
    hooks = []
    for name, (A, B) in lora.items():
        A, B = A.to(dtype), B.to(dtype)

        def add(_: nn.Module, args: tuple[Tensor], output: Tensor, A: Tensor = A, B: Tensor = B) -> Tensor:
            return output + F.linear(F.linear(args[0], A), B)

        hooks.append(layers[name].register_forward_hook(add))
    try:
        logits: Tensor = model(input_ids=tokens).logits.float()
    finally:
        for hook in hooks:
            hook.remove()
    return logits


def weight_noise(mean: Factors, samples: list[dict[str, LoraFactors]]) -> dict[str, float]:
    """Size and error of the served noise relative to the drawn noise, over all modules and samples."""
    sums = dict.fromkeys(("drawn", "shared", "shared_error", "delta", "delta_error", "moved", "entries"), 0.0)
    mean_held = held(mean)
    for sample in samples:
        shared, alone = held(sample), held(delta(sample, mean))
        for name, pair in mean.items():
            drawn = SCALING * (sample[name].B.double() @ sample[name].A.double() - pair.B.double() @ pair.A.double())
            (A, B), (A_s, B_s), (A_d, B_d) = (
                (a.double(), b.double()) for a, b in (mean_held[name], shared[name], alone[name])
            )
            sums["drawn"] += float(drawn.square().sum())
            for layout, noise in (("shared", B_s @ A_s - B @ A), ("delta", B_d @ A_d)):
                sums[layout] += float(noise.square().sum())
                sums[f"{layout}_error"] += float((noise - drawn).square().sum())
            sums["moved"] += float((A_s != A).sum())
            sums["entries"] += A.numel()
    relative = {key: (sums[key] / sums["drawn"]) ** 0.5 for key in ("shared", "delta", "shared_error", "delta_error")}
    return {
        "moved_entries_shared": sums["moved"] / sums["entries"],
        "noise_size_shared": relative["shared"],
        "noise_size_delta": relative["delta"],
        "noise_error_shared": relative["shared_error"],
        "noise_error_delta": relative["delta_error"],
    }


def correlation(found: Tensor, expected: Tensor) -> float | None:
    """Pearson correlation over all entries; None if nothing varies."""
    x, y = found.double().flatten(), expected.double().flatten()
    x, y = x - x.mean(), y - y.mean()
    norm = float(x.norm() * y.norm())
    return float(x @ y) / norm if norm > 0 else None


def measure(epsilon: float, num_samples: int) -> dict[str, Any]:
    """One row of the table."""
    torch.manual_seed(1)
    base = make_model()
    layers = linear_layers(base)
    mean = make_mean(layers)
    tokens = torch.randint(0, VOCABULARY, (PROMPTS, LENGTH))
    posterior = RowPosterior(rho=torch.zeros(RANK), beta=torch.zeros(4), epsilon=epsilon, dof=float(RANK))
    samples = [
        {name: draw(posterior, pair, NoiseSource(0, index), name, 1.0) for name, pair in mean.items()}
        for index in range(num_samples)
    ]
    merged = make_model()
    for name, layer in linear_layers(merged).items():
        update = SCALING * mean[name].B.double() @ mean[name].A.double()
        layer.weight.data = (layer.weight.double() + update).bfloat16().float()
    row: dict[str, Any] = {"epsilon": epsilon, **weight_noise(mean, samples)}

    def deviations(model: LlamaForCausalLM, loras: list[Any], mean_lora: Any, dtype: torch.dtype) -> Tensor:
        centre = logits_of(model, mean_lora, tokens, dtype)
        return torch.stack([logits_of(model, lora, tokens, dtype) - centre for lora in loras])

    reference = deviations(base, [exact(sample) for sample in samples], exact(mean), torch.float32)
    row["logit_sd"] = float(reference.std())
    for dtype, label in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        shared = deviations(base, [held(sample) for sample in samples], held(mean), dtype)
        alone = deviations(merged, [held(delta(sample, mean)) for sample in samples], {}, dtype)
        for layout, found in (("shared", shared), ("delta", alone)):
            row[f"correlation_{layout}_{label}"] = correlation(found, reference)
            row[f"logit_size_{layout}_{label}"] = float(found.norm() / reference.norm())
    return row


COLUMNS = {
    "Weights": {
        "moved_entries_shared": "entries of A not served as the mean's, shared",
        "noise_error_shared": "error of the noise, shared",
        "noise_error_delta": "error, delta",
        "noise_size_shared": "size of the noise, shared",
        "noise_size_delta": "size, delta",
    },
    "Logits, bfloat16 numbers in float32 arithmetic": {
        "logit_sd": "sd of the exact deviations",
        "correlation_shared_float32": "correlation, shared",
        "correlation_delta_float32": "correlation, delta",
        "logit_size_shared_float32": "size, shared",
        "logit_size_delta_float32": "size, delta",
    },
    "Logits, bfloat16 arithmetic": {
        "correlation_shared_bfloat16": "correlation, shared",
        "correlation_delta_bfloat16": "correlation, delta",
        "logit_size_shared_bfloat16": "size, shared",
        "logit_size_delta_bfloat16": "size, delta",
    },
}


def tables(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown tables, one per question."""
    lines = []
    for title, columns in COLUMNS.items():
        lines += [
            f"**{title}**",
            "",
            f"| epsilon | {' | '.join(columns.values())} |",
            "|---" * (len(columns) + 1) + "|",
        ]
        for row in rows:
            cells = ["-" if row[key] is None else f"{row[key]:.3g}" for key in columns]
            lines.append(f"| {row['epsilon']:g} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints, and writes if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8, help="posterior samples per epsilon")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/merged_precision.{md,json}")
    args = parser.parse_args()
    rows = [measure(epsilon, args.samples) for epsilon in EPSILONS]
    document = {
        "command": " ".join(["python", "benchmarks/merged_precision.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "rows": rows,
    }
    print(tables(rows))
    print(json.dumps(document))
    if args.write:
        about = (
            f"`{document['command']}` on {document['date']}: a random Llama with bfloat16 weights, LoRA r = {RANK} on all linear layers, "
            f"posterior of kind row on A, {args.samples} samples, torch {version('torch')}, {platform.machine()}. The script says how each "
            "number is defined; errors and sizes are relative to exact arithmetic, and 1 is the right size."
        )
        (RESULTS / "merged_precision.md").write_text(
            f"# Noise in bfloat16: shared and merged layout\n\n{about}\n\n{tables(rows)}"
        )
        (RESULTS / "merged_precision.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()

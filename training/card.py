"""The model card that is written into an artifact's folder (README.md)."""

from collections.abc import Mapping
from typing import Any

from credence.adapters.config import Calibration, PosteriorConfig


def model_card(config: PosteriorConfig, calibration: Calibration, metrics: Mapping[str, Any]) -> str:
    """Writes the card: what the adapter is, how it was trained, what was fitted, and how to use it."""
    training = config.training
    lines = [
        "# Bayesian LoRA adapter",
        "",
        f"- Base model: `{config.base_model.name}`"
        + (f" at `{config.base_model.revision}`" if config.base_model.revision else ""),
        f"- Method: `{config.method}`, posterior kind `{config.kind}`, credence {config.credence_version}",
        f"- LoRA: r = {config.rank}, alpha = {config.lora_alpha:g}, on {', '.join(config.target_modules)}",
    ]
    data = training.get("data")
    if isinstance(data, Mapping):
        lines.append(f"- Trained on `{data.get('file')}`: {data.get('rows')} rows of format `{training.get('format')}`")
    if training.get("labels"):
        pairs = zip(training["labels"], training["label_texts"], strict=True)
        lines += [
            "",
            "Labels and the letters that stand for them: "
            + ", ".join(f"{name} `{text}`" for name, text in pairs)
            + ".",
        ]
        lines += ["", "Prompt:", "", "```", training["template"], "```"]
    if calibration.temperature:
        lines += ["", "Fitted on held-out data (tau scales the posterior variance, T the averaged probabilities):", ""]
        lines += ["| K | tau | T | held-out NLL |", "|---|---|---|---|"]
        for k, fit in sorted(calibration.temperature.items()):
            tau = config.tau[k].value if k in config.tau else 0.0
            lines.append(f"| {k if k else 'mean'} | {tau:.3g} | {fit.value:.3g} | {fit.nll:.4f} |")
    else:
        lines += ["", "Not released: tau and the temperature were not fitted (`credence release`)."]
    lines += [
        "",
        "The mean adapter (`adapter_model.safetensors`) is a plain PEFT LoRA and loads in PEFT and vLLM as it is. Its posterior is in "
        "`posterior.safetensors`; `credence draw` writes samples, `credence serve` serves them with uncertainty.",
        "",
    ]
    return "\n".join(lines)

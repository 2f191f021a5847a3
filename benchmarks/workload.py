"""What is measured: a base model, an adapter with a posterior, and prompts. Random by default, as speed does not depend on the weights."""

import json
import random
import shlex
import subprocess
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from credence.adapters import (
    BaseModelRef,
    DiagPosterior,
    LoraFactors,
    PosteriorConfig,
    load_artifact,
    write_artifact,
    write_sample,
)
from credence.benchmarks.measure import BenchError
from credence.demo.server import credence_command

HEAD_DIM = 64
RANK, ALPHA = 8, 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TAU = 1.0
"""Posterior temperature of every request; its value does not change the work."""
FIRST_TOKEN = 3
"""Prompts begin above the special tokens of the random model's tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A Llama-shaped model with grouped-query attention (two query heads for one key head), heads of 64.

    The default has about 100 million parameters.
    """

    hidden_size: int = 768
    intermediate_size: int = 2560
    num_layers: int = 12
    vocab_size: int = 4096

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * HEAD_DIM) or self.hidden_size < 2 * HEAD_DIM:
            raise ValueError(f"hidden_size is {self.hidden_size}; give a positive multiple of {2 * HEAD_DIM}")
        if min(self.intermediate_size, self.num_layers) < 1 or self.vocab_size <= FIRST_TOKEN + 1:
            raise ValueError(f"{self}: every size must be positive, and vocab_size above {FIRST_TOKEN + 1}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A base model on disk and an artifact that fits it.

    Attributes:
        base: folder of the model.
        adapter: folder of the artifact.
        name: how results call the model.
        num_parameters: of the base model.
        vocab_size: tokens a prompt may hold.
        merged: folder of base and mean as one model, if it is the merged layout that is measured.
    """

    base: Path
    adapter: Path
    name: str
    num_parameters: int
    vocab_size: int
    merged: Path | None = None

    def prompt(self, length: int, number: int) -> list[int]:
        """A random prompt of ``length`` token ids; prompts of different numbers share no beginning worth caching."""
        generator = random.Random(number)
        return [generator.randrange(FIRST_TOKEN, self.vocab_size) for _ in range(length)]

    def write_samples(self, folder: Path, count: int) -> list[Path]:
        """Writes the samples 0..count-1, as the server serves them at ``TAU``, as plain PEFT folders."""
        artifact = load_artifact(self.adapter)
        paths = [folder / f"sample-{index:02d}" for index in range(count)]
        for index, path in enumerate(paths):
            write_sample(path, artifact, seed=artifact.config.default_seed, index=index, tau=TAU)
        return paths


def random_workload(folder: Path, shape: ModelShape, *, max_length: int) -> Workload:
    """Writes a random model of this shape, float32, with a word-level tokenizer, and an adapter with noise on both factors.

    Args:
        max_length: most tokens of prompt and answer together.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    base, heads = folder / "base", shape.hidden_size // HEAD_DIM
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=HEAD_DIM,
        max_position_embeddings=max_length,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(base)
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(shape.vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w1", eos_token="w2").save_pretrained(base)

    mean, posteriors = {}, {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in TARGETS:
            mean[name] = LoraFactors(
                A=0.02 * torch.randn(RANK, module.in_features, generator=generator),
                B=0.02 * torch.randn(module.out_features, RANK, generator=generator),
            )
            posteriors[name] = DiagPosterior(
                log_sd_A=torch.full_like(mean[name].A, -4.0), log_sd_B=torch.full_like(mean[name].B, -4.0)
            )
    write_artifact(
        folder / "adapter",
        adapter_config={
            "peft_type": "LORA",
            "r": RANK,
            "lora_alpha": ALPHA,
            "target_modules": list(TARGETS),
            "bias": "none",
        },
        mean=mean,
        posteriors=posteriors,
        config=PosteriorConfig(
            kind="diag",
            method="random",
            credence_version=version("credence"),
            base_model=BaseModelRef(name="random"),
            rank=RANK,
            lora_alpha=ALPHA,
            target_modules=TARGETS,
        ),
    )
    return Workload(
        base=base,
        adapter=folder / "adapter",
        name=f"random Llama, {shape.num_layers} layers of {shape.hidden_size}, V = {shape.vocab_size}, "
        f"rank {RANK} on all linear layers",
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocab_size=shape.vocab_size,
    )


def merged_workload(workload: Workload, output: Path, dtype: str) -> Workload:
    """The same in the merged layout: ``credence merge`` writes base and mean to ``output`` in ``dtype``."""
    command = [
        credence_command(),
        "merge",
        str(workload.adapter),
        "--base",
        str(workload.base),
        "--output",
        str(output),
    ]
    done = subprocess.run([*command, "--name", "bench", "--dtype", dtype], capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        raise BenchError(f"{shlex.join(command)} failed: {done.stderr.strip()[-500:]}")
    return replace(workload, merged=output, name=f"{workload.name}, merged")


def given_workload(base: Path, adapter: Path) -> Workload:
    """A model and an adapter that exist already.

    Raises:
        BenchError: the folder holds no model.
        ArtifactError: the adapter is refused.
    """
    from safetensors import safe_open

    try:
        vocab_size = int(json.loads((base / "config.json").read_text())["vocab_size"])
    except (OSError, ValueError, KeyError) as error:
        raise BenchError(
            f"{base} holds no model with a vocab_size in config.json; give the folder of a model"
        ) from error
    artifact = load_artifact(adapter)
    num_parameters = 0
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a dict
                size = 1
                for length in tensors.get_slice(name).get_shape():
                    size *= length
                num_parameters += size
    if not num_parameters:
        raise BenchError(f"{base} has no .safetensors file; give the folder of a model")
    return Workload(
        base=base,
        adapter=adapter,
        name=f"{base.resolve().name}, adapter {artifact.config.method} of rank {artifact.config.rank}",
        num_parameters=num_parameters,
        vocab_size=vocab_size,
    )

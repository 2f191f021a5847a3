"""One real vLLM engine per session, in this process, on a tiny random Llama; and the same model in transformers + PEFT."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from credence.adapters import Artifact, write_sample
from credence.serve.samples import SampleRef
from tests.tiny import RANK, VOCABULARY, make_artifact, make_model

_ids = iter(range(1000, 10**6))

MAX_LORAS = 4
PLUGIN_TOKEN = "test-token"
CHUNK = 32
"""Tokens of one engine step: longer prompts are prefilled in chunks."""


@dataclass(frozen=True)
class Engine:
    """The served model, its folder, and an artifact that fits it."""

    llm: Any
    model_path: Path
    artifact: Artifact


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with grouped-query attention, float32."""
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A mean adapter on every linear module, with noise on both factors; alpha / r = 1.5 is no power of two."""
    return make_artifact(tmp_path_factory.mktemp("artifact") / "adapter")


@pytest.fixture(scope="session")
def engine(tiny_model: Path, artifact: Artifact) -> Iterator[Engine]:
    """vLLM with our plugins and scheduler, MAX_LORAS slots, chunked prefill of CHUNK tokens."""
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_PLUGINS": "",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CREDENCE_PLUGIN_TOKEN": PLUGIN_TOKEN,
    }
    import torch._dynamo

    with pytest.MonkeyPatch.context() as patch, quiet():
        for key, value in environment.items():
            patch.setenv(key, value)
        patch.setattr(torch._dynamo.config, "disable", True)
        from vllm import LLM

        from credence.serve.vllm_plugin import cpu_lora, scoring, worker

        cpu_lora.install()
        worker.install()
        scoring.install()
        llm = LLM(
            model=str(tiny_model),
            scheduler_cls="credence.serve.vllm_plugin.scheduler.gang_scheduler",
            dtype="float32",
            enforce_eager=True,
            block_size=32,
            max_model_len=192,
            max_num_seqs=16,
            max_num_batched_tokens=CHUNK,
            enable_lora=True,
            max_loras=MAX_LORAS,
            max_cpu_loras=MAX_LORAS,
            max_lora_rank=RANK,
            max_logprobs=VOCABULARY,
            disable_log_stats=True,
        )
        yield Engine(llm=llm, model_path=tiny_model, artifact=artifact)
        llm.llm_engine.engine_core.shutdown()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """vLLM and its dependencies warn at start; a session with warnings as errors must not fail on them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Reference:
    """The slow reference: transformers + PEFT, float32, the whole prefix again for every token.

    Args:
        model_path: folder of the base model.
        adapter: plain LoRA folder, or None for the base model.
    """

    def __init__(self, model_path: Path, adapter: Path | None = None) -> None:
        from peft import PeftModel
        from transformers import LlamaForCausalLM

        with quiet():
            model = LlamaForCausalLM.from_pretrained(model_path, dtype=torch.float32)
            self._model = (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()

    @torch.no_grad()
    def log_probs(self, tokens: list[int]) -> torch.Tensor:
        """Log-probabilities of the token after each prefix, [T, V]."""
        logits: torch.Tensor = self._model(input_ids=torch.tensor([tokens])).logits[0]
        return logits.log_softmax(-1)


def sample(artifact: Artifact, index: int, seed: int = 0, tau: float = 1.0, **changes: Any) -> SampleRef:
    fields = {
        "store": str(artifact.path),
        "digest": artifact.digest,
        "seed": seed,
        "index": index,
        "tau": tau,
        **changes,
    }
    return SampleRef(**fields)


def request(path: str) -> Any:
    from vllm.lora.request import LoRARequest

    number = next(_ids)
    return LoRARequest(f"slot{number}", number, path)


def prompt(length: int, seed: int) -> list[int]:
    """A random prompt; use another seed in each test, or the prefix cache answers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()


def generate(engine: Engine, prompts: list[list[int]], sampling: Any, adapters: list[Any] | None = None) -> list[Any]:
    """Runs requests through the engine in one batch and returns their single completions with their prompts' log-probabilities."""
    outputs = engine.llm.generate(
        [{"prompt_token_ids": tokens} for tokens in prompts], sampling, lora_request=adapters, use_tqdm=False
    )
    return list(outputs)


def logprob_matrix(completion: Any) -> torch.Tensor:
    """Log-probabilities [T, V] of a completion asked for with logprobs=VOCABULARY."""
    rows = [[step[token].logprob for token in range(VOCABULARY)] for step in completion.logprobs]
    return torch.tensor(rows)


def gang_members(
    artifact: Artifact,
    k: int,
    name: str,
    stats: str,
    seed: int = 0,
    *,
    top: int = 0,
    targets: list[list[int]] | None = None,
    calibration: tuple[float, list[int]] = (1.0, []),
    leader: dict[str, Any] | None = None,
    **sampling: Any,
) -> tuple[list[Any], list[Any]]:
    """Sampling parameters and adapters of one gang; ``leader`` holds what only member 0 carries."""
    from vllm import SamplingParams

    parameters = [
        SamplingParams(
            **{"max_tokens": 12, "temperature": 0.0, "ignore_eos": True, **sampling, **(leader or {} if member == 0 else {})},
            extra_args={
                "credence_gang": name, "credence_k": k, "credence_member": member, "credence_seed": seed,
                "credence_stats": stats, "credence_token": PLUGIN_TOKEN,
                "credence_temperature": calibration[0], "credence_support": calibration[1],
                "credence_top": top, "credence_targets": targets or [],
            },
        )
        for member in range(k)
    ]  # fmt: skip
    return parameters, [request(sample(artifact, member).to_path()) for member in range(k)]


def model_runner(engine: Engine) -> Any:
    """vLLM's model runner, in this process."""
    return engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


@pytest.fixture(scope="session")
def references(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> list[Reference]:
    """The four samples of the gang in transformers + PEFT."""
    models = []
    for index in range(4):
        folder = tmp_path_factory.mktemp("gang") / "sample"
        write_sample(folder, engine.artifact, seed=0, index=index, tau=1.0)
        models.append(Reference(engine.model_path, folder))
    return models


@pytest.fixture
def stats_path(tmp_path: Path) -> Iterator[str]:
    path = str(tmp_path / "stats")
    yield path
    if os.path.exists(path):
        os.unlink(path)


@pytest.fixture
def no_gangs(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler takes members for ordinary requests, as vLLM's own does."""
    scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
    monkeypatch.setattr(scheduler, "_join", lambda *args: None)

"""credence.benchmarks.peft_loop: both loops against the whole-prefix definition of the average."""

from pathlib import Path

import pytest
import torch

from credence.adapters import write_sample
from credence.benchmarks.peft_loop import PeftLoop
from tests.tiny import make_artifact, make_model

pytestmark = pytest.mark.filterwarnings("ignore")
K, NEW_TOKENS = 3, 6
PROMPTS = [[5, 9, 33, 70], [8, 8, 101, 4]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    folder = tmp_path_factory.mktemp("peft")
    artifact = make_artifact(folder / "artifact")
    paths = [folder / f"sample{index}" for index in range(K)]
    for index, path in enumerate(paths):
        write_sample(path, artifact, seed=0, index=index, tau=1.0)
    return make_model(folder / "model"), paths


@pytest.fixture(scope="module")
def loop(folders: tuple[Path, list[Path]]) -> PeftLoop:
    return PeftLoop(*folders, torch.float32)


def expected(folders: tuple[Path, list[Path]], prompt: list[int], num_samples: int) -> list[int]:
    """Greedy on mean_k softmax, one model per sample, the whole prefix again for every token."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    base, paths = folders
    models = [
        PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), path).eval() for path in paths[:num_samples]
    ]
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            probs = [model(torch.tensor([tokens])).logits[0, -1].double().softmax(-1) for model in models]
            tokens.append(int(sum(probs).argmax()))  # type: ignore[union-attr]
    return tokens[len(prompt) :]


@pytest.mark.parametrize("num_samples", [1, K])
def test_both_loops_generate_the_averages_tokens(
    folders: tuple[Path, list[Path]], loop: PeftLoop, num_samples: int
) -> None:
    answers = [expected(folders, prompt, num_samples) for prompt in PROMPTS]
    assert loop.loop(PROMPTS, new_tokens=NEW_TOKENS, num_samples=num_samples) == answers
    assert loop.batched(PROMPTS[0], new_tokens=NEW_TOKENS, num_samples=num_samples) == answers[0]


def test_the_samples_matter(folders: tuple[Path, list[Path]]) -> None:
    assert len({tuple(expected(folders, prompt, k)) for prompt in PROMPTS for k in (1, K)}) > len(PROMPTS)


def test_weights_have_the_dtype_that_was_asked_for(folders: tuple[Path, list[Path]]) -> None:
    model = PeftLoop(*folders, torch.bfloat16)._model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("num_samples", [0, K + 1])
def test_samples_that_are_not_loaded_are_refused(loop: PeftLoop, num_samples: int) -> None:
    with pytest.raises(ValueError, match=f"num_samples is {num_samples}; {K} samples are loaded"):
        loop.batched(PROMPTS[0], new_tokens=1, num_samples=num_samples)


def test_no_sample_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        PeftLoop(tmp_path, [], torch.float32)

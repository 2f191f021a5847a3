from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from credence.adapters import load_artifact
from credence.benchmarks.measure import BenchError
from credence.benchmarks.workload import (
    FIRST_TOKEN,
    TARGETS,
    ModelShape,
    Workload,
    given_workload,
    random_workload,
)

SHAPE = ModelShape(hidden_size=128, intermediate_size=96, num_layers=2, vocab_size=64)


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    return random_workload(tmp_path_factory.mktemp("workload"), SHAPE, max_length=48)


def test_the_model_has_the_shape_that_was_asked_for(workload: Workload) -> None:
    attention = 128 * (128 + 64 + 64 + 128)
    layer = attention + 3 * 128 * 96 + 2 * 128
    assert workload.num_parameters == 2 * 64 * 128 + 2 * layer + 128
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(workload.base)
    assert sum(parameter.numel() for parameter in model.parameters()) == workload.num_parameters
    assert model.config.max_position_embeddings == 48
    assert AutoTokenizer.from_pretrained(workload.base)("w5 w6")["input_ids"][-2:] == [5, 6]


def test_the_default_shape_has_about_100_million_parameters() -> None:
    shape = ModelShape()
    attention = shape.hidden_size * shape.hidden_size * 3
    mlp = 3 * shape.hidden_size * shape.intermediate_size
    total = 2 * shape.vocab_size * shape.hidden_size + shape.num_layers * (attention + mlp)
    assert 95e6 < total < 105e6


def test_the_adapter_covers_every_linear_layer_with_noise(workload: Workload) -> None:
    artifact = load_artifact(workload.adapter)
    assert len(artifact.mean) == len(TARGETS) * SHAPE.num_layers
    first, second = (artifact.draw(seed=0, index=index, tau=1.0) for index in range(2))
    for name, mean in artifact.mean.items():
        for factor in ("A", "B"):
            draws = [getattr(draw[name], factor) for draw in (first, second)]
            assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], getattr(mean, factor))


def test_samples_are_the_servers(workload: Workload, tmp_path: Path) -> None:
    paths = workload.write_samples(tmp_path, 3)
    artifact = load_artifact(workload.adapter)
    assert [path.name for path in paths] == ["sample-00", "sample-01", "sample-02"]
    for index, path in enumerate(paths):
        tensors = load_file(path / "adapter_model.safetensors")
        drawn = artifact.draw(seed=0, index=index, tau=1.0)
        module = "model.layers.1.mlp.down_proj"
        assert torch.equal(tensors[f"base_model.model.{module}.lora_A.weight"], drawn[module].A)


def test_prompts_are_reproducible_and_differ(workload: Workload) -> None:
    assert workload.prompt(40, 5) == workload.prompt(40, 5)
    prompts = [workload.prompt(40, number) for number in range(50)]
    assert len({tuple(prompt[:16]) for prompt in prompts}) == 50
    tokens = {token for prompt in prompts for token in prompt}
    assert tokens == set(range(FIRST_TOKEN, SHAPE.vocab_size))


def test_a_given_model_is_measured_too(workload: Workload) -> None:
    given = given_workload(workload.base, workload.adapter)
    assert (given.num_parameters, given.vocab_size) == (workload.num_parameters, workload.vocab_size)
    assert given.name == "base, adapter random of rank 8"


def test_a_folder_without_a_model_is_refused(workload: Workload, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="holds no model"):
        given_workload(tmp_path, workload.adapter)
    (tmp_path / "config.json").write_text('{"vocab_size": 8}')
    with pytest.raises(BenchError, match=r"no \.safetensors file"):
        given_workload(tmp_path, workload.adapter)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 192}, "hidden_size is 192; give a positive multiple of 128"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_layers": 0}, "every size must be positive"),
        ({"vocab_size": 4}, "vocab_size above 4"),
    ],
)
def test_impossible_shapes_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelShape(**sizes)

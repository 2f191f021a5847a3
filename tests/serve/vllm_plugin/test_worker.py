"""credence.serve.vllm_plugin.worker: samples drawn in the worker are the exported samples, and the gang is the exact model average."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from credence.adapters.artifact import Artifact, write_sample
from credence.adapters.errors import ArtifactError
from credence.adapters.merged import write_delta
from credence.serve.step_stats import StepStats
from credence.serve.vllm_plugin.averaging import ChoiceRule, average, choose_token
from tests.serve.vllm_plugin.conftest import (
    CHUNK,
    VOCABULARY,
    Engine,
    Reference,
    gang_members,
    generate,
    logprob_matrix,
    prompt,
    request,
    sample,
)
from tests.tiny import KIND_OF, make_artifact

pytestmark = pytest.mark.filterwarnings("ignore")


def test_artifacts_are_opened_once_and_the_oldest_is_forgotten(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    from credence.serve.vllm_plugin import worker

    opened: list[str] = []

    def load(path: str) -> Any:
        opened.append(path)
        return SimpleNamespace(digest=f"sha256:{path}")

    monkeypatch.setattr(worker, "load_artifact", load)
    cache = worker.ArtifactCache(capacity=2)
    for name in ("a", "b", "a", "c", "a", "b"):
        assert cache.get(sample(artifact, 0, store=name, digest=f"sha256:{name}")).digest == f"sha256:{name}"
    assert opened == ["a", "b", "c", "b"] and len(cache) == 2


def test_a_folder_with_another_artifact_is_refused(artifact: Artifact) -> None:
    from credence.serve.vllm_plugin.worker import ArtifactCache

    cache = ArtifactCache()
    with pytest.raises(ArtifactError, match="the sample belongs to sha256:00") as failure:
        cache.get(sample(artifact, 0, digest="sha256:" + "0" * 64))
    assert failure.value.reason == "hash_mismatch" and len(cache) == 0


@pytest.mark.engine
def test_install_can_be_repeated(engine: Engine) -> None:
    from vllm.lora.worker_manager import WorkerLoRAManager

    from credence.serve.vllm_plugin import worker

    before = WorkerLoRAManager._load_adapter
    worker.install()
    assert WorkerLoRAManager._load_adapter is before


@pytest.mark.engine
@pytest.mark.parametrize(("seed", "index", "tau"), [(0, 0, 1.0), (3, 7, 0.25), (0, 0, 0.0)])
def test_a_drawn_sample_is_the_exported_folder_and_the_peft_model(
    engine: Engine, tmp_path: Path, seed: int, index: int, tau: float
) -> None:
    from vllm import SamplingParams

    write_sample(tmp_path / "plain", engine.artifact, seed=seed, index=index, tau=tau)
    drawn = request(sample(engine.artifact, index, seed, tau).to_path())
    plain = request(str(tmp_path / "plain"))
    tokens = prompt(12, 40 + 10 * seed + int(4 * tau))
    sampling = SamplingParams(max_tokens=8, temperature=0, logprobs=VOCABULARY, ignore_eos=True)
    served, exported = (generate(engine, [tokens], sampling, [lora])[0].outputs[0] for lora in (drawn, plain))
    assert list(served.token_ids) == list(exported.token_ids)
    torch.testing.assert_close(logprob_matrix(served), logprob_matrix(exported), rtol=0, atol=1e-5)
    expected = Reference(engine.model_path, tmp_path / "plain").log_probs(tokens + list(served.token_ids))
    torch.testing.assert_close(logprob_matrix(served), expected[len(tokens) - 1 : -1], rtol=0, atol=1e-4)
    base = Reference(engine.model_path).log_probs(tokens + list(served.token_ids))
    assert (base - expected).abs().max() > 0.1, "the adapter does nothing: the comparison proves nothing"


@pytest.mark.engine
@pytest.mark.parametrize("form", list(KIND_OF))
def test_samples_of_every_kind_are_drawn_in_the_worker(engine: Engine, tmp_path: Path, form: str) -> None:
    from vllm import SamplingParams

    artifact = make_artifact(tmp_path / "a", form=form)
    tokens = prompt(12, 300 + list(KIND_OF).index(form))
    sampling = SamplingParams(max_tokens=6, temperature=0, logprobs=VOCABULARY, ignore_eos=True)
    found = []
    for index in (1, 3):
        folder = tmp_path / f"plain{index}"
        write_sample(folder, artifact, seed=4, index=index, tau=0.5)
        drawn = request(sample(artifact, index, 4, 0.5).to_path())
        served = generate(engine, [tokens], sampling, [drawn])[0].outputs[0]
        expected = Reference(engine.model_path, folder).log_probs(tokens + list(served.token_ids))
        torch.testing.assert_close(logprob_matrix(served), expected[len(tokens) - 1 : -1], rtol=0, atol=1e-4)
        found.append(expected[len(tokens) - 1])
    difference = float((found[0] - found[1]).abs().max())
    assert difference > 0.02 if form != "point" else difference == 0


@pytest.mark.engine
@pytest.mark.parametrize(("kind", "rank"), [("row", 16), ("diag", 8), ("point", 16)])
@pytest.mark.parametrize("tau", [1.0, 0.0])
def test_a_drawn_delta_is_the_exported_delta(engine: Engine, tmp_path: Path, kind: str, rank: int, tau: float) -> None:
    """Rank r and rank 2r; the engine's slots have rank 16. On a base that the mean is not merged into: what matters is the factors."""
    from vllm import SamplingParams

    artifact = make_artifact(tmp_path / "a", form=kind, rank=rank)
    write_delta(tmp_path / "delta", artifact, seed=2, index=1, tau=tau)
    drawn = request(sample(artifact, 1, 2, tau, layout="delta").to_path())
    tokens = prompt(12, 200 + int(tau) + rank + len(kind))
    sampling = SamplingParams(max_tokens=8, temperature=0, logprobs=VOCABULARY, ignore_eos=True)
    served = generate(engine, [tokens], sampling, [drawn])[0].outputs[0]
    expected = Reference(engine.model_path, tmp_path / "delta").log_probs(tokens + list(served.token_ids))
    torch.testing.assert_close(logprob_matrix(served), expected[len(tokens) - 1 : -1], rtol=0, atol=1e-4)
    base = Reference(engine.model_path).log_probs(tokens + list(served.token_ids))
    if tau == 0 or kind == "point":
        assert torch.equal(base, expected), "no noise is no LoRA"
    else:
        assert float((base - expected).abs().max()) > 0.1, "the delta does nothing: the comparison proves nothing"


@pytest.mark.engine
def test_a_delta_wider_than_the_slots_is_refused(engine: Engine) -> None:
    from credence.serve.engine import SampleLoadError

    with pytest.raises(SampleLoadError, match="LoRA rank 32 is greater than max_lora_rank"):
        engine.llm.llm_engine.add_lora(request(sample(engine.artifact, 0, layout="delta").to_path()))


@pytest.mark.engine
def test_a_sample_whose_folder_is_gone_is_drawn_again_from_memory(engine: Engine, tmp_path: Path) -> None:
    import shutil

    from vllm import SamplingParams

    copy = tmp_path / "copy"
    shutil.copytree(engine.artifact.path, copy)
    from credence.serve.vllm_plugin import worker

    worker._artifacts._artifacts.clear()
    sampling = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    first = generate(
        engine, [prompt(6, 60)], sampling, [request(sample(engine.artifact, 1, store=str(copy)).to_path())]
    )
    shutil.rmtree(copy)
    again = generate(
        engine, [prompt(6, 60)], sampling, [request(sample(engine.artifact, 1, store=str(copy)).to_path())]
    )
    assert first[0].outputs[0].token_ids == again[0].outputs[0].token_ids


@pytest.mark.engine
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("credence:?store=/nowhere", "does not name a posterior sample"),
        ("{store}/missing", "missing"),
        ("wrong digest", "the sample belongs to"),
        ("{bad tau}", "tau must be a finite number"),
    ],
)
def test_what_cannot_be_drawn_is_a_clear_error_when_it_is_added(
    engine: Engine, tmp_path: Path, path: str, message: str
) -> None:
    from credence.serve.engine import SampleLoadError

    paths = {
        "{store}/missing": sample(
            engine.artifact, 0, store=str(tmp_path / "missing"), digest="sha256:" + "1" * 64
        ).to_path(),
        "wrong digest": sample(engine.artifact, 0, digest="sha256:" + "2" * 64).to_path(),
        "{bad tau}": sample(engine.artifact, 0, tau=-1.0).to_path(),
    }
    with pytest.raises(SampleLoadError, match=message):
        engine.llm.llm_engine.add_lora(request(paths.get(path, path)))


def slow_gang(
    models: list[Reference], tokens: list[int], rule: ChoiceRule, steps: int
) -> tuple[list[int], list[list[float]]]:
    """Averages probabilities over the models, token by token."""
    text, records = list(tokens), []
    for step in range(steps):
        rows = torch.stack([model.log_probs(text)[-1] for model in models])
        averaged = average(rows[None])
        token = choose_token(averaged.scores.mean_log_probs[0], rule, step)
        records.append(averaged.record(token[None])[0])
        text.append(int(token))
    return text[len(tokens) :], records


@pytest.mark.engine
@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_a_gang_decodes_the_bayesian_model_average(
    engine: Engine, references: list[Reference], stats_path: str, temperature: float
) -> None:
    from vllm import SamplingParams

    tokens, other = prompt(7, 70), prompt(3, 71)
    parameters, loras = gang_members(
        engine.artifact, 4, f"gang{temperature}", stats_path, seed=9, temperature=temperature
    )
    # All members and a plain request fit into the first step.
    assert 4 * len(tokens) + len(other) <= CHUNK
    plain = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    alone = generate(engine, [other], plain)[0].outputs[0].token_ids
    with StepStats.create(stats_path, 4, 12) as stats:
        outputs = generate(engine, [*[tokens] * 4, other], [*parameters, plain], [*loras, None])
        table = stats.read(12)
        wait_s = stats.read_wait()
    assert wait_s is not None and 0 <= wait_s < 60
    texts = [list(output.outputs[0].token_ids) for output in outputs]
    expected, records = slow_gang(references, tokens, ChoiceRule(seed=9, temperature=temperature), 12)
    assert texts[:4] == [expected] * 4
    assert texts[4] == list(alone), "a plain request beside a gang is a plain request"
    assert table.token_id.tolist() == expected and not table.missing.size
    found = torch.tensor([table.log_prob, table.total, table.aleatoric, table.epistemic, table.variation_ratio]).T
    torch.testing.assert_close(found, torch.tensor(records, dtype=found.dtype)[:, :5], rtol=0, atol=1e-4)
    members, favourites, theirs = torch.tensor(records, dtype=torch.float64)[:, 5:].split(4, dim=1)
    torch.testing.assert_close(torch.from_numpy(table.member_log_probs), members, rtol=0, atol=1e-4)
    assert table.member_tokens.tolist() == favourites.tolist()
    torch.testing.assert_close(torch.from_numpy(table.member_token_log_probs), theirs, rtol=0, atol=1e-4)
    assert table.epistemic.max() > 0.05, "the samples agree: the comparison proves nothing"


@pytest.mark.engine
def test_members_that_are_not_in_step_leave_no_record(engine: Engine, stats_path: str, no_gangs: None) -> None:
    """Prompts too long for one step: without the gang scheduler the members come apart. The missing records show it."""
    parameters, loras = gang_members(engine.artifact, 4, "apart", stats_path)
    with StepStats.create(stats_path, 4, 12) as stats:
        outputs = generate(engine, [prompt(CHUNK - 4, 80)] * 4, parameters, loras)
        table = stats.read(12)
    assert all(len(output.outputs[0].token_ids) == 12 for output in outputs)
    assert table.missing.size > 0
    texts = [list(output.outputs[0].token_ids) for output in outputs]
    for step in range(12):
        if step not in table.missing:
            assert {text[step] for text in texts} == {int(table.token_id[step])}


@pytest.mark.engine
def test_a_finished_prompt_is_not_averaged_with_an_unfinished_one(
    engine: Engine, stats_path: str, no_gangs: None
) -> None:
    """Both members are in the batch without output, one at the end of its prompt, one in the middle; the batch alone does not show it."""
    parameters, loras = gang_members(engine.artifact, 2, "halfway", stats_path, max_tokens=1)
    with StepStats.create(stats_path, 2, 1) as stats:
        generate(engine, [prompt(CHUNK - 4, 85)] * 2, parameters, loras)
        assert stats.read(1).missing.tolist() == [0]


@pytest.mark.engine
def test_forged_gang_keys_never_reach_the_engine(engine: Engine) -> None:
    parameters, _ = gang_members(engine.artifact, 1, "forged", "")
    parameters[0].extra_args["credence_token"] = "guess"
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="reserved for the server"):
        generate(engine, [prompt(4, 90)], parameters)

"""The test that matters most: what vLLM serves over HTTP is what a slow transformers + PEFT loop computes."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from credence.adapters import Artifact, write_sample
from tests.serve.conftest import Server
from tests.serve.reference import Reference

pytestmark = [pytest.mark.engine, pytest.mark.slow]

NEW_TOKENS = 24
SAMPLE_COUNTS = (1, 2, 4, 8)
PROMPTS = ([5, 9, 17, 33], [7] * 3 + list(range(20, 95)), [100, 4, 4, 88, 61, 12, 30, 31, 32])
"""A short prompt, one longer than an engine step and two cache blocks, and one in between."""


def reference_for(base: Path, artifact: Artifact, folder: Path) -> tuple[Reference, dict[int, list[str]]]:
    """Sample folders as the draw command writes them, for every K at the tau the server would use."""
    samples: dict[str, Path] = {}
    members: dict[int, list[str]] = {}
    for k in SAMPLE_COUNTS:
        tau = artifact.config.fitted_tau(k)
        members[k] = [f"tau{tau:g}-{index}".replace(".", "_") for index in range(k)]
        for index, name in enumerate(members[k]):
            if name not in samples:
                samples[name] = folder / name
                write_sample(samples[name], artifact, seed=0, index=index, tau=tau)
    samples["mean"] = folder / "mean"
    write_sample(samples["mean"], artifact, seed=0, index=0, tau=0.0)
    return Reference(base, samples), members


def test_served_ensembles_equal_the_reference(
    server: Server, model_path: Path, artifacts: dict[str, Artifact], tmp_path: Path
) -> None:
    """Tokens identical and scores within 1e-4 for K = 1, 2, 4, 8, with mean and base requests in the same batches."""
    names = ("diag", "row")
    references = {name: reference_for(model_path, artifacts[name], tmp_path / name) for name in names}
    common = {"max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    ensembles = [(name, k, number) for name in names for k in SAMPLE_COUNTS for number in range(len(PROMPTS))]
    plain = [(name, number) for name in ("diag", "row", "base") for number in range(len(PROMPTS))] * 2

    def ask(name: str, number: int, k: int | None) -> dict:
        options = {} if k is None else {"uncertainty": {"n_samples": k, "granularity": "token"}}
        response = server.complete(model=name, prompt=PROMPTS[number], **common, **options)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]

    with ThreadPoolExecutor(len(ensembles) + len(plain)) as pool:
        mixed = [pool.submit(ask, name, number, None) for name, number in plain]
        answers = [pool.submit(ask, name, number, k) for name, k, number in ensembles]
        served = [future.result() for future in answers]
        ordinary = [future.result() for future in mixed]

    for (name, k, number), choice in zip(ensembles, served, strict=True):
        reference, members = references[name]
        expected = reference.greedy(PROMPTS[number], NEW_TOKENS, list(members[k]))
        where = f"{name} K={k} prompt {number}"
        assert choice["token_ids"] == [step.token for step in expected], where
        uncertainty = choice["uncertainty"]
        assert uncertainty["n_effective"] == k
        assert uncertainty["adapter"]["digest"] == artifacts[name].digest
        for token, step in zip(uncertainty["tokens"], expected, strict=True):
            for score in ("total", "aleatoric", "epistemic"):
                assert token[score] == pytest.approx(getattr(step, score), abs=1e-4), f"{where} {score}"
            assert token["logprob"] == pytest.approx(step.log_prob, abs=1e-4), where
            assert token["total"] == pytest.approx(token["aleatoric"] + token["epistemic"], abs=1e-6)
        for score in ("total", "aleatoric", "epistemic"):
            average = sum(getattr(step, score) for step in expected) / NEW_TOKENS
            assert uncertainty[score] == pytest.approx(average, abs=1e-4), f"{where} {score}"

    for (name, number), choice in zip(plain, ordinary, strict=True):
        reference, _ = references["diag" if name == "base" else name]
        expected = reference.greedy(PROMPTS[number], NEW_TOKENS, [None if name == "base" else "mean"])
        assert choice["token_ids"] == [step.token for step in expected], f"{name} without uncertainty, prompt {number}"
        assert "uncertainty" not in choice


def test_same_prompt_new_samples_is_not_answered_from_the_cache(
    server: Server, model_path: Path, artifacts: dict[str, Artifact], tmp_path: Path
) -> None:
    """Prompts are cached per sample: after one set of samples has filled the cache, another tau or seed gets its own answer."""
    prompt = PROMPTS[1]
    for number, (seed, tau) in enumerate([(0, 1.0), (0, 0.25), (3, 1.0), (0, 1.0)]):
        response = server.complete(
            model="diag",
            prompt=prompt,
            max_tokens=3,
            temperature=0,
            return_token_ids=True,
            uncertainty={"n_samples": 2, "seed": seed, "tau": tau},
        )
        samples = {f"s{index}": tmp_path / f"{number}-{index}" for index in range(2)}
        for index, folder in enumerate(samples.values()):
            write_sample(folder, artifacts["diag"], seed=seed, index=index, tau=tau)
        expected = Reference(model_path, samples).greedy(prompt, 3, list(samples))
        choice = response.json()["choices"][0]
        assert choice["token_ids"] == [step.token for step in expected]
        assert choice["uncertainty"]["epistemic"] == pytest.approx(sum(s.epistemic for s in expected) / 3, abs=1e-4)

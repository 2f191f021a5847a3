"""The test that matters most: what vLLM serves over HTTP is what a slow transformers + PEFT loop computes."""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from credence.adapters import Artifact, write_sample
from credence.cli.main import run as credence
from tests.serve.reference import Reference
from tests.servers import Server, credence_command, start
from tests.tiny import make_artifact

pytestmark = [pytest.mark.engine, pytest.mark.slow]

NEW_TOKENS = 24
SAMPLE_COUNTS = (1, 2, 4, 8)
PROMPTS = ([5, 9, 17, 33], [7] * 3 + list(range(20, 95)), [100, 4, 4, 88, 61, 12, 30, 31, 32])
"""A short prompt, one longer than an engine step and two cache blocks, and one in between."""


def reference_for(base: Path, artifact: Artifact, folder: Path) -> Reference:
    """The folders that `credence draw` writes, at the tau the server uses, and the mean beside them."""
    tau = artifact.config.fitted_tau(8)
    assert {artifact.config.fitted_tau(k) for k in SAMPLE_COUNTS} == {tau}
    for name, k, value in (("samples", 8, tau), ("mean", 1, 0.0)):
        arguments = ["draw", str(artifact.path), "--k", str(k), "--tau", str(value), "--output", str(folder / name)]
        assert credence(arguments) == 0
    samples = {f"s{index}": folder / "samples" / f"sample-{index:02d}" for index in range(8)}
    return Reference(base, {**samples, "mean": folder / "mean" / "sample-00"})


def check_parity(server: Server, base: Path, artifacts: dict[str, Artifact], folder: Path) -> None:
    """Asks for every adapter, K and prompt at once, with ordinary requests to the adapters and the base between them."""
    references = {name: reference_for(base, artifact, folder / name) for name, artifact in artifacts.items()}
    common = {"max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    ensembles = [(name, k, number) for name in artifacts for k in SAMPLE_COUNTS for number in range(len(PROMPTS))]
    plain = [(name, number) for name in (*artifacts, "base") for number in range(len(PROMPTS))] * 2

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
        calibration = artifacts[name].calibration
        members = [f"s{index}" for index in range(k)]
        expected = references[name].greedy(PROMPTS[number], NEW_TOKENS, members, calibration.fitted_temperature(k))
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
        assert uncertainty["calibrated"] == bool(calibration.temperature)
        confidence = math.exp(sum(step.calibrated for step in expected) / NEW_TOKENS)
        assert uncertainty["confidence"] == pytest.approx(confidence, abs=1e-4), where
        for score in ("total", "aleatoric", "epistemic"):
            average = sum(getattr(step, score) for step in expected) / NEW_TOKENS
            assert uncertainty[score] == pytest.approx(average, abs=1e-4), f"{where} {score}"

    for (name, number), choice in zip(plain, ordinary, strict=True):
        reference = references.get(name) or next(iter(references.values()))
        expected = reference.greedy(PROMPTS[number], NEW_TOKENS, [None if name == "base" else "mean"])
        assert choice["token_ids"] == [step.token for step in expected], f"{name} without uncertainty, prompt {number}"
        assert "uncertainty" not in choice


def test_served_ensembles_equal_the_reference(
    server: Server, model_path: Path, artifacts: dict[str, Artifact], tmp_path: Path
) -> None:
    """Tokens identical and scores within 1e-4 for K = 1, 2, 4, 8 on a model with grouped-query attention, rank 16, alpha 24."""
    check_parity(server, model_path, {name: artifacts[name] for name in ("diag", "row")}, tmp_path)


def test_parity_on_a_pretrained_model(tmp_path: Path) -> None:
    """The same on stories260K, which has really been trained."""
    folder = os.environ.get("CREDENCE_TEST_MODELS")
    if not folder or not (Path(folder) / "stories260K").is_dir():
        pytest.skip("needs a folder holding stories260K in CREDENCE_TEST_MODELS")
    base = Path(folder) / "stories260K"
    shapes = {
        "self_attn.q_proj": (256, 64),
        "self_attn.k_proj": (128, 64),
        "self_attn.v_proj": (128, 64),
        "self_attn.o_proj": (64, 256),
        "mlp.gate_proj": (172, 64),
        "mlp.up_proj": (172, 64),
        "mlp.down_proj": (64, 172),
    }
    artifacts = {
        kind: make_artifact(tmp_path / kind, form=kind, shapes=shapes, layers=5, noise=0.5) for kind in ("diag", "row")
    }
    command = credence_command(base, {kind: artifact.path for kind, artifact in artifacts.items()})
    running = start(command, tmp_path / "log", "/readyz")
    try:
        check_parity(running, base, artifacts, tmp_path)
    finally:
        running.stop()


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

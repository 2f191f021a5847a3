"""Every mode over HTTP, streaming and not, against slow transformers + PEFT references: tokens, texts and scores.

With CREDENCE_PARITY_TABLE=FILE the largest differences of this module's tests are written there as a table (benchmarks/results/parity.md).
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from credence.adapters import Artifact
from credence.cli.main import run as credence
from credence.clients import BadRequestError, Client
from credence.serve.ensemble import SEED_STRIDE
from credence.serve.vllm_plugin.averaging import ChoiceRule, choose_token
from tests.serve.reference import Reference, Step
from tests.servers import Server, credence_command, start
from tests.tiny import VOCABULARY, make_artifact

pytestmark = [pytest.mark.engine, pytest.mark.slow]

K, NEW_TOKENS, TOLERANCE = 4, 8, 1e-4
PROMPT = [5, 9, 17, 33, 40, 41]
LONG = [7] * 3 + list(range(20, 95))
"""Longer than an engine step (64 tokens) and two cache blocks (32)."""
SCORES = ("total", "aleatoric", "epistemic")


@dataclass
class Parity:
    """Largest differences seen, by name of the case."""

    rows: dict[str, tuple[int, float]] = field(default_factory=dict)

    def tokens(self, name: str, served: list[int], expected: list[int]) -> None:
        mismatches = sum(a != b for a, b in zip(served, expected, strict=False)) + abs(len(served) - len(expected))
        self._note(name, mismatches, 0.0)
        assert served == expected, name

    def close(self, name: str, served: float | None, expected: float) -> None:
        assert served is not None, name
        self._note(name, 0, abs(served - expected))
        assert served == pytest.approx(expected, abs=TOLERANCE), name

    def described(self, name: str, uncertainty: dict[str, Any], steps: list[Step]) -> None:
        """Compares token scores and their means."""
        for token, step in zip(uncertainty["tokens"], steps, strict=True):
            for score in SCORES:
                self.close(name, token[score], getattr(step, score))
            self.close(name, token["logprob"], step.log_prob)
            if "top_logprob" in token:
                self.close(name, token["top_logprob"], step.top)
        for score in SCORES:
            self.close(name, uncertainty[score], sum(getattr(step, score) for step in steps) / len(steps))
        self.close(name, uncertainty["sequence"]["mean_logprob"], sum(step.log_prob for step in steps) / len(steps))

    def _note(self, name: str, mismatches: int, difference: float) -> None:
        before = self.rows.get(name, (0, 0.0))
        self.rows[name] = before[0] + mismatches, max(before[1], difference)


@pytest.fixture(scope="module")
def parity() -> Iterator[Parity]:
    collected = Parity()
    yield collected
    path = os.environ.get("CREDENCE_PARITY_TABLE")
    if path:
        lines = ["| mode | token mismatches | largest score difference |", "|---|---|---|"]
        lines += [f"| {name} | {rows[0]} | {rows[1]:.1e} |" for name, rows in collected.rows.items()]
        Path(path).write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def reference(model_path: Path, artifacts: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The samples that `credence draw` writes, s0 .. s7, and the mean."""
    folder = tmp_path_factory.mktemp("reference")
    path = str(artifacts["diag"].path)
    assert credence(["draw", path, "--k", "8", "--output", str(folder / "samples")]) == 0
    assert credence(["draw", path, "--k", "1", "--tau", "0", "--output", str(folder / "mean")]) == 0
    samples = {f"s{index}": folder / "samples" / f"sample-{index:02d}" for index in range(8)}
    return Reference(model_path, {**samples, "mean": folder / "mean" / "sample-00"})


MEMBERS = [f"s{index}" for index in range(K)]
TWO = {"n": 2, "temperature": 1, "top_k": 1}
"""Two greedy completions, which vLLM takes only as sampling from the most likely token."""


def complete(server: Server, prompt: Any = PROMPT, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    """One request; greedy, NEW_TOKENS tokens and K samples with token scores unless told otherwise."""
    text = {} if "messages" in body else {"prompt": prompt}
    options = {"n_samples": K, "granularity": "token", **body.pop("uncertainty", {})}
    defaults = {
        "model": "diag",
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    response = server.client.post(path, json={**defaults, **text, **body, "uncertainty": options})
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document


def refused(server: Server, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    response = server.client.post(path, json={"model": "diag", "prompt": PROMPT, "max_tokens": 2, **body})
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def events(server: Server, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
    """The chunks of a stream, checked to end as OpenAI's do."""
    text = {} if "messages" in body else {"prompt": PROMPT}
    options = {"n_samples": K, "granularity": "token", **body.pop("uncertainty", {})}
    defaults = {"model": "diag", "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
    request = {**defaults, **text, **body, "uncertainty": options}
    with server.client.stream("POST", path, json=request) as response:
        assert response.status_code == 200
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def ids(document: dict[str, Any], index: int = 0) -> list[int]:
    return list(document["choices"][index]["token_ids"])


def words(token_ids: list[int]) -> str:
    return "".join(f" w{token - 3}" if token > 2 else ("<s>", "</s>", "<unk>")[token] for token in token_ids)


# --- ensemble --------------------------------------------------------------------------------------------------------


def test_several_prompts_and_completions(server: Server, reference: Reference, parity: Parity) -> None:
    document = complete(server, [PROMPT, LONG], **TWO)
    assert [choice["index"] for choice in document["choices"]] == [0, 1, 2, 3]
    for index, choice in enumerate(document["choices"]):
        steps = reference.greedy((PROMPT, LONG)[index // 2], NEW_TOKENS, list(MEMBERS))
        parity.tokens("ensemble, 2 prompts, n = 2", choice["token_ids"], [step.token for step in steps])
        parity.described("ensemble, 2 prompts, n = 2", choice["uncertainty"], steps)
    prompt_tokens = 2 * (len(PROMPT) + len(LONG))
    details = document["usage"]["uncertainty_details"]
    assert details == {
        "n_samples": K,
        "sample_prompt_tokens": K * prompt_tokens,
        "sample_completion_tokens": K * 4 * NEW_TOKENS,
    }
    assert document["usage"]["completion_tokens"] == 4 * NEW_TOKENS


def test_sampling_follows_the_seed_and_completions_differ(server: Server, reference: Reference, parity: Parity) -> None:
    """The sampled tokens are those of the average under the documented generator; the second completion has another key."""
    document = complete(server, n=2, temperature=0.8, top_p=0.9, seed=11)
    for index in range(2):
        rule = ChoiceRule(seed=(11 + index * SEED_STRIDE) % 2**63, temperature=0.8, top_p=0.9)
        steps = reference.choose(
            PROMPT,
            NEW_TOKENS,
            MEMBERS,
            lambda average, output, rule=rule: int(choose_token(average.log(), rule, len(output))),
        )
        parity.tokens("ensemble, sampled", ids(document, index), [step.token for step in steps])
        parity.described("ensemble, sampled", document["choices"][index]["uncertainty"], steps)
    assert ids(document, 0) != ids(document, 1)


def masked(average: torch.Tensor, allowed: list[int] | None = None, banned: set[int] = frozenset()) -> torch.Tensor:  # type: ignore[assignment]
    keep = torch.zeros(len(average), dtype=torch.bool)
    keep[allowed if allowed is not None else slice(None)] = True
    keep[list(banned)] = False
    return torch.where(keep, average, 0.0)


@pytest.mark.parametrize(
    "case", ["allowed_token_ids", "logit_bias", "bad_words", "min_tokens", "structured", "penalties"]
)
def test_constraints_act_on_the_average(server: Server, reference: Reference, parity: Parity, case: str) -> None:
    """And the scores stay those of the unconstrained average."""
    free = [step.token for step in reference.greedy(PROMPT, NEW_TOKENS, list(MEMBERS))]
    name = f"ensemble, {case}"
    if case == "allowed_token_ids":
        body: dict[str, Any] = {"allowed_token_ids": [20, 30, 40, 50]}
        choose = lambda p, out: int(masked(p, [20, 30, 40, 50]).argmax())  # noqa: E731
    elif case == "logit_bias":
        body = {"logit_bias": {str(free[0]): -3.0, "70": 1.5}}

        def choose(p: torch.Tensor, out: list[int]) -> int:
            biased = p.log()
            biased[free[0]] -= 3.0
            biased[70] += 1.5
            return int(biased.argmax())
    elif case == "bad_words":
        body = {"bad_words": [f"w{free[0] - 3}"]}
        choose = lambda p, out: int(masked(p, banned={free[0]}).argmax())  # noqa: E731
    elif case == "min_tokens":
        body = {"stop_token_ids": free[:2], "min_tokens": 5, "max_tokens": 6}
        choose = lambda p, out: int(masked(p, banned=set(free[:2]) | {1} if len(out) < 5 else set()).argmax())  # noqa: E731
    elif case == "structured":
        body = {"structured_outputs": {"choice": ["w5w7w9", "w5w8w6"]}, "ignore_eos": False}
        choose = None  # type: ignore[assignment]
    else:
        body = {"presence_penalty": 0.5, "frequency_penalty": 0.7, "repetition_penalty": 1.0}

        def choose(p: torch.Tensor, out: list[int]) -> int:
            scores = p.log()
            for token in set(out):
                scores[token] -= 0.5 + 0.7 * out.count(token)
            return int(scores.argmax())

    document = complete(server, **body)
    choice = document["choices"][0]
    if choose is None:
        assert choice["text"].split() in (["w5", "w7", "w9"], ["w5", "w8", "w6"])
        steps = reference.read(PROMPT, ids(document), MEMBERS)
    else:
        steps = reference.choose(PROMPT, min(NEW_TOKENS, body.get("max_tokens", 99)), MEMBERS, choose)
        steps = steps[: len(ids(document))]
        assert [step.token for step in steps] != free
    parity.tokens(name, ids(document), [step.token for step in steps])
    parity.described(name, choice["uncertainty"], steps)


def test_a_stop_string_and_echo(server: Server, reference: Reference) -> None:
    steps = reference.greedy(PROMPT, NEW_TOKENS, list(MEMBERS))
    tokens = [step.token for step in steps]
    document = complete(server, stop=[f"w{tokens[3] - 3}"], echo=True, **TWO)
    for choice in document["choices"]:
        assert choice["finish_reason"] == "stop"
        assert choice["text"].endswith(words(tokens[:3]) + " ") or choice["text"].endswith(words(tokens[:3]))
        assert choice["token_ids"] == tokens[: tokens.index(tokens[3]) + 1]


def test_logprobs_are_those_of_the_average(server: Server, reference: Reference, parity: Parity) -> None:
    document = complete(server, logprobs=5)
    served = document["choices"][0]["logprobs"]
    output: list[int] = []
    for step, token in enumerate(ids(document)):
        average = reference.log_probs(PROMPT + output, MEMBERS)[:, -1].exp().mean(0).log()
        parity.close("ensemble, logprobs", served["token_logprobs"][step], float(average[token]))
        top = average.topk(5)
        for text, value in served["top_logprobs"][step].items():
            parity.close("ensemble, logprobs", value, float(average[int(text.strip().removeprefix("w")) + 3]))
        assert len(served["top_logprobs"][step]) == 5
        assert min(served["top_logprobs"][step].values()) == pytest.approx(float(top.values[-1]), abs=TOLERANCE)
        output.append(token)
    assert served["tokens"] == [words([token]) for token in output] or len(served["tokens"]) == NEW_TOKENS
    assert refused(server, logprobs=21, uncertainty=True)["param"] == "logprobs"


def test_a_stream_of_an_ensemble_carries_each_tokens_scores(
    server: Server, reference: Reference, parity: Parity
) -> None:
    steps = reference.greedy(PROMPT, NEW_TOKENS, list(MEMBERS))
    whole = complete(server)
    chunks = events(server, stream_options={"include_usage": True}, **TWO)
    for index in range(2):
        mine = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(choice["text"] for choice in mine) == whole["choices"][0]["text"]
        told = [token for choice in mine[:-1] for token in choice.get("uncertainty", {}).get("tokens", [])]
        assert len(told) >= NEW_TOKENS - 2 and all(set(choice["uncertainty"]) == {"tokens"} for choice in mine[:-1])
        last = mine[-1]
        assert last["finish_reason"] == "length"
        parity.described("ensemble, streaming", last["uncertainty"], steps)
        assert told == last["uncertainty"]["tokens"][: len(told)]
    assert chunks[-1]["usage"]["uncertainty_details"]["sample_completion_tokens"] == 2 * K * NEW_TOKENS
    assert all(chunk["model"] == "diag" for chunk in chunks)


# --- chat ------------------------------------------------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "w10 w11 w12"}]
CHAT_PROMPT = [4, 13, 14, 15, 5]


def test_chat(server: Server, reference: Reference, parity: Parity) -> None:
    steps = reference.greedy(CHAT_PROMPT, NEW_TOKENS, list(MEMBERS))
    document = complete(server, path="/v1/chat/completions", messages=MESSAGES, logprobs=True, top_logprobs=2)
    choice = document["choices"][0]
    assert choice["message"]["content"] == words([step.token for step in steps])
    parity.tokens("chat, ensemble", ids(document), [step.token for step in steps])
    parity.described("chat, ensemble", choice["uncertainty"], steps)
    for entry, step in zip(choice["logprobs"]["content"], steps, strict=True):
        parity.close("chat, ensemble", entry["logprob"], step.log_prob)
        assert len(entry["top_logprobs"]) == 2

    chunks = events(server, "/v1/chat/completions", messages=MESSAGES)
    mine = [choice for chunk in chunks for choice in chunk["choices"]]
    assert "".join(choice["delta"].get("content") or "" for choice in mine) == choice["message"]["content"]
    assert mine[-1]["uncertainty"] == choice["uncertainty"]
    parity.described("chat, ensemble, streaming", mine[-1]["uncertainty"], steps)


# --- score -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [PROMPT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("k", [1, K])
def test_score_is_the_means_text_read_under_the_samples(
    server: Server, reference: Reference, parity: Parity, prompt: list[int], k: int
) -> None:
    document = complete(server, prompt, **TWO, uncertainty={"mode": "score", "n_samples": k})
    mean = [step.token for step in reference.greedy(prompt, NEW_TOKENS, ["mean"])]
    steps = reference.read(prompt, mean, MEMBERS[:k])
    for choice in document["choices"]:
        parity.tokens("score", choice["token_ids"], mean)
        parity.described("score", choice["uncertainty"], steps)
        assert choice["uncertainty"]["mode"] == "score"
    details = document["usage"]["uncertainty_details"]
    assert details["sample_prompt_tokens"] == 2 * k * (len(prompt) + NEW_TOKENS - 1)
    assert details["sample_completion_tokens"] == 0


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_with_score_is_the_means_stream_and_one_chunk_more(
    server: Server, reference: Reference, parity: Parity, path: str
) -> None:
    chat = path != "/v1/completions"
    text: dict[str, Any] = {"messages": MESSAGES} if chat else {"prompt": PROMPT}
    body = {**text, "model": "diag", "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
    with server.client.stream("POST", path, json={**body, "stream_options": {"include_usage": True}}) as response:
        plain = [json.loads(line[6:]) for line in response.iter_lines() if line and line != "data: [DONE]"]
    chunks = events(server, path, uncertainty={"mode": "score"}, stream_options={"include_usage": True}, **text)
    *texts, late, usage = chunks
    assert [choice for chunk in texts for choice in chunk["choices"]] == [
        choice for chunk in plain[:-1] for choice in chunk["choices"]
    ]
    prompt = CHAT_PROMPT if chat else PROMPT
    mean = [step.token for step in reference.greedy(prompt, NEW_TOKENS, ["mean"])]
    [choice] = late["choices"]
    assert choice.get("text") == (None if chat else "") and choice["finish_reason"] is None
    parity.described("score, streaming", choice["uncertainty"], reference.read(prompt, mean, MEMBERS))
    assert usage["usage"]["completion_tokens"] == NEW_TOKENS
    assert usage["usage"]["uncertainty_details"]["sample_completion_tokens"] == 0


def test_the_score_route(server: Server, reference: Reference, parity: Parity) -> None:
    text = [60, 61, 62, 63]
    steps = reference.read(PROMPT, text, MEMBERS)
    for completion in (text, words(text)):
        body = {"model": "diag", "prompt": PROMPT, "completion": completion}
        response = server.client.post(
            "/v1/uncertainty/score", json={**body, "uncertainty": {"n_samples": K, "granularity": "token"}}
        )
        assert response.status_code == 200, response.text
        document = response.json()
        parity.described("score route", document["uncertainty"], steps)
        assert [token["token"] for token in document["uncertainty"]["tokens"]] == [words([token]) for token in text]
        assert all(token["logprob"] <= token["top_logprob"] for token in document["uncertainty"]["tokens"])
        assert document["object"] == "uncertainty.score"
        assert document["usage"]["completion_tokens"] == 4 and document["usage"]["prompt_tokens"] == len(PROMPT)
    messages = [*MESSAGES, {"role": "assistant", "content": words(text).strip()}]
    response = server.client.post(
        "/v1/uncertainty/score",
        json={"model": "diag", "messages": messages, "uncertainty": {"n_samples": K, "granularity": "token"}},
    )
    parity.described("score route", response.json()["uncertainty"], reference.read(CHAT_PROMPT, text, MEMBERS))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "w1"}, None),
        ({"prompt": "w1", "completion": "w2", "messages": MESSAGES}, None),
        ({"messages": MESSAGES}, None),
        ({"prompt": "w1", "completion": ""}, "completion"),
        ({"prompt": "w1", "completion": [VOCABULARY]}, "completion"),
        ({"prompt": "w1", "completion": [5] * 192}, "completion"),
        ({"prompt": "w1", "completion": "w2", "temperature": 0}, "temperature"),
    ],
)
def test_what_cannot_be_scored_is_refused(server: Server, body: dict[str, Any], param: str | None) -> None:
    response = server.client.post("/v1/uncertainty/score", json={"model": "diag", **body})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


# --- choices ---------------------------------------------------------------------------------------------------------

LABELS = {" w20": [23], " w21 w22": [24, 25], " w21 w30 w31": [24, 33, 34], " w50": [53]}


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("prompt", [PROMPT, LONG], ids=["short", "long"])
def test_choices_are_exact_sequence_probabilities(
    server: Server, reference: Reference, parity: Parity, prompt: list[int], normalized: bool
) -> None:
    document = complete(
        server,
        prompt,
        uncertainty={
            "mode": "choices",
            "choices": list(LABELS),
            "length_normalized": normalized,
            "return_samples": True,
        },
    )
    log_probs = torch.zeros(K, len(LABELS), dtype=torch.float64)
    for column, tokens in enumerate(LABELS.values()):
        read = reference.log_probs(prompt + tokens[:-1], MEMBERS)[:, len(prompt) - 1 :]
        for step, token in enumerate(tokens):
            log_probs[:, column] += read[:, step, token] / (len(tokens) if normalized else 1)
    q = log_probs.softmax(-1)
    uncertainty = document["choices"][0]["uncertainty"]
    for column, entry in enumerate(uncertainty["choices"]):
        assert entry["label"] == list(LABELS)[column]
        parity.close("choices", entry["prob"], float(q.mean(0)[column]))
        parity.close("choices", entry["std"], float(q[:, column].std(correction=0)))
        for sample, row in zip(uncertainty["samples"], q, strict=True):
            parity.close("choices", sample["probs"][entry["label"]], float(row[column]))
    parity.close("choices", uncertainty["total"], float(torch.special.entr(q.mean(0)).sum()))
    parity.close("choices", uncertainty["aleatoric"], float(torch.special.entr(q).sum(-1).mean()))
    assert uncertainty["unit"] == "nats"
    if not normalized:
        parity.close("choices", uncertainty["choices_mass"], float(log_probs.exp().sum(-1).mean()))
    top = int(q.mean(0).argmax())
    assert document["choices"][0]["text"] == list(LABELS)[top]
    assert document["choices"][0]["finish_reason"] == "stop"
    assert ids(document) == list(LABELS.values())[top]
    assert uncertainty["confidence"] == max(entry["prob"] for entry in uncertainty["choices"])


def test_the_prompt_is_read_once_per_sample_not_once_per_label(server: Server) -> None:
    """Prompt tokens that the engine had to compute: a new prompt of 3 blocks under K samples, then only what is left of the last block."""
    prompt = [
        int(token) for token in torch.randint(3, VOCABULARY, (3 * 32 + 5,), generator=torch.Generator().manual_seed(4))
    ]
    hits, asked = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"

    def computed() -> float:
        totals = dict.fromkeys((hits, asked), 0.0)
        for row in server.client.get("/metrics").text.splitlines():
            for name in totals:
                if row.startswith(name + "{"):
                    totals[name] += float(row.rpartition(" ")[2])
        return totals[asked] - totals[hits]

    before = computed()
    complete(server, prompt, uncertainty={"mode": "choices", "choices": list(LABELS)})
    spent = computed() - before
    multi = [tokens for tokens in LABELS.values() if len(tokens) > 1]
    assert spent == K * (len(prompt) + sum(5 + len(tokens) - 1 for tokens in multi))


def test_a_classification_adapter_knows_its_labels_by_name(
    model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Label names stand for their answer tokens, and the stored temperature applies to all labels."""
    folder = tmp_path_factory.mktemp("labels")
    artifact = make_artifact(
        folder / "a",
        temperature={4: 2.0},
        training={"format": "label", "labels": ["cat", "dog"], "label_tokens": [23, 53]},
    )
    assert credence(["draw", str(artifact.path), "--k", str(K), "--output", str(folder / "samples")]) == 0
    reference = Reference(model_path, {name: folder / "samples" / f"sample-0{i}" for i, name in enumerate(MEMBERS)})
    running = start(credence_command(model_path, {"diag": artifact.path}), folder / "log", "/readyz")
    try:
        document = complete(running, uncertainty={"mode": "choices", "choices": ["cat", "dog"]})
        q = reference.log_probs(PROMPT, MEMBERS)[:, -1, [23, 53]].softmax(-1).mean(0)
        tempered = q**0.5 / (q**0.5).sum()
        uncertainty = document["choices"][0]["uncertainty"]
        assert uncertainty["calibrated"]
        for entry, expected in zip(uncertainty["choices"], tempered, strict=True):
            assert entry["prob"] == pytest.approx(float(expected), abs=TOLERANCE)
    finally:
        running.stop()


# --- generate --------------------------------------------------------------------------------------------------------


def test_generate_compares_one_completion_per_sample(server: Server, reference: Reference, parity: Parity) -> None:
    document = complete(server, max_tokens=1, uncertainty={"mode": "generate", "n_samples": 8, "return_samples": True})
    uncertainty = document["choices"][0]["uncertainty"]
    names = [f"s{index}" for index in range(8)]
    said = [reference.greedy(PROMPT, 1, [name])[0] for name in names]
    assert [sample["text"] for sample in uncertainty["samples"]] == [words([step.token]) for step in said]
    for sample, step in zip(uncertainty["samples"], said, strict=True):
        parity.close("generate", sample["mean_logprob"], step.log_prob)
    counts = {token: sum(step.token == token for step in said) for token in {step.token for step in said}}
    assert sorted((answer["count"] for answer in uncertainty["answers"]), reverse=True) == sorted(
        counts.values(), reverse=True
    )
    returned = ids(document)
    assert counts[returned[0]] == max(counts.values())
    assert uncertainty["agreement"] == uncertainty["confidence"] == max(counts.values()) / 8
    steps = reference.read(PROMPT, returned, names)
    parity.described("generate", uncertainty, steps)


def test_generate_on_chat_in_a_stream(server: Server) -> None:
    whole = complete(server, path="/v1/chat/completions", messages=MESSAGES, uncertainty={"mode": "generate"})
    chunks = events(server, "/v1/chat/completions", messages=MESSAGES, uncertainty={"mode": "generate"})
    mine = [choice for chunk in chunks for choice in chunk["choices"]]
    assert "".join(choice["delta"].get("content") or "" for choice in mine) == whole["choices"][0]["message"]["content"]
    assert mine[-1]["uncertainty"] == whole["choices"][0]["uncertainty"]


# --- adaptive K ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["choices", "generate", "score"])
def test_adaptive_requests_stop_when_they_can_and_agree_with_a_fixed_k(server: Server, mode: str) -> None:
    options: dict[str, Any] = {"mode": mode, "n_samples": "auto", "granularity": "sequence"}
    if mode == "choices":
        options["choices"] = [" w20", " w50", " w70"]
    else:
        options["threshold"] = 1e-6
    uncertainty = complete(server, uncertainty=options)["choices"][0]["uncertainty"]
    auto = uncertainty["auto"]
    assert auto["stages"] in ([4], [4, 8])
    assert auto["settled"] == (auto["stages"] == [4])
    assert (uncertainty["n_samples"], uncertainty["n_effective"]) == (8, auto["stages"][-1])
    fixed = complete(server, uncertainty={**options, "n_samples": auto["stages"][-1]})["choices"][0]["uncertainty"]
    for key in ("total", "epistemic", "confidence", "flag"):
        assert uncertainty[key] == fixed[key] or math.isclose(uncertainty[key], fixed[key], abs_tol=1e-5)


# --- the merged layout -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["diag", "row"])
def test_a_merged_model_answers_in_every_mode(
    model_path: Path, artifacts: dict[str, Artifact], tmp_path: Path, parity: Parity, kind: str
) -> None:
    """Rank 2r (diag: both factors are noisy) and r (row): the mean is the base model, samples are deltas that PEFT puts onto it."""
    merged = tmp_path / "merged"
    command = ["merge", str(artifacts[kind].path), "--base", str(model_path), "--output", str(merged), "--name", "diag"]
    assert credence(command) == 0
    assert credence(["draw", str(merged), "--k", "8", "--output", str(tmp_path / "deltas")]) == 0
    samples = {f"s{index}": tmp_path / "deltas" / f"sample-{index:02d}" for index in range(8)}
    reference = Reference(merged, samples)
    name = f"merged ({kind})"
    running = start(credence_command(merged, {}, "--served-model-name", "diag"), tmp_path / "log", "/readyz")
    try:
        document = complete(running, [PROMPT, LONG], **TWO)
        for index, choice in enumerate(document["choices"]):
            steps = reference.greedy((PROMPT, LONG)[index // 2], NEW_TOKENS, list(MEMBERS))
            parity.tokens(f"{name}, ensemble", choice["token_ids"], [step.token for step in steps])
            parity.described(f"{name}, ensemble", choice["uncertainty"], steps)
        document = complete(running, uncertainty={"mode": "score"})
        mean = [step.token for step in reference.greedy(PROMPT, NEW_TOKENS, [None])]
        parity.tokens(f"{name}, score", ids(document), mean)
        parity.described(f"{name}, score", document["choices"][0]["uncertainty"], reference.read(PROMPT, mean, MEMBERS))
        plain = running.complete(model="diag", prompt=PROMPT, max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
        assert plain.json()["choices"][0]["text"] == document["choices"][0]["text"]
        document = complete(running, uncertainty={"mode": "choices", "choices": list(LABELS)})
        assert document["choices"][0]["text"] in LABELS
        [card] = [card for card in running.client.get("/v1/models").json()["data"] if card["id"] == "diag"]
        assert card["posterior"]["digest"] == artifacts[kind].digest
    finally:
        running.stop()


# --- our client ------------------------------------------------------------------------------------------------------


def test_our_client_in_every_mode(server: Server) -> None:
    with Client(server.url) as client:
        options = {"model": "diag", "uncertainty": True, "n_samples": K, "temperature": 0.0, "max_tokens": 4}
        label = client.complete(PROMPT, mode="choices", choices=list(LABELS), **options)
        assert label.uncertainty is not None and label.uncertainty.choices is not None
        assert label.text == max(label.uncertainty.choices, key=lambda choice: choice.prob).label
        several = client.complete([PROMPT, LONG], mode="generate", **options)
        assert [choice.uncertainty.agreement is not None for choice in several.choices if choice.uncertainty] == [
            True
        ] * 2
        chat = client.chat(MESSAGES, granularity="token", **options)
        assert chat.uncertainty is not None and chat.uncertainty.tokens is not None
        with client.stream_chat(MESSAGES, granularity="token", **options) as stream:
            streamed = [token.token for chunk in stream for choice in chunk.choices for token in choice.tokens]
            assert stream.uncertainty is not None
        assert streamed == [token.token for token in chat.uncertainty.tokens]
        with client.stream_complete(PROMPT, mode="score", **options) as stream:
            text = "".join(choice.text for chunk in stream for choice in chunk.choices)
            scored = stream.uncertainty
        assert scored is not None
        again = client.score(prompt=PROMPT, completion=text, model="diag", n_samples=K)
        for number in ("total", "epistemic", "confidence"):
            assert getattr(again.uncertainty, number) == pytest.approx(getattr(scored, number), abs=TOLERANCE)
        with pytest.raises(BadRequestError) as caught:
            client.stream_complete(PROMPT, mode="ensemble", **{**options, "max_tokens": 1000})
        assert caught.value.param == "max_tokens"


# --- what cannot be combined -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"uncertainty": {"mode": "choices", "choices": ["w1", " w1"]}}, "uncertainty.choices"),
        ({"uncertainty": {"mode": "generate"}, "n": 2}, "n"),
        ({"uncertainty": {"mode": "generate"}, "logprobs": 1}, "logprobs"),
        ({"uncertainty": {"mode": "choices", "choices": ["w1", "w2"]}, "n": 2}, "n"),
        ({"uncertainty": True, "echo": True, "logprobs": 1}, "echo"),
        ({"uncertainty": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"uncertainty": True, "use_beam_search": True}, "use_beam_search"),
        ({"uncertainty": True, "n": 200}, "n"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_come_before_the_stream(server: Server, body: dict[str, Any], param: str, stream: bool) -> None:
    assert refused(server, stream=stream, **body)["param"] == param

"""Constraints come after averaging: a real engine against a slow float64 computation over transformers + PEFT."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from credence.serve.step_stats import StepStats, StepTable
from credence.serve.vllm_plugin.averaging import ChoiceRule, choose_token
from tests.serve.vllm_plugin.conftest import CHUNK, VOCABULARY, Engine, Reference, gang_members, generate, prompt

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

STEPS = 10
EOS = 1
Constrain = Callable[[Tensor, list[int]], Tensor]
"""Averaged log-probabilities [V] and the output so far -> constrained log-probabilities."""


def word(token: int) -> str:
    """The tiny tokenizer's text of a token."""
    return f"w{token - 3}"


def forbid(scores: Tensor, tokens: list[int]) -> Tensor:
    scores = scores.clone()
    scores[tokens] = -torch.inf
    return scores


def only(scores: Tensor, tokens: list[int]) -> Tensor:
    return forbid(scores, sorted(set(range(VOCABULARY)) - set(tokens)))


def slow(
    models: list[Reference],
    tokens: list[int],
    constrain: Constrain,
    rule: ChoiceRule,
    stop: tuple[int, ...] = (),
    steps: int = STEPS,
) -> tuple[list[int], list[float], list[int]]:
    """Tokens, their unconstrained averaged log-probabilities, and what the unconstrained average would have chosen, greedily."""
    output: list[int] = []
    log_probs, free = [], []
    while len(output) < steps and not (output and output[-1] in stop):
        members = torch.stack([model.log_probs(tokens + output)[-1] for model in models]).double()
        mean = members.exp().mean(0).log()
        scores = constrain(mean, output)
        for token in set(output):
            scores[token] -= rule.frequency_penalty * output.count(token) + rule.presence_penalty
        # The penalties are in the scores already.
        plain = ChoiceRule(seed=rule.seed, temperature=rule.temperature, top_k=rule.top_k, top_p=rule.top_p)
        output.append(int(choose_token(scores, plain, len(output))))
        log_probs.append(float(mean[output[-1]]))
        free.append(int(mean.argmax()))
    return output, log_probs, free


def run(
    engine: Engine, tokens: list[int], k: int, stats_path: str, leader: dict[str, Any], **sampling: Any
) -> tuple[list[list[int]], StepTable]:
    """Texts of the members and the records of a gang whose leader carries a constraint."""
    parameters, loras = gang_members(
        engine.artifact, k, f"c{tokens[:4]}", stats_path, leader=leader, top=3, **{"max_tokens": STEPS, **sampling}
    )
    with StepStats.create(stats_path, k, STEPS, 3) as stats:
        outputs = generate(engine, [tokens] * k, parameters, loras)
        texts = [list(output.outputs[0].token_ids) for output in outputs]
        return texts, stats.read(len(texts[0]))


def check(texts: list[list[int]], table: StepTable, expected: tuple[list[int], list[float], list[int]]) -> None:
    tokens, log_probs, free = expected
    assert texts == [tokens] * len(texts)
    assert table.token_id.tolist() == tokens
    assert table.log_prob.tolist() == pytest.approx(log_probs, abs=1e-4), (
        "the recorded scores are the unconstrained average's"
    )
    assert table.top_tokens[:, 0].tolist() == free
    assert tokens != free, "the constraint does nothing: the comparison proves nothing"


RULES = {
    "greedy": {},
    "sampled": {"temperature": 1.3, "top_k": 20, "top_p": 0.9},
    "penalised": {"frequency_penalty": 1.5, "presence_penalty": 0.5},
}


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("rule", list(RULES))
def test_logit_bias(engine: Engine, references: list[Reference], stats_path: str, rule: str, k: int) -> None:
    tokens = prompt(8, 400 + k + 10 * len(rule))
    bias = {5: 4.5, 17: 5.0, 90: 4.0, 33: -100.0}

    def constrain(scores: Tensor, output: list[int]) -> Tensor:
        scores = scores.clone()
        for token, value in bias.items():
            scores[token] += value
        return scores

    expected = slow(references[:k], tokens, constrain, ChoiceRule(seed=0, **RULES[rule]))
    check(*run(engine, tokens, k, stats_path, {"logit_bias": bias}, **RULES[rule]), expected)


@pytest.mark.parametrize("rule", list(RULES))
def test_allowed_token_ids(engine: Engine, references: list[Reference], stats_path: str, rule: str) -> None:
    tokens, allowed = prompt(9, 430 + len(rule)), [4, 8, 15, 16, 23, 42, 100]
    expected = slow(references[:3], tokens, lambda s, _: only(s, allowed), ChoiceRule(seed=0, **RULES[rule]))
    check(*run(engine, tokens, 3, stats_path, {"allowed_token_ids": allowed}, **RULES[rule]), expected)


def test_bad_words(engine: Engine, references: list[Reference], stats_path: str) -> None:
    """One word that the average would say, and the second half of a pair of words it would say next."""
    tokens = prompt(7, 440)
    free = slow(references[:2], tokens, lambda s, _: s.clone(), ChoiceRule(seed=0))[0]
    single = free[0]
    after = slow(references[:2], tokens, lambda s, _: forbid(s, [single]), ChoiceRule(seed=0))[0]
    pair = after[2], after[3]

    def constrain(scores: Tensor, output: list[int]) -> Tensor:
        banned = [single] + ([pair[1]] if output and output[-1] == pair[0] else [])
        return forbid(scores, banned)

    words = [word(single), f"{word(pair[0])} {word(pair[1])}"]
    expected = slow(references[:2], tokens, constrain, ChoiceRule(seed=0))
    assert expected[0] != after, "the pair does nothing"
    check(*run(engine, tokens, 2, stats_path, {"bad_words": words}), expected)


def test_min_tokens(engine: Engine, references: list[Reference], stats_path: str) -> None:
    """The token the average wants first ends the text, but only after four tokens."""
    tokens = prompt(7, 450)
    stop = slow(references[:2], tokens, lambda s, _: s.clone(), ChoiceRule(seed=0))[0][0]

    def constrain(scores: Tensor, output: list[int]) -> Tensor:
        biased = scores.clone()
        biased[stop] += 8.0
        return forbid(biased, [stop]) if len(output) < 4 else biased

    leader = {"min_tokens": 4, "logit_bias": {stop: 8.0}}
    expected = slow(references[:2], tokens, constrain, ChoiceRule(seed=0), stop=(stop,))
    assert len(expected[0]) == 5
    check(*run(engine, tokens, 2, stats_path, leader, stop_token_ids=[stop]), expected)


def follow(texts: list[list[int]]) -> Constrain:
    """Allows what continues one of these texts, and their end."""

    def constrain(scores: Tensor, output: list[int]) -> Tensor:
        following = {
            text[len(output)] if len(text) > len(output) else EOS for text in texts if text[: len(output)] == output
        }
        return only(scores, sorted(following))

    return constrain


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("kind", ["choice", "regex"])
def test_structured_output_of_the_leader_alone(
    engine: Engine, references: list[Reference], stats_path: str, kind: str, temperature: float
) -> None:
    """Only the leader has a grammar; the followers wait until it is compiled and say the same tokens, up to the end."""
    from vllm.sampling_params import StructuredOutputsParams

    tokens = prompt(CHUNK + 8, 460 + len(kind) + int(temperature))
    # Single digits: no other token is a prefix of these words, so a grammar has no dead end.
    first, second, third = [4, 5, 6], [7, 8], [9, 10]
    texts = [list(text) for text in itertools.product(first, second, third)]
    if kind == "choice":
        texts = texts[::2]
        # Words run together in a grammar, which knows the tokens' own text.
        grammar = StructuredOutputsParams(choice=["".join(map(word, text)) for text in texts])
    else:
        grammar = StructuredOutputsParams(
            regex="".join(f"({'|'.join(map(word, part))})" for part in (first, second, third))
        )
    rule = ChoiceRule(seed=0, temperature=temperature)
    expected = slow(references[:3], tokens, follow(texts), rule, stop=(EOS,))
    assert len(expected[0]) == 4
    found = run(
        engine, tokens, 3, stats_path, {"structured_outputs": grammar}, temperature=temperature, ignore_eos=False
    )
    check(*found, expected)


def test_constraints_together(engine: Engine, references: list[Reference], stats_path: str) -> None:
    """A grammar and a bias: both act before our processor, in this order."""
    from vllm.sampling_params import StructuredOutputsParams

    tokens = prompt(8, 480)
    texts = [[first, second] for first in (4, 5, 6) for second in (7, 8)]

    def constrain(scores: Tensor, output: list[int]) -> Tensor:
        scores = scores.clone()
        scores[[5, 8, 100]] += 9.0
        return follow(texts)(scores, output)

    expected = slow(references[:2], tokens, constrain, ChoiceRule(seed=0), stop=(EOS,))
    assert expected[0] == [5, 8, EOS]
    grammar = StructuredOutputsParams(choice=["".join(map(word, text)) for text in texts])
    leader = {"structured_outputs": grammar, "logit_bias": {5: 9.0, 8: 9.0, 100: 9.0}}
    check(*run(engine, tokens, 2, stats_path, leader, ignore_eos=False), expected)


def test_a_follower_with_a_constraint_is_refused(engine: Engine) -> None:
    from vllm.exceptions import VLLMValidationError

    parameters, loras = gang_members(engine.artifact, 2, "both", "", logit_bias={3: 1.0})
    with pytest.raises(VLLMValidationError, match="member 1 of a gang carries a constraint"):
        generate(engine, [prompt(5, 490)] * 2, parameters[::-1], loras)

"""Generated texts against a slow reference without any cache: tokens, scores of every token, sampling, stops and limits."""

import math
from pathlib import Path

import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, BloomConfig, MistralConfig, OPTConfig

from credence.adapters.posterior import LoraFactors
from credence.adapters.sampling import NoiseSource, token_uniform
from credence.training.config import LoraSettings
from credence.training.generate import GeneratedText, Sampling, generate, stop_tokens
from credence.training.modeling import add_lora, load_tokenizer, set_factors
from credence.training.predict import Predictor, score
from credence.training.prompts import Example
from tests.training.conftest import draws_of

PROMPTS = [(5, 6, 7), (9,), (30, 31, 32, 33, 34), (100, 101), (7, 5)]
Draws = list[dict[str, LoraFactors]]


def slow(
    predictor: Predictor, prompt: tuple[int, ...], draws: Draws, steps: int, calibration: float, seed: int | None = None
) -> tuple[list[int], list[list[float]]]:
    """One row, one draw, one pass over the whole text at a time, float64 after the logits; log_prob, total, epistemic, tempered."""
    ids, scores = list(prompt), []
    for step in range(steps):
        members = []
        for factors in draws:
            set_factors(predictor.sites, factors)
            with torch.no_grad():
                logits = predictor.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            members.append(torch.softmax(logits.double(), -1))
        average = torch.stack(members).mean(0)
        if seed is None:
            token = int(average.argmax())
        else:  # at temperature 0.8
            powered = (average ** (1 / 0.8)) / (average ** (1 / 0.8)).sum()
            token = next(i for i, c in enumerate(powered.cumsum(0).tolist()) if c > token_uniform(seed, step))
        total, expected = (float(-(p * p.log()).sum(-1).mean()) for p in (average, torch.stack(members)))
        tempered = average ** (1 / calibration)
        ids.append(token)
        scores.append(
            [math.log(average[token]), total, total - expected, math.log(float(tempered[token] / tempered.sum()))]
        )
    return ids[len(prompt) :], scores


def check(text: GeneratedText, tokens: list[int], scores: list[list[float]], length: int) -> None:
    assert list(text.tokens) == tokens[:length]
    columns = [list(column) for column in zip(*scores[:length], strict=True)]
    for found, expected in zip((text.log_probs, text.total, text.epistemic), columns, strict=False):
        assert list(found) == pytest.approx(expected, abs=1e-5)
    assert text.score == pytest.approx(sum(columns[0]) / length, abs=1e-5)
    assert text.tempered_score == pytest.approx(sum(columns[3]) / length, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
@pytest.mark.parametrize("k", [1, 3])
def test_greedy_texts_equal_a_slow_reference(predictor: Predictor, k: int, batch_size: int) -> None:
    """Prompts of different lengths, a stop token that some rows meet early and others never, and the context's end."""
    predictor.batch_size = batch_size
    draws, steps = draws_of(predictor)[:k], 6
    expected = [slow(predictor, prompt, draws, steps, 1.7) for prompt in PROMPTS]
    stop = expected[0][0][2]
    texts = generate(predictor, PROMPTS, draws, stop={stop}, max_new_tokens=steps, max_length=9, temperature=1.7)
    ends = set()
    for prompt, text, (tokens, scores) in zip(PROMPTS, texts, expected, strict=True):
        length = min(steps, 9 - len(prompt), tokens.index(stop) + 1 if stop in tokens else steps)
        check(text, tokens, scores, length)
        assert text.stopped == (tokens[length - 1] == stop)
        assert (max(text.epistemic) > 1e-3) == (k > 1)
        ends.add((text.stopped, length))
    assert {stopped for stopped, _ in ends} == {True, False} and any(length == 4 for _, length in ends)


@pytest.mark.parametrize("k", [1, 3])
def test_sampled_texts_equal_a_slow_reference(predictor: Predictor, k: int) -> None:
    draws, seeds = draws_of(predictor)[:k], [NoiseSource(3, 0, "tokens").token_seed(str(row)) for row in range(5)]
    sampling = Sampling(seeds=seeds, temperature=0.8)
    texts = generate(predictor, PROMPTS, draws, stop=(), max_new_tokens=5, max_length=128, sampling=sampling)
    for prompt, text, seed in zip(PROMPTS, texts, seeds, strict=True):
        check(text, *slow(predictor, prompt, draws, 5, 1.0, seed), 5)
    alone = Sampling(seeds=seeds[2:3], temperature=0.8)
    assert generate(predictor, PROMPTS[2:3], draws, stop=(), max_new_tokens=5, max_length=128, sampling=alone)[
        0
    ].tokens == (texts[2].tokens)


def test_samples_follow_the_average(predictor: Predictor) -> None:
    """2,000 first tokens of one prompt against the probabilities of the average of three draws."""
    predictor.batch_size, draws, count = 600, draws_of(predictor), 2000
    example = Example(PROMPTS[0], (0,), (), None, 0)
    probabilities = next(predictor.predict([example], draws, [3])).log_mean_PC[0].double().exp()
    seeds = [NoiseSource(0, index, "tokens").token_seed("0") for index in range(count)]
    texts = generate(
        predictor, PROMPTS[:1] * count, draws, stop=(), max_new_tokens=1, max_length=128, sampling=Sampling(seeds=seeds)
    )
    counts = torch.bincount(torch.tensor([text.tokens[0] for text in texts]), minlength=258).double()
    often = probabilities > 20 / count
    pooled = [torch.cat([x[often], x[~often].sum()[None]]).numpy() for x in (counts, probabilities * count)]
    assert int(often.sum()) > 5
    assert chisquare(pooled[0], pooled[1] * pooled[0].sum() / pooled[1].sum()).pvalue > 1e-3


SIZES = {
    "vocab_size": 258,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}
MODELS = {
    "sliding window": MistralConfig(
        **SIZES, intermediate_size=48, num_key_value_heads=1, sliding_window=3, max_position_embeddings=64
    ),
    "learned positions": OPTConfig(
        **{name: size for name, size in SIZES.items() if name != "initializer_range"},
        init_std=0.2,
        ffn_dim=48,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        dropout=0.0,
    ),
    "no positions": BloomConfig(
        vocab_size=258, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.2, hidden_dropout=0.0
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_other_models_caches_hold_the_same(name: str) -> None:
    torch.manual_seed(0)
    target = "query_key_value" if name == "no positions" else "q_proj"
    settings = LoraSettings(r=4, alpha=8, target_modules=(target,))
    model, sites = add_lora(AutoModelForCausalLM.from_config(MODELS[name]), settings)
    model.eval()
    for site in sites:
        torch.nn.init.normal_(site.mean.B, std=0.3)
    predictor = Predictor(model, sites, pad_token=0, batch_size=9)
    draws = draws_of(predictor)
    expected = [slow(predictor, prompt, draws, 6, 1.0) for prompt in PROMPTS]
    stop = {expected[1][0][1]}
    texts = generate(predictor, PROMPTS, draws, stop=stop, max_new_tokens=6, max_length=64)
    for text, (tokens, scores) in zip(texts, expected, strict=True):
        check(text, tokens, scores, min((tokens.index(token) + 1 for token in stop if token in tokens), default=6))
    assert len({len(text.tokens) for text in texts}) > 1


def test_memory_is_bounded_by_the_batch_size(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences whose keys and values are held at once: rows under way times draws; one row at least."""
    held: list[int] = []
    forward = predictor.model.forward

    def counted(input_ids: torch.Tensor, **kwargs: object) -> object:
        held.append(len(input_ids) * 3)
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(predictor.model, "forward", counted)
    for batch_size, expected in ((7, 6), (2, 3)):
        held.clear()
        predictor.batch_size = batch_size
        generate(predictor, PROMPTS, draws_of(predictor), stop=(), max_new_tokens=2, max_length=128)
        assert max(held) == expected


def test_a_prompt_that_fills_the_context_has_no_text(predictor: Predictor) -> None:
    first, second = generate(predictor, [(5, 6, 7), (5,)], draws_of(predictor), stop=(), max_new_tokens=4, max_length=3)
    assert (first.tokens, first.stopped, first.score) == ((), False, 0.0) and len(second.tokens) == 2
    with pytest.raises(ValueError, match="one seed for each prompt"):
        generate(
            predictor,
            [(5,), (6,)],
            draws_of(predictor),
            stop=(),
            max_new_tokens=1,
            max_length=3,
            sampling=Sampling(seeds=[1]),
        )


def test_greedy_text_is_the_reference_exactly_where_teacher_forcing_agrees_everywhere(predictor: Predictor) -> None:
    draws = draws_of(predictor)
    own = generate(predictor, PROMPTS, draws, stop=(), max_new_tokens=3, max_length=128)
    rows = [Example(prompt, text.tokens, (), None, 0) for prompt, text in zip(PROMPTS, own, strict=True)]
    for position in range(3):  # one token of the reference is another one
        changed = list(own[0].tokens)
        changed[position] = (changed[position] + 1) % 258
        rows.append(Example(PROMPTS[0], tuple(changed), (), None, 0))
    agrees = [True] * len(rows)
    for prediction in predictor.predict(rows, draws, [3]):
        scores = score(prediction)
        for row, right in zip(scores.row.tolist(), scores.correct.tolist(), strict=True):
            agrees[row] &= right
    assert agrees == [True] * len(PROMPTS) + [False] * 3
    greedy = generate(predictor, [r.prompt for r in rows], draws, stop=(), max_new_tokens=3, max_length=128)
    assert [text.tokens == row.target for text, row in zip(greedy, rows, strict=True)] == agrees


def test_texts_end_where_vllm_ends_them(predictor: Predictor, base: Path) -> None:
    tokenizer = load_tokenizer(base)
    assert stop_tokens(predictor.model, tokenizer) == {1}
    predictor.model.generation_config.eos_token_id = [1, 7]
    assert stop_tokens(predictor.model, tokenizer) == {1, 7}

"""Greedy texts of the posterior predictive, in transformers: what the server's ensemble says at temperature 0."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from credence.training.predict import Factors, Predictor, temper
from credence.training.prompts import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedyText:
    """One text and its scores.

    Attributes:
        tokens: what was generated, with the stop token if there is one at the end.
        stopped: whether it ended with a stop token, not at a limit.
        score: mean log-probability of the tokens under the average at temperature 1, nats.
        tempered_score: the same at the temperature asked for.
    """

    tokens: tuple[int, ...]
    stopped: bool
    score: float
    tempered_score: float


def generate_greedily(
    predictor: Predictor,
    prompts: Sequence[Sequence[int]],
    draws: Sequence[Factors],
    *,
    stop: Collection[int],
    max_new_tokens: int,
    max_length: int,
    temperature: float = 1.0,
) -> list[GreedyText]:
    """Appends to every prompt the token that the average over the draws finds most likely, until a stop token.

    Greedy decoding gives a reference text exactly if, teacher-forced, the most likely token equals the reference at every position: the
    context of a position differs between the two only if an earlier token does, so the first difference of one is that of the other.
    Where it gives another text, the reference's score is not that of the text the model says; hence the texts are generated.

    There is no cache of keys and values, as every draw would need its own: a text of n tokens costs n passes per draw.

    Args:
        prompts: token ids, none empty.
        stop: token ids that end a text.
        max_length: longest prompt with text, in tokens: the model's context.
        temperature: of ``tempered_score``; it does not change the text.

    Returns:
        One text for each prompt; without any token where the prompt fills the context.
    """
    tokens: list[list[int]] = [[] for _ in prompts]
    sums = [[0.0, 0.0] for _ in prompts]
    running = list(range(len(prompts)))
    for length in range(max_new_tokens):
        # The predictor reads one target after each prompt; which token stands there does not reach the prediction before it.
        running = [row for row in running if len(prompts[row]) + length + 1 <= max_length]
        examples = [Example((*prompts[row], *tokens[row]), (0,), (), None, 0) for row in running]
        if not examples:
            break
        going_on = set(running)
        for prediction in predictor.predict(examples, draws, [len(draws)]):
            log_prob, chosen = prediction.log_mean_PC.max(-1)
            tempered = temper(prediction.log_mean_PC, temperature).gather(1, chosen[:, None]).squeeze(1)
            batch = zip(prediction.row.tolist(), chosen.tolist(), log_prob.tolist(), tempered.tolist(), strict=True)
            for index, token, at_one, at_temperature in batch:
                row = running[index]
                tokens[row].append(token)
                sums[row][0] += at_one
                sums[row][1] += at_temperature
                if token in stop:
                    going_on.discard(row)
        running = sorted(going_on)
    return [
        GreedyText(
            tokens=tuple(text),
            stopped=bool(text) and text[-1] in stop,
            score=score / max(len(text), 1),
            tempered_score=tempered_score / max(len(text), 1),
        )
        for text, (score, tempered_score) in zip(tokens, sums, strict=True)
    ]


def stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's end of text and those of the model's generation settings, as vLLM takes them."""
    found = {tokenizer.eos_token_id}
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found.update(given if isinstance(given, list | tuple) else [given])
    return frozenset(int(token) for token in found if token is not None)

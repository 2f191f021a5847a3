"""What one request may ask for, with and without uncertainty. Unbounded numbers of sequences, prompts and log-probabilities have ended
engines for everybody; here they meet one table of limits before anything is rendered, tokenised or queued.

The numbers are read strictly: vLLM takes true, "5" and 5.0 for an integer, and a limit must see what the engine will see.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from credence.serve.errors import BadRequest

MAX_TOKEN_ID = 2**31 - 1

Count = Annotated[int, Field(ge=1)]


class RequestLimits(BaseModel):
    """Limits of one request; a 400 that names the field.

    Attributes:
        max_sequences: n x (1 + K) x prompts, the largest number of rows that the engine could hold for it.
        max_n: completions of one prompt.
        max_prompts: prompts.
        max_messages: messages of a conversation.
        max_logprobs: log-probabilities of one token, of answer or prompt; the whole vocabulary (-1) never.
        max_stop, max_stop_chars: stop strings, and characters of one.
        max_bad_words, max_bad_word_chars: forbidden words, and characters of one.
        max_token_list: token ids in ``stop_token_ids``, ``allowed_token_ids`` and ``logprob_token_ids``.
        max_logit_bias: entries of ``logit_bias``.
        max_tools: tools.
        max_label_chars: characters of one label in ``uncertainty.choices``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_sequences: Count = 2048
    max_n: Count = 128
    max_prompts: Count = 1024
    max_messages: Count = 4096
    max_logprobs: Count = 20
    max_stop: Count = 16
    max_stop_chars: Count = 512
    max_bad_words: Count = 128
    max_bad_word_chars: Count = 512
    max_token_list: Count = 4096
    max_logit_bias: Count = 1024
    max_tools: Count = 128
    max_label_chars: Count = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How large a request is.

    Attributes:
        prompts: number of prompts.
        n: completions of each.
        prompt_tokens: at most so many tokens in all prompts together. No tokenizer with byte fallback makes more tokens of a text than it
            has bytes, up to a few special ones.
        max_tokens: largest number of tokens of one completion; None where only the model's length bounds it.
    """

    prompts: int
    n: int
    prompt_tokens: int
    max_tokens: int | None

    def sample_tokens(self, k: int, max_model_len: int) -> int:
        """At most so many tokens under K posterior samples."""
        new = max_model_len if self.max_tokens is None else min(self.max_tokens, max_model_len)
        return k * self.n * (min(self.prompt_tokens, self.prompts * max_model_len) + self.prompts * new)


def check(body: Mapping[str, Any], limits: RequestLimits) -> Size:
    """Checks a body of a generating route; fields that are absent, or have no limit, are vLLM's to judge.

    Raises:
        BadRequest: names the field.
    """
    n = _integer(body, "n", 1, limits.max_n) or 1
    if "best_of" in body:
        n = max(n, _integer(body, "best_of", 1, limits.max_n) or 1)
    if not isinstance(body.get("logprobs"), bool):  # of a conversation it is a switch
        _integer(body, "logprobs", 0, limits.max_logprobs)
    for field in ("top_logprobs", "prompt_logprobs"):
        _integer(body, field, 0, limits.max_logprobs)
    _texts(body, "stop", limits.max_stop, limits.max_stop_chars)
    _texts(body, "bad_words", limits.max_bad_words, limits.max_bad_word_chars)
    for field in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
        _token_ids(body.get(field), field, limits.max_token_list)
    _logit_bias(body.get("logit_bias"), limits.max_logit_bias)
    _length(body, "tools", limits.max_tools)
    _length(body, "documents", limits.max_messages)
    chosen = [_integer(body, field, 0, MAX_TOKEN_ID) for field in ("max_tokens", "max_completion_tokens")]
    known = [value for value in chosen if value is not None]
    if "messages" in body:
        _length(body, "messages", limits.max_messages)
        # An estimate from above: what a template adds to a message is less than its JSON.
        prompts, tokens = (
            1,
            _bytes_in(body["messages"]) + _bytes_in(body.get("tools")) + _bytes_in(body.get("documents")),
        )
        most = max(known, default=None)
    else:
        prompts, tokens = _prompt(body.get("prompt"), limits.max_prompts)
        most = max(known, default=None if body.get("max_tokens", 16) is None else 16)
    _, completion = _prompt(body.get("completion"), 1, field="completion")
    size = Size(prompts=prompts, n=n, prompt_tokens=tokens + completion, max_tokens=most)
    check_sequences(size, 0, limits)
    return size


def check_sequences(size: Size, k: int, limits: RequestLimits) -> None:
    """Checks the one budget of rows; raises BadRequest."""
    rows = size.n * (1 + k) * size.prompts
    if rows > limits.max_sequences:
        raise BadRequest(
            f"n x (1 + samples) x prompts is {size.n} x {1 + k} x {size.prompts} = {rows}, the server takes {limits.max_sequences} in one "
            "request; ask for less at once",
            param="uncertainty.n_samples" if k and rows // (1 + k) <= limits.max_sequences // 2 else "n",
        )


def check_labels(labels: Sequence[str], limits: RequestLimits) -> None:
    """Checks the lengths of the labels to choose from; their number has a limit in the schema. Raises BadRequest."""
    longest = max(map(len, labels), default=0)
    if longest > limits.max_label_chars:
        raise BadRequest(
            f"uncertainty.choices has a label of {longest} characters, at most {limits.max_label_chars} are taken",
            param="uncertainty.choices",
        )


def _integer(body: Mapping[str, Any], field: str, least: int, most: int) -> int | None:
    value = body.get(field)
    if value is None:
        return None
    if type(value) is not int:
        raise BadRequest(f"{field} must be an integer, got {value!r:.80}", param=field)
    if not least <= value <= most:
        raise BadRequest(f"{field} must be {least} to {most}, got {value}", param=field)
    return value


def _texts(body: Mapping[str, Any], field: str, most: int, most_chars: int) -> None:
    value = body.get(field)
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRequest(f"{field} must be a text or a list of texts", param=field)
    longest = max(map(len, texts), default=0)
    if len(texts) > most or longest > most_chars:
        raise BadRequest(
            f"{field} has {len(texts)} texts, the longest of {longest} characters; at most {most} of at most {most_chars} are taken",
            param=field,
        )


def _token_ids(value: Any, field: str, most: int) -> None:
    if value is None:
        return
    if not isinstance(value, list) or len(value) > most:
        raise BadRequest(f"{field} must be a list of at most {most} token ids", param=field)
    _check_ids(value, field)


def _check_ids(ids: list[Any], field: str) -> None:
    # By type, not isinstance: true is an instance of int.
    if ids and (set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) > MAX_TOKEN_ID):
        raise BadRequest(f"{field} must hold token ids, integers from 0 to {MAX_TOKEN_ID}", param=field)


def _logit_bias(value: Any, most: int) -> None:
    if value is None:
        return
    if not isinstance(value, dict) or len(value) > most:
        raise BadRequest(f"logit_bias must be an object with at most {most} entries", param="logit_bias")
    for token, bias in value.items():
        if not (token.isascii() and token.isdigit() and len(token) <= 10) or type(bias) not in (int, float):
            raise BadRequest(f"logit_bias must give token ids a number each, got {token!r:.80}", param="logit_bias")


def _length(body: Mapping[str, Any], field: str, most: int) -> None:
    value = body.get(field)
    if value is not None and (not isinstance(value, list) or len(value) > most):
        raise BadRequest(f"{field} must be a list of at most {most}", param=field)


def _prompt(value: Any, most: int, field: str = "prompt") -> tuple[int, int]:
    """Number of prompts, and of their tokens at most: a text, a list of token ids, or a list of either."""
    if value is None:
        return 1, 0
    several = isinstance(value, list) and bool(value) and isinstance(value[0], str | list)
    prompts = value if several else [value]
    if len(prompts) > most:
        raise BadRequest(f"{field} has {len(prompts)} prompts, the server takes {most} in one request", param=field)
    if several and len(set(map(type, prompts))) > 1:
        raise BadRequest(f"{field} mixes texts and lists of token ids; give one kind", param=field)
    tokens = 0
    for prompt in prompts:
        if isinstance(prompt, str):
            tokens += len(prompt.encode()) + 2
        elif isinstance(prompt, list):
            _check_ids(prompt, field)
            tokens += len(prompt)
        else:
            raise BadRequest(
                f"{field} must be a text, a list of token ids, or a list of texts or of lists of token ids", param=field
            )
    return len(prompts), tokens


def _bytes_in(value: Any) -> int:
    """Bytes of all texts in a JSON value, and some for every object and list in it."""
    total, pending = 0, [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            total += len(item.encode())
        elif isinstance(item, dict):
            total += 16
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            total += 16
            pending += item
        else:
            total += 8
    return total

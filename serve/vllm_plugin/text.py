"""Between text and tokens: what each token adds to a text, and which tokens continue a prompt."""

from collections.abc import Sequence
from typing import Any

from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens

CONTEXT_TOKENS = 8
"""Tokens before a place that are enough to decode or encode it as in the whole text."""


def token_texts(tokenizer: Any, prompt_ids: list[int], token_ids: list[int]) -> list[str]:
    """The text each token adds, decoded after the few tokens before it, so that leading spaces and split characters come out right."""
    ids = prompt_ids[-CONTEXT_TOKENS:] + token_ids
    texts = []
    for end in range(len(ids) - len(token_ids), len(ids)):
        start = max(0, end - CONTEXT_TOKENS)
        before, after = tokenizer.decode(ids[start:end]), tokenizer.decode(ids[start : end + 1])
        whole = after.startswith(before) and not after.endswith("\ufffd")
        texts.append(after[len(before) :] if whole else convert_ids_list_to_tokens(tokenizer, [ids[end]])[0])
    return texts


def texts_instead(
    tokenizer: Any, prompt_ids: list[int], token_ids: list[int], others: Sequence[Sequence[int]]
) -> list[list[str]]:
    """The texts that other tokens would have added in place of each token.

    Args:
        others: [T][K] token ids.
    """
    rows = []
    for position, row in enumerate(others):
        context = prompt_ids[-CONTEXT_TOKENS:] + token_ids[:position]
        text = {token: token_texts(tokenizer, context, [token])[0] for token in set(row)}
        rows.append([text[token] for token in row])
    return rows


def continuation(tokenizer: Any, prompt_ids: list[int], text: str) -> list[int]:
    """The tokens of ``text`` as it continues a prompt.

    Encoded together with the prompt's last tokens, as a model that writes the text would meet it. Where the tokenizer would join the two
    (the prompt ends inside a word), or does not give back the prompt's tokens, ``text`` is encoded alone, as training encodes completions.
    """
    context = tokenizer.decode(prompt_ids[-CONTEXT_TOKENS:])
    before = tokenizer.encode(context, add_special_tokens=False)
    after = tokenizer.encode(context + text, add_special_tokens=False)
    if before and after[: len(before)] == before and len(after) > len(before):
        return list(after[len(before) :])
    return list(tokenizer.encode(text, add_special_tokens=False))

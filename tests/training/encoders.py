"""Tiny random encoders, RoBERTa and BERT, with a byte-level tokenizer, and rows they can learn."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

SPECIAL = {"<s>": 0, "<pad>": 1, "</s>": 2}
SIZES = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 1,
}


def pair_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; rows are ``<s> A </s>``, pairs ``<s> A </s> B </s>`` whose second part has type 1."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {**SPECIAL, **{symbol: index + len(SPECIAL) for index, symbol in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>")


def make_encoder(folder: Path, family: str = "roberta", *, dropout: float = 0.0) -> Path:
    """Writes a random two-layer masked language model; its folder has no classification head, and BERT's no pooling layer."""
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_dropout_prob": dropout}
    if family == "roberta":
        config = RobertaConfig(max_position_embeddings=66, type_vocab_size=1, bos_token_id=0, eos_token_id=2, **sizes)
        RobertaForMaskedLM(config).save_pretrained(folder)
    else:
        BertForMaskedLM(BertConfig(max_position_embeddings=64, type_vocab_size=2, **sizes)).save_pretrained(folder)
    pair_tokenizer().save_pretrained(folder)
    return folder


def class_rows(count: int, *, start: int = 0) -> list[dict[str, str]]:
    """Rows of several lengths whose class is their first word; three classes."""
    names = ("dog", "cat", "bird")
    return [
        {"text": f"{names[i % 3]} {'x' * (i * 5 % 11)}{(i * 7) % 10}", "label": names[i % 3]}
        for i in range(start, start + count)
    ]


def pair_rows(count: int, *, start: int = 0) -> list[dict[str, str]]:
    """Pairs whose class says which of the two texts has the longer run of x."""
    rows = []
    for i in range(start, start + count):
        first, second = 1 + i * 5 % 7, 1 + i * 3 % 8
        if first == second:
            second += 1
        rows.append({"text": "x" * first, "text_b": "x" * second, "label": "first" if first > second else "second"})
    return rows

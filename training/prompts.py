"""Turns rows into token ids: prompt, target, and the candidate answer tokens of a classification or multiple-choice row.

A label or a choice is answered with ONE letter that is one token after the prompt, so that the predictive distribution over the
answers is a softmax over a few logits at one position, in training, evaluation and serving alike.
"""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from credence.training.data import DataFile, DataFormat, Row
from credence.training.errors import DataError, ModelError

IGNORED = -100
"""Label of a position that is not trained on (torch's and transformers' convention)."""

LETTER_SETS = (string.ascii_uppercase, string.ascii_uppercase + string.ascii_lowercase + string.digits)


@dataclass(frozen=True, slots=True)
class AnswerToken:
    """An answer letter as it follows the prompt (``" A"`` or ``"A"``) and its one token id."""

    text: str
    token: int


@dataclass(frozen=True, slots=True)
class LabelSpace:
    """The labels of a classification adapter, each with its answer token, and the prompt template.

    The order is the sorted order of the training file's labels; it is stored in the artifact and never derived again.
    """

    labels: tuple[str, ...]
    answers: tuple[AnswerToken, ...]
    template: str

    def record(self) -> dict[str, Any]:
        """What the artifact stores (``PosteriorConfig.training``)."""
        return {
            "labels": list(self.labels),
            "label_tokens": [answer.token for answer in self.answers],
            "label_texts": [answer.text for answer in self.answers],
            "template": self.template,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "LabelSpace":
        """Reads back :meth:`record`.

        Raises:
            ModelError: the artifact does not hold one.
        """
        try:
            pairs = zip(record["label_texts"], record["label_tokens"], strict=True)
            answers = tuple(AnswerToken(str(text), int(token)) for text, token in pairs)
            space = cls(tuple(record["labels"]), answers, str(record["template"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"the adapter's training record has no usable labels, label_tokens, label_texts and template ({error!r}): "
                "it was not trained on {text, label} data by credence"
            ) from None
        if len(space.labels) != len(answers):
            raise ModelError(
                f"the adapter's training record has {len(space.labels)} labels and {len(answers)} answer tokens"
            )
        return space


@dataclass(frozen=True, slots=True)
class Example:
    """One encoded row.

    Attributes:
        prompt: token ids of the prompt, never empty.
        target: token ids to learn or to score after it; empty for an unlabelled row.
        candidates: token ids of the allowed answers (label and choice rows), else empty.
        answer: index into ``candidates`` of the right answer; None for free text and unlabelled rows.
        line: line in the data file.
    """

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    candidates: tuple[int, ...]
    answer: int | None
    line: int


def answer_tokens(tokenizer: Any, prompt: str, count: int) -> tuple[AnswerToken, ...]:
    """Finds ``count`` letters that are one distinct token each when they follow ``prompt``.

    Preferred are " A", " B", ... (how such answers occur in text), then "A", "B", ... without the space, then any letters and digits.

    Raises:
        ModelError: the tokenizer has fewer such letters.
    """
    context = _ids(tokenizer, prompt)
    best = 0
    for letters in LETTER_SETS:
        wanted = letters[:count] if letters is LETTER_SETS[0] else letters
        for space in (" ", ""):
            found: dict[int, AnswerToken] = {}
            for letter in wanted:
                ids = _ids(tokenizer, prompt + space + letter)
                if ids[:-1] == context and ids[-1] != tokenizer.unk_token_id:
                    found.setdefault(ids[-1], AnswerToken(space + letter, ids[-1]))
            best = max(best, len(found))
            if len(found) >= count:
                return tuple(found.values())[:count]
    raise ModelError(
        f"{count} answers are needed and this tokenizer has {best} letters that are one token after the prompt; "
        "use a tokenizer with a larger vocabulary, fewer labels, or {prompt, completion} rows"
    )


def label_space(tokenizer: Any, labels: Sequence[str], template: str) -> LabelSpace:
    """Assigns an answer token to each label, in the order given."""
    return LabelSpace(tuple(labels), answer_tokens(tokenizer, template.replace("{text}", "x"), len(labels)), template)


def choice_prompt(question: str, choices: Sequence[str]) -> str:
    """The IVON paper's multiple-choice prompt; every letter gets its full stop (the paper's text drops one after B)."""
    listed = " ".join(
        f"{letter}. {choice.strip().removesuffix('.')}."
        for letter, choice in zip(string.ascii_uppercase, choices, strict=False)
    )
    return (
        f"Select one of the choices that answers the following question: {question.strip()} Choices: {listed} Answer:"
    )


class Encoder:
    """Encodes the rows of one data format for one tokenizer.

    Args:
        space: labels and answer tokens, needed for ``DataFormat.LABEL``.
        max_length: longest prompt + target in tokens.
    """

    def __init__(self, tokenizer: Any, data_format: DataFormat, *, space: LabelSpace | None, max_length: int) -> None:
        if data_format is DataFormat.LABEL and space is None:
            raise ModelError("label rows need a label space")
        if data_format is DataFormat.MESSAGES and not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                "the data are {messages} rows and the base model's tokenizer has no chat template; "
                "use an instruction-tuned base model or {prompt, completion} rows"
            )
        self.tokenizer = tokenizer
        self.format = data_format
        self.space = space
        self.max_length = max_length
        self._letters: dict[int, tuple[AnswerToken, ...]] = {}

    def encode(self, data: DataFile, *, answers: bool = True, rows: Sequence[Row] | None = None) -> list[Example]:
        """Encodes ``rows`` (all of ``data`` by default).

        Args:
            answers: whether the rows' answers count; False for out-of-distribution rows, whose labels are unknown to the adapter.

        Raises:
            DataError: a row has a label the adapter does not know, or is longer than ``max_length``.
        """
        examples = []
        for row in data.rows if rows is None else rows:
            example = self._encode(data, row, answers)
            length = len(example.prompt) + len(example.target)
            if length > self.max_length:
                raise DataError(
                    f"has {length} tokens, {self.max_length} are allowed; raise train.max_length (up to the model's context) "
                    "or shorten the row",
                    file=data.path,
                    line=row.line,
                )
            examples.append(example)
        return examples

    def prompts(self, data: DataFile) -> list[tuple[int, ...]]:
        """The prompts of free-text rows, for texts that are to be generated: the references do not count, however long they are.

        Raises:
            DataError: a prompt leaves no room for a token in ``max_length``.
        """
        prompts = []
        for row in data.rows:
            prompt = self._prompt_ids(data, row)
            if len(prompt) >= self.max_length:
                raise DataError(
                    f"has a prompt of {len(prompt)} tokens; the model reads {self.max_length}, so no text can follow: shorten the row",
                    file=data.path,
                    line=row.line,
                )
            prompts.append(tuple(prompt))
        return prompts

    def answer_texts(self, example: Example) -> list[str]:
        """What a server of the artifact calls the candidates of a label or choice row: its labels, or the letters after the prompt."""
        if self.space is not None:
            return list(self.space.labels)
        return [letter.text for letter in self._choice_letters(len(example.candidates))]

    def _encode(self, data: DataFile, row: Row, answers: bool) -> Example:
        fields = row.fields
        if self.format is DataFormat.LABEL:
            assert self.space is not None
            label = fields["label"]
            if answers and label not in self.space.labels:
                raise DataError(
                    f"has the label {label!r}; the adapter knows {', '.join(self.space.labels)}",
                    file=data.path,
                    line=row.line,
                )
            prompt = self.space.template.replace("{text}", fields["text"])
            letters, index = self.space.answers, self.space.labels.index(label) if answers else None
        elif self.format is DataFormat.CHOICES:
            prompt = choice_prompt(fields["prompt"], fields["choices"])
            letters, index = self._choice_letters(len(fields["choices"])), fields["answer"] if answers else None
        else:
            return self._encode_free(data, row)
        target = () if index is None else (letters[index].token,)
        return Example(tuple(_ids(self.tokenizer, prompt)), target, tuple(a.token for a in letters), index, row.line)

    def _choice_letters(self, count: int) -> tuple[AnswerToken, ...]:
        if count not in self._letters:
            self._letters[count] = answer_tokens(self.tokenizer, "Answer:", count)
        return self._letters[count]

    def _prompt_ids(self, data: DataFile, row: Row) -> list[int]:
        if self.format is DataFormat.COMPLETION:
            prompt = _ids(self.tokenizer, row.fields["prompt"])
        else:
            messages, apply = row.fields["messages"][:-1], self.tokenizer.apply_chat_template
            prompt = list(apply(messages, add_generation_prompt=True, tokenize=True, return_dict=False))
        if not prompt:
            raise DataError("the prompt has no token", file=data.path, line=row.line)
        return prompt

    def _encode_free(self, data: DataFile, row: Row) -> Example:
        prompt = self._prompt_ids(data, row)
        if self.format is DataFormat.COMPLETION:
            target = list(self.tokenizer(row.fields["completion"], add_special_tokens=False)["input_ids"])
            if self.tokenizer.eos_token_id is not None:
                target.append(self.tokenizer.eos_token_id)
        else:
            whole = list(self.tokenizer.apply_chat_template(row.fields["messages"], tokenize=True, return_dict=False))
            if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
                raise DataError(
                    "the tokenizer's chat template renders the conversation without its last message differently, so the "
                    "assistant's part cannot be told apart; use {prompt, completion} rows",
                    file=data.path,
                    line=row.line,
                )
            target = whole[len(prompt) :]
        return Example(tuple(prompt), tuple(target), (), None, row.line)


def collate(examples: Sequence[Example], pad_token: int) -> dict[str, Tensor]:
    """Pads prompt + target on the right: ``input_ids``, ``attention_mask`` and ``labels``, each [B, T] int64."""
    length = max(len(example.prompt) + len(example.target) for example in examples)
    shape = (len(examples), length)
    input_ids = torch.full(shape, pad_token, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for index, example in enumerate(examples):
        prompt, end = len(example.prompt), len(example.prompt) + len(example.target)
        input_ids[index, :end] = torch.tensor(example.prompt + example.target)
        attention_mask[index, :end] = 1
        labels[index, prompt:end] = torch.tensor(example.target, dtype=torch.int64)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])

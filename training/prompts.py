"""Turns rows into token ids: prompt, target, and the candidate answer tokens of a classification or multiple-choice row.

A label or a choice is answered with ONE letter that is one token after the prompt, so that the predictive distribution over the
answers is a softmax over a few logits at one position, in training, evaluation and serving alike. An encoder answers by its classification
head: its candidates are the head's classes, and it reads the texts without a prompt.
"""

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from credence.training.data import PAIR, DataFile, DataFormat, Row
from credence.training.errors import DataError, ModelError

IGNORED = -100
"""Label of a position that is not trained on (torch's and transformers' convention)."""

TEXT, PAIRED = "{text}", "{text}{text_b}"
"""What an encoder reads, in the form of a template: one text, or a pair that its tokenizer joins."""

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

    Attributes:
        by_head: an encoder's classification head answers; the "tokens" are then the head's classes, and the template is ``{text}``, or
            ``{text}{text_b}`` for pairs.
    """

    labels: tuple[str, ...]
    answers: tuple[AnswerToken, ...]
    template: str
    by_head: bool = False

    @property
    def has_pairs(self) -> bool:
        """Whether its rows hold two texts."""
        return f"{{{PAIR}}}" in self.template

    def record(self) -> dict[str, Any]:
        """What the artifact stores (``PosteriorConfig.training``)."""
        return {
            "labels": list(self.labels),
            "label_tokens": [answer.token for answer in self.answers],
            "label_texts": [answer.text for answer in self.answers],
            "template": self.template,
            **({"by_head": True} if self.by_head else {}),
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
            by_head = bool(record.get("by_head", False))
            space = cls(tuple(record["labels"]), answers, str(record["template"]), by_head)
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
        by_head: a classification head answers: target and candidates are classes, and the model reads the prompt alone.
        token_types: of a pair of texts that an encoder reads, the text that each token belongs to; empty where there is one text.
    """

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    candidates: tuple[int, ...]
    answer: int | None
    line: int
    by_head: bool = False
    token_types: tuple[int, ...] = ()

    @property
    def tokens(self) -> tuple[int, ...]:
        """What the model reads."""
        return self.prompt if self.by_head else self.prompt + self.target

    @property
    def position(self) -> int:
        """Where the first target is predicted: at the last token of the prompt. A head has one prediction, which stands at the first."""
        return 0 if self.by_head else len(self.prompt) - 1


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
    return LabelSpace(
        tuple(labels), answer_tokens(tokenizer, fill(template, {"text": "x", PAIR: "x"}), len(labels)), template
    )


def class_space(labels: Sequence[str], *, has_pairs: bool) -> LabelSpace:
    """Makes each label the class of an encoder's head with its number in the order given."""
    answers = tuple(AnswerToken(label, index) for index, label in enumerate(labels))
    return LabelSpace(tuple(labels), answers, PAIRED if has_pairs else TEXT, by_head=True)


def fill(template: str, fields: Mapping[str, str]) -> str:
    """Puts the texts in the places of ``{text}`` and ``{text_b}``; what stands in a text is never taken for a place."""
    return re.sub(r"\{(text|text_b)\}", lambda place: fields[place[1]], template)


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
            length = len(example.tokens)
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
            if self.space.has_pairs != (PAIR in fields):
                raise DataError(_pair_complaint(self.space), file=data.path, line=row.line)
            index = self.space.labels.index(label) if answers else None
            if self.space.by_head:
                return self._encode_texts(row, index)
            prompt, letters = fill(self.space.template, fields), self.space.answers
        elif self.format is DataFormat.CHOICES:
            prompt = choice_prompt(fields["prompt"], fields["choices"])
            letters, index = self._choice_letters(len(fields["choices"])), fields["answer"] if answers else None
        else:
            return self._encode_free(data, row)
        target = () if index is None else (letters[index].token,)
        return Example(tuple(_ids(self.tokenizer, prompt)), target, tuple(a.token for a in letters), index, row.line)

    def _encode_texts(self, row: Row, index: int | None) -> Example:
        """A row for a classification head."""
        assert self.space is not None
        encoded = self.tokenizer(row.fields["text"], row.fields.get(PAIR), return_token_type_ids=self.space.has_pairs)
        return Example(
            prompt=tuple(encoded["input_ids"]),
            target=() if index is None else (index,),
            candidates=tuple(answer.token for answer in self.space.answers),
            answer=index,
            line=row.line,
            by_head=True,
            token_types=tuple(encoded["token_type_ids"]) if self.space.has_pairs else (),
        )

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
    """Pads prompt + target on the right: ``input_ids``, ``attention_mask`` and ``labels``, each [B, T] int64.

    Label t belongs to the prediction at t - 1. Rows for a classification head are padded without their target, to at least 2 columns;
    with ``token_type_ids`` where they have types.
    """
    length = max(max(len(example.tokens), example.position + 1 + len(example.target)) for example in examples)
    shape = (len(examples), length)
    input_ids = torch.full(shape, pad_token, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for index, example in enumerate(examples):
        tokens, first = example.tokens, example.position + 1
        input_ids[index, : len(tokens)] = torch.tensor(tokens)
        attention_mask[index, : len(tokens)] = 1
        labels[index, first : first + len(example.target)] = torch.tensor(example.target, dtype=torch.int64)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    if any(example.token_types for example in examples):
        types = batch["token_type_ids"] = torch.zeros(shape, dtype=torch.int64)
        for index, example in enumerate(examples):
            types[index, : len(example.token_types)] = torch.tensor(example.token_types, dtype=torch.int64)
    return batch


def _pair_complaint(space: LabelSpace) -> str:
    if space.has_pairs:
        return f'has no "{PAIR}"; the adapter classifies pairs of texts'
    if space.by_head:
        return f'has a "{PAIR}"; the adapter classifies single texts'
    return (
        f'has a "{PAIR}" and the template {space.template!r} has no place for it; put {{{PAIR}}} beside {{text}} in data.template, or join '
        "the texts in the data"
    )


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])

"""Encoding: answer letters, prompts, targets and padding."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from credence.training.data import DataFormat, read_data
from credence.training.errors import DataError, ModelError
from credence.training.modeling import load_tokenizer
from credence.training.prompts import (
    IGNORED,
    Encoder,
    LabelSpace,
    answer_tokens,
    choice_prompt,
    collate,
    label_space,
)
from tests.training.conftest import CHAT_TEMPLATE, byte_tokenizer

Write = Callable[..., Path]
TEMPLATE = "Text: {text}\nLabel:"


def test_answer_letters_are_one_token_after_the_prompt(base: Path) -> None:
    tokenizer = load_tokenizer(base)
    answers = answer_tokens(tokenizer, "Label:", 26)
    assert [a.text for a in answers[:3]] == ["A", "B", "C"]  # " A" is two byte tokens
    for answer in answers:
        assert tokenizer("Label:" + answer.text)["input_ids"] == [*tokenizer("Label:")["input_ids"], answer.token]
    many = answer_tokens(tokenizer, "Label:", 60)
    assert len({a.token for a in many}) == 60
    with pytest.raises(ModelError, match="63 answers are needed and this tokenizer has 62 letters"):
        answer_tokens(tokenizer, "Label:", 63)


def test_letters_with_a_space_are_preferred_where_they_are_one_token() -> None:
    class SpaceTokenizer:
        """One token per word with its leading space."""

        unk_token_id = 0

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [1 + hash(word) % 10**9 for word in text.replace(":", ": ").split(" ") if word]}

    answers = answer_tokens(SpaceTokenizer(), "Label:", 3)
    assert [a.text for a in answers] == [" A", " B", " C"]


def test_label_rows(base: Path, write: Write) -> None:
    tokenizer = load_tokenizer(base)
    data = read_data(write("d.jsonl", [{"text": "hi {text}", "label": "y"}, {"text": "b", "label": "x"}]))
    space = label_space(tokenizer, data.labels, TEMPLATE)
    assert LabelSpace.from_record(space.record()) == space
    examples = Encoder(tokenizer, data.format, space=space, max_length=96).encode(data)
    assert tokenizer.decode(examples[0].prompt) == "Text: hi {text}\nLabel:"
    assert examples[0].answer == 1 and examples[1].answer == 0
    assert examples[0].target == (examples[0].candidates[1],)
    assert tokenizer.decode(examples[0].target) == "B"


def test_unknown_labels_and_unlabelled_rows(base: Path, write: Write) -> None:
    tokenizer = load_tokenizer(base)
    space = label_space(tokenizer, ("x", "y"), TEMPLATE)
    data = read_data(write("d.jsonl", [{"text": "a", "label": "x"}, {"text": "a", "label": "oos"}]))
    encoder = Encoder(tokenizer, data.format, space=space, max_length=96)
    with pytest.raises(DataError, match=r"d\.jsonl:2: has the label 'oos'; the adapter knows x, y"):
        encoder.encode(data)
    example = encoder.encode(data, answers=False)[1]
    assert example.answer is None and example.target == () and len(example.candidates) == 2


def test_long_rows_are_refused(base: Path, write: Write) -> None:
    tokenizer = load_tokenizer(base)
    data = read_data(write("d.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a" * 9, "completion": "bb"}]))
    with pytest.raises(DataError, match=r"d\.jsonl:2: has 12 tokens, 11 are allowed"):
        Encoder(tokenizer, data.format, space=None, max_length=11).encode(data)


def test_choice_rows(base: Path, write: Write) -> None:
    prompt = choice_prompt(" What burns? ", ["wood.", "water", "air"])
    assert prompt == (
        "Select one of the choices that answers the following question: What burns? Choices: A. wood. B. water. C. air. Answer:"
    )
    tokenizer = load_tokenizer(base)
    rows = [
        {"prompt": "q", "choices": ["w", "x", "y"], "answer": 2},
        {"prompt": "q", "choices": ["w", "x"], "answer": 0},
    ]
    data = read_data(write("d.jsonl", rows))
    examples = Encoder(tokenizer, data.format, space=None, max_length=500).encode(data)
    assert [len(e.candidates) for e in examples] == [3, 2]
    assert tokenizer.decode(examples[0].target) == "C"


def test_completion_rows_end_with_the_end_token(base: Path, write: Write) -> None:
    tokenizer = load_tokenizer(base)
    data = read_data(write("d.jsonl", [{"prompt": "ab", "completion": " c"}]))
    (example,) = Encoder(tokenizer, data.format, space=None, max_length=96).encode(data)
    assert tokenizer.decode(example.prompt) == "ab"
    assert example.target[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(example.target[:-1]) == " c"
    assert example.candidates == () and example.answer is None


def test_message_rows_learn_the_last_message(write: Write) -> None:
    tokenizer = byte_tokenizer(CHAT_TEMPLATE)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    data = read_data(write("d.jsonl", [{"messages": messages}]))
    (example,) = Encoder(tokenizer, data.format, space=None, max_length=96).encode(data)
    assert tokenizer.decode(example.prompt) == "<user>hi</s><assistant>"
    assert tokenizer.decode(example.target) == "yo</s>"


def test_message_rows_need_a_chat_template() -> None:
    with pytest.raises(ModelError, match="no chat template"):
        Encoder(byte_tokenizer(), DataFormat.MESSAGES, space=None, max_length=96)


def test_a_template_that_rewrites_history_is_refused(write: Write) -> None:
    template = "{{ messages|length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    data = read_data(write("d.jsonl", [{"messages": messages}]))
    with pytest.raises(DataError, match=r"d\.jsonl:1: .*cannot be told apart"):
        Encoder(byte_tokenizer(template), data.format, space=None, max_length=96).encode(data)


def test_collate_pads_on_the_right(base: Path, write: Write) -> None:
    tokenizer = load_tokenizer(base)
    data = read_data(write("d.jsonl", [{"prompt": "ab", "completion": "c"}, {"prompt": "a", "completion": "b"}]))
    batch = collate(Encoder(tokenizer, data.format, space=None, max_length=96).encode(data), pad_token=0)
    assert batch["input_ids"].shape == (2, 4)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["labels"][1].tolist() == [IGNORED, batch["input_ids"][1, 1], 1, IGNORED]
    assert batch["input_ids"].dtype == torch.int64


@pytest.mark.parametrize("record", [{}, {"labels": ["a"], "label_tokens": [1], "label_texts": [], "template": "t"}])
def test_damaged_label_records(record: dict[str, object]) -> None:
    with pytest.raises(ModelError, match="training record"):
        LabelSpace.from_record(record)

"""Multiple choice: WinoGrande, ARC, OpenBookQA, BoolQ and two groups of MMLU, as {"prompt", "choices", "answer"} rows.

Every row passes through the IVON paper's multiple-choice prompt (``prompts.choice_prompt``) and is answered with a letter.
"""

from functools import partial

from credence.training.data import DataFormat
from credence.training.tasks.base import BadRecord, Fields, Record, Task, one_of, text

CHEMISTRY = ("college_chemistry", "high_school_chemistry")
PHYSICS = ("college_physics", "conceptual_physics", "high_school_physics")


def winogrande(record: Record) -> Fields:
    """{"sentence", "option1", "option2", "answer": "1" or "2"}; the sentence keeps its blank "_"."""
    answer = one_of(record, "answer", {"1": 0, "2": 1})
    return {
        "prompt": text(record, "sentence"),
        "choices": [text(record, "option1"), text(record, "option2")],
        "answer": answer,
    }


def labelled_choices(record: Record, question: str) -> Fields:
    """{question, "choices": {"text", "label"}, "answerKey"}; the key is one of the labels, letters or numbers."""
    choices = record["choices"]
    if not isinstance(choices, dict) or not all(isinstance(choices.get(name), list) for name in ("text", "label")):
        raise BadRecord(f'"choices" is {choices!r}; an object with the lists "text" and "label" is needed')
    texts, labels, key = choices["text"], choices["label"], record["answerKey"]
    if len(texts) != len(labels):
        raise BadRecord(f'"choices" has {len(texts)} texts and {len(labels)} labels; as many are needed')
    if labels.count(key) != 1:
        raise BadRecord(f'"answerKey" is {key!r}; one of the labels {labels} is needed')
    return {"prompt": text(record, question), "choices": texts, "answer": labels.index(key)}


def boolq(record: Record) -> Fields:
    """{"question", "passage", "answer": true or false}."""
    answer = one_of(record, "answer", {True: 0, False: 1})
    question = text(record, "question").strip().removesuffix("?")
    return {
        "prompt": f"{question}? Context: {text(record, 'passage').strip()}",
        "choices": ["True", "False"],
        "answer": answer,
    }


def mmlu(record: Record) -> Fields:
    """{"question", "choices", "answer": index, "subject"}."""
    choices = record["choices"]
    if not isinstance(choices, list) or len(choices) != 4:
        raise BadRecord(f'"choices" is {choices!r}; a list of four texts is needed')
    answer = one_of(record, "answer", {index: index for index in range(4)})
    return {"prompt": text(record, "question"), "choices": choices, "answer": answer}


def _winogrande(size: str) -> Task:
    return Task(
        name=f"winogrande_{size.lower()}",
        title=f"WinoGrande-{size}",
        source=f"allenai/winogrande, winogrande_{size.lower()}",
        format=DataFormat.CHOICES,
        fields=("sentence", "option1", "option2", "answer"),
        convert=winogrande,
        test="validation",
        splits_note="the labels of the original test split are hidden",
        prompt_note="the sentence with its blank _ is the question",
        license="CC BY",
        citation="Sakaguchi et al., WinoGrande: An Adversarial Winograd Schema Challenge at Scale, AAAI 2020",
    )


def _arc(name: str, config: str) -> Task:
    return Task(
        name=name,
        title=config,
        source=f"allenai/ai2_arc, {config}",
        format=DataFormat.CHOICES,
        fields=("question", "choices", "answerKey"),
        convert=partial(labelled_choices, question="question"),
        validation="validation",
        test="test",
        license="CC BY-SA 4.0",
        citation="Clark et al., Think you have Solved Question Answering? Try ARC, the AI2 Reasoning Challenge, arXiv:1803.05457",
    )


def _mmlu(name: str, subjects: tuple[str, ...]) -> Task:
    return Task(
        name=f"mmlu_{name}",
        title=f"MMLU {name}",
        source="cais/mmlu, all",
        format=DataFormat.CHOICES,
        fields=("question", "choices", "answer", "subject"),
        convert=mmlu,
        train=None,
        test="test",
        keep=lambda record: record["subject"] in subjects,
        splits_note=f"only the subjects {', '.join(subjects)}; which subjects the papers' groups hold was not at hand",
        license="MIT",
        citation="Hendrycks et al., Measuring Massive Multitask Language Understanding, ICLR 2021",
    )


TASKS = (
    _winogrande("S"),
    _winogrande("M"),
    _arc("arc_challenge", "ARC-Challenge"),
    _arc("arc_easy", "ARC-Easy"),
    Task(
        name="openbookqa",
        title="OpenBookQA",
        source="allenai/openbookqa, main",
        format=DataFormat.CHOICES,
        fields=("question_stem", "choices", "answerKey"),
        convert=partial(labelled_choices, question="question_stem"),
        validation="validation",
        test="test",
        license="Apache-2.0 (the authors' repository; the hub says unknown)",
        citation="Mihaylov et al., Can a Suit of Armor Conduct Electricity?, EMNLP 2018",
    ),
    Task(
        name="boolq",
        title="BoolQ",
        source="google/boolq",
        format=DataFormat.CHOICES,
        fields=("question", "passage", "answer"),
        convert=boolq,
        test="validation",
        splits_note="there is no labelled test split",
        prompt_note="question and passage are the question, True and False the choices; answered with a letter, where the usual prompt "
        "asks for the word",
        license="CC BY-SA 3.0",
        citation="Clark et al., BoolQ: Exploring the Surprising Difficulty of Natural Yes/No Questions, NAACL 2019",
    ),
    _mmlu("chemistry", CHEMISTRY),
    _mmlu("physics", PHYSICS),
)

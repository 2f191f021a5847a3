"""GLUE and SuperGLUE tasks of the MonteCLoRA paper, as {"text", "text_b", "label"} rows for encoders (CoLA has no second text)."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from credence.training.data import DataFormat
from credence.training.tasks.base import Fields, Record, Task, one_of, text

GLUE = "Wang et al., GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding, ICLR 2019"
SUPERGLUE = (
    "Wang et al., SuperGLUE: A Stickier Benchmark for General-Purpose Language Understanding Systems, NeurIPS 2019"
)


def sentence(record: Record, names: tuple[str, ...], labels: Mapping[Any, str], label: str = "label") -> Fields:
    """One or two texts and a label, whose number becomes its name."""
    texts = dict(zip(("text", "text_b"), (text(record, name) for name in names), strict=False))
    return {**texts, "label": one_of(record, label, labels)}


def wic(record: Record) -> Fields:
    """{"word", "sentence1", "sentence2", "label"}; the word stands before the first sentence."""
    return {
        "text": f"{text(record, 'word')}: {text(record, 'sentence1')}",
        "text_b": text(record, "sentence2"),
        "label": one_of(record, "label", {0: "False", 1: "True"}),
    }


def _glue(
    name: str, title: str, names: tuple[str, ...], labels: Mapping[int, str], license: str, citation: str
) -> Task:
    return Task(
        name=name,
        title=title,
        source=f"nyu-mll/glue, {name}",
        format=DataFormat.LABEL,
        fields=(*names, "label"),
        convert=partial(sentence, names=names, labels=labels),
        test="validation",
        splits_note="as usual with GLUE, whose test labels are mostly hidden",
        license=license,
        citation=f"{citation}; {GLUE}",
    )


TASKS = (
    _glue(
        "mrpc",
        "MRPC",
        ("sentence1", "sentence2"),
        {0: "not_equivalent", 1: "equivalent"},
        "Microsoft's terms for the corpus (the hub says other)",
        "Dolan and Brockett, Automatically Constructing a Corpus of Sentential Paraphrases, IWP 2005",
    ),
    _glue(
        "cola",
        "CoLA",
        ("sentence",),
        {0: "unacceptable", 1: "acceptable"},
        "not stated (the hub says other)",
        "Warstadt et al., Neural Network Acceptability Judgments, TACL 2019",
    ),
    _glue(
        "rte",
        "RTE",
        ("sentence1", "sentence2"),
        {0: "entailment", 1: "not_entailment"},
        "not stated (the hub says other)",
        "Dagan et al., The PASCAL Recognising Textual Entailment Challenge, 2005, and its sequels",
    ),
    Task(
        name="wic",
        title="WiC",
        source="aps/super_glue, wic",
        format=DataFormat.LABEL,
        fields=("word", "sentence1", "sentence2", "label"),
        convert=wic,
        test="validation",
        splits_note="the labels of the original test split are hidden",
        prompt_note="the word and a colon stand before the first sentence",
        license="CC BY-NC 4.0",
        citation=f"Pilehvar and Camacho-Collados, WiC: the Word-in-Context Dataset, NAACL 2019; {SUPERGLUE}",
    ),
    Task(
        name="boolq_pairs",
        title="BoolQ (question and passage)",
        source="google/boolq",
        format=DataFormat.LABEL,
        fields=("question", "passage", "answer"),
        convert=partial(sentence, names=("question", "passage"), labels={True: "True", False: "False"}, label="answer"),
        test="validation",
        splits_note="there is no labelled test split",
        license="CC BY-SA 3.0",
        citation="Clark et al., BoolQ: Exploring the Surprising Difficulty of Natural Yes/No Questions, NAACL 2019",
    ),
)

"""Verifiers: is a generated text right, given its row?

    exact   the reference's words: case and whitespace do not count
    squad   nor do punctuation and the articles a, an, the
    number  the same number: the first one after "####", else the last of the text
    python  the program passes the row's test

The reference is the row's "answer", else its completion (of a conversation, the last message).
"""

import re
import string
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from credence.training.errors import MetricError
from credence.training.sandbox import missing_protections, run_program

Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verifier:
    """A rule by which a text is right or wrong.

    Attributes:
        answer: what counts of a text; texts of equal answers are one answer. None where it has none.
        is_right: whether the text is right, given the row's fields.
        complaint: what a row lacks, as the end of a sentence that begins with the row; None if nothing.
        needs_end: whether a text that a limit cut is wrong.
        runs_code: whether it runs the text as a program.
    """

    name: str
    answer: Callable[[str], Hashable | None]
    is_right: Callable[[str, Fields], bool]
    complaint: Callable[[Fields], str | None]
    needs_end: bool = False
    runs_code: bool = False


def verifier(name: str, *, allow_code_execution: bool = False) -> Verifier:
    """The verifier of a name.

    Raises:
        MetricError: there is none, it runs programs and that was not allowed, or programs do not run on this machine.
    """
    found = VERIFIERS.get(name)
    if found is None:
        raise MetricError(f"{name!r} is no verifier; there are {', '.join(VERIFIERS)}")
    if found.runs_code:
        if not allow_code_execution:
            raise MetricError(
                f"{name!r} runs generated programs on this machine; allow it with --allow-code-execution (docs/evaluation.md says how "
                "they are confined)"
            )
        if not run_program("import math, re, typing, collections, itertools"):
            raise MetricError(
                f"{name!r} cannot run programs here: one that only imports from the standard library failed"
            )
    return found


def warning(chosen: Verifier) -> str | None:
    """What a program could do here that it should not; None for nothing."""
    missing = missing_protections() if chosen.runs_code else ()
    return f"this system cannot confine generated programs: they can {' and '.join(missing)}" if missing else None


def reference(fields: Fields) -> str:
    """What the row says is right."""
    if "answer" in fields:
        return str(fields["answer"])
    return str(fields["completion"] if "completion" in fields else fields["messages"][-1]["content"])


def normalise_text(text: str) -> str:
    """The text without case, outer whitespace and differences of inner whitespace."""
    return " ".join(text.split()).casefold()


def squad_text(text: str) -> str:
    """SQuAD's normal form (Rajpurkar et al., EMNLP 2016): also without ASCII punctuation and the articles a, an, the."""
    words = text.lower().translate(str.maketrans("", "", string.punctuation)).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


NUMBER = re.compile(
    r"(?:(?<![\w)])(?P<minus>-)[$€£]?|[$€£](?P<inner>-))?(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d*\.\d+|\d+)"
)


def number(text: str) -> Decimal | None:
    """The first number after "####" on its line, else the last number of the text; None without one.

    Commas between groups of three digits and currency signs do not count. A minus is a sign directly before the number and where no
    digit, letter or closing bracket comes before it: "16-3" and "16 - 3" end with 3.
    """
    text = text.replace("\N{MINUS SIGN}", "-")
    marked = re.search(r"####([^\n]*)", text)
    after = _numbers(marked[1]) if marked else []
    if after:
        return after[0]
    found = _numbers(text)
    return found[-1] if found else None


def _numbers(text: str) -> list[Decimal]:
    return [
        Decimal(("-" if match["minus"] or match["inner"] else "") + match["digits"].replace(",", ""))
        for match in NUMBER.finditer(text)
    ]


PROGRAM_ENDS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(")
"""What begins the next piece of code after a function's body (Chen et al., 2021, section 3.2)."""


def function_body(text: str) -> str:
    """The text up to the first line that belongs to no function's body any more."""
    return text[: min((found for end in PROGRAM_ENDS if (found := text.find(end)) >= 0), default=len(text))]


def program(text: str, fields: Fields) -> str:
    """The program that tests a completion, HumanEval's: prompt and body, the test, and its call."""
    return f"{fields['prompt']}{function_body(text)}\n{fields['test']}\ncheck({fields['entry_point']})\n"


def _program_complaint(fields: Fields) -> str | None:
    if not {"prompt", "test", "entry_point"} <= set(fields):
        return 'has no "test" and "entry_point" beside its prompt, which a program is tested by'
    if not str(fields["entry_point"]).isidentifier():
        return f'has the "entry_point" {fields["entry_point"]!r}; the name of a function is needed'
    return None


def _same(answer: Callable[[str], Hashable | None]) -> Callable[[str, Fields], bool]:
    def is_right(text: str, fields: Fields) -> bool:
        found = answer(text)
        return found is not None and found == answer(reference(fields))

    return is_right


VERIFIERS = {
    found.name: found
    for found in (
        Verifier(
            name="exact",
            answer=normalise_text,
            is_right=_same(normalise_text),
            complaint=lambda fields: None,
            needs_end=True,
        ),
        Verifier(
            name="squad", answer=squad_text, is_right=_same(squad_text), complaint=lambda fields: None, needs_end=True
        ),
        Verifier(
            name="number",
            answer=number,
            is_right=_same(number),
            complaint=lambda fields: (
                None
                if number(reference(fields)) is not None
                else f"has no number in its answer {reference(fields)!r:.80}"
            ),
        ),
        Verifier(
            name="python",
            answer=lambda text: function_body(text).strip(),
            is_right=lambda text, fields: run_program(program(text, fields)),
            complaint=_program_complaint,
            runs_code=True,
        ),
    )
}

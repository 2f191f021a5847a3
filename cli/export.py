"""`credence export`: scores in the layouts and under the names that users of lm-polygraph and UQLM know.

A name of theirs is used only where its definition is ours, for one text and its tokens' distributions on the whole vocabulary
(lm-polygraph 0.7, UQLM 0.6; the table is in docs/harnesses.md). lm-polygraph: higher is more uncertain. UQLM: in [0, 1], higher is
more confident. What has no equal there has a name that begins with Credence. Neither package is needed.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from credence.cli.ask import read_file
from credence.cli.output import CommandError, write_json

if TYPE_CHECKING:
    from credence.clients import TokenUncertainty


class Format(StrEnum):
    """Whose layout is written."""

    LM_POLYGRAPH = "lm-polygraph"
    UQLM = "uqlm"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRow:
    """One answer and its scores, in nats; None is not known.

    Attributes:
        target: The right answer.
        num_samples: K; 0 or 1 have no epistemic part.
        setting: K, tau and temperature of a row of `credence eval`, which has each line at several of them.
        per_token: Whether the scores are means over the tokens' distributions on the vocabulary (not those of a label).
        mean_logprob: Length-normalised log-probability of the answer under the average, nats per token.
        tokens: The answer's tokens; empty if they were not reported.
    """

    prompt: str
    answer: str
    target: str
    correct: bool | None
    num_samples: int
    setting: tuple[int, float, float] | None
    confidence: float | None
    total: float | None
    aleatoric: float | None
    epistemic: float | None
    per_token: bool = False
    mean_logprob: float | None = None
    tokens: "tuple[TokenUncertainty, ...]" = ()


Column = Callable[[ScoredRow], Any]


def export(
    file: Annotated[Path, typer.Argument(metavar="RESULT.jsonl", help="Scored rows.", show_default=False)],
    format: Annotated[Format, typer.Option("--format", help="Whose names and layout.", show_default=False)],
    output: Annotated[
        str, typer.Option("--output", metavar="FILE", help="JSON file, or - for standard output.", show_default=False)
    ],
    k: Annotated[int | None, typer.Option("--k", help="Of rows of `credence eval`: those of this K.")] = None,
    tau: Annotated[float | None, typer.Option("--tau", help="Those of this tau.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="Those of this temperature.")] = None,
) -> None:
    """Write scores for the tools of lm-polygraph or UQLM.

    RESULT.jsonl is what `credence eval --rows` or the uncertainty_file of `credence lm-eval` holds, or has one object a line
    with an `uncertainty` object of the server and, where known, prompt, answer, target and correct.

    \b
    Example:
      credence eval out/triage --base BASE --data test.jsonl --k 8 --rows rows.jsonl
      credence export rows.jsonl --k 8 --temperature 1 --format lm-polygraph --output polygraph.json
    """
    rows = _choose(list(read_rows(file)), str(file), {"k": k, "tau": tau, "temperature": temperature})
    document = lm_polygraph(rows) if format is Format.LM_POLYGRAPH else uqlm(rows)
    write_json(output, document)


def lm_polygraph(rows: Sequence[ScoredRow]) -> dict[str, Any]:
    """The five entries of a saved `UEManager`; its (level, name) keys are two levels of names here, its NaN is null."""
    sequence: dict[str, Column] = {
        "MaximumSequenceProbability": lambda row: -sum(t.logprob for t in row.tokens) if row.tokens else None,
        "Perplexity": lambda row: _negative(row.mean_logprob),
        "MeanTokenEntropy": lambda row: row.total if row.per_token else None,
        "PETtu": lambda row: row.total if row.per_token else None,
        "PETdu": lambda row: row.aleatoric if row.per_token else None,
        "PETmi": lambda row: row.epistemic if row.per_token else None,
        "CredenceTotal": lambda row: row.total,
        "CredenceAleatoric": lambda row: row.aleatoric,
        "CredenceEpistemic": lambda row: row.epistemic,
        "CredenceOneMinusConfidence": lambda row: None if row.confidence is None else 1 - row.confidence,
    }
    # The last token is left out, as theirs do, who take it for the end of the text.
    token: dict[str, Column] = {
        "MaximumTokenProbability": lambda row: [-t.logprob for t in row.tokens[:-1]],
        "TokenEntropy": lambda row: [t.total for t in row.tokens[:-1]],
    }
    stats: dict[str, Any] = {
        "input_texts": [row.prompt for row in rows],
        "target_texts": [row.target for row in rows],
        "greedy_texts": [row.answer for row in rows],
    }
    estimations: dict[str, Any] = {"sequence": _columns(sequence, rows)}
    if all(row.tokens for row in rows):
        estimations["token"] = _columns(token, rows)
        stats["greedy_log_likelihoods"] = [[t.logprob for t in row.tokens] for row in rows]
        stats["entropy"] = [[t.total for t in row.tokens] for row in rows]
    accuracy = _columns({"Accuracy": lambda row: None if row.correct is None else float(row.correct)}, rows)
    gen_metrics = {"sequence": accuracy} if accuracy else {}
    return {
        "state": "Initialized",
        "metrics": {},
        "gen_metrics": gen_metrics,
        "estimations": estimations,
        "stats": stats,
    }


def uqlm(rows: Sequence[ScoredRow]) -> dict[str, Any]:
    """The dictionary a `UQResult` is made of; which answers are right, an argument of UQLM's functions, is in the metadata."""
    scorers: dict[str, Column] = {
        "sequence_probability": lambda row: None if row.mean_logprob is None else math.exp(row.mean_logprob),
        "min_probability": lambda row: math.exp(min(t.logprob for t in row.tokens)) if row.tokens else None,
        "credence_confidence": lambda row: row.confidence,
        "credence_epistemic_certainty": _epistemic_certainty,
    }
    data: dict[str, Any] = {"prompts": [row.prompt for row in rows], "responses": [row.answer for row in rows]}
    if all(row.tokens for row in rows):
        data["logprob"] = [[{"token": t.token, "logprob": t.logprob} for t in row.tokens] for row in rows]
    metadata: dict[str, Any] = {"temperature": None}
    if any(row.correct is not None for row in rows):
        metadata["correct_indicators"] = [row.correct for row in rows]
    return {"data": data | _columns(scorers, rows), "metadata": metadata}


def read_rows(file: Path) -> Iterator[ScoredRow]:
    """Reads scored rows.

    Raises:
        CommandError: The file cannot be read, or a line is neither kind of row.
    """
    for number, line in enumerate(read_file(str(file)).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
            yield _answered(document) if document.get("uncertainty") else _evaluated(document)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CommandError(
                f"{file}, line {number} is neither a row of `credence eval --rows` nor an object with the server's `uncertainty` "
                f"({type(error).__name__}: {error})"
            ) from error


def _answered(document: Mapping[str, Any]) -> ScoredRow:
    from credence.clients import Uncertainty

    scores = Uncertainty.model_validate(document["uncertainty"])
    return ScoredRow(
        prompt=str(document.get("prompt") or ""),
        answer=str(document.get("answer") or ""),
        target=str(document.get("target") or ""),
        correct=_correct(document.get("correct")),
        num_samples=scores.n_effective,
        setting=None,
        confidence=scores.confidence,
        total=scores.total,
        aleatoric=scores.aleatoric,
        epistemic=scores.epistemic,
        per_token=scores.unit == "nats/token",
        mean_logprob=scores.sequence.mean_logprob if scores.sequence is not None else None,
        tokens=scores.tokens or (),
    )


def _evaluated(document: Mapping[str, Any]) -> ScoredRow:
    """A row of an evaluation: of label and choice rows the scores are those of the label, of free text those of the right answer."""
    reference = str(document["answer"])

    def number(name: str) -> float | None:
        return None if document[name] is None else float(document[name])

    return ScoredRow(
        prompt=f"{document.get('file', '')}:{document['line']}",
        answer=reference if document["predicted"] is None else str(document["predicted"]),
        target=reference,
        correct=_correct(document["correct"]),
        num_samples=int(document["k"]),
        setting=(int(document["k"]), float(document["tau"]), float(document["temperature"])),
        confidence=number("confidence"),
        total=number("total"),
        aleatoric=number("aleatoric"),
        epistemic=number("epistemic"),
    )


def _correct(value: object) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"correct is {value!r}; it may be true, false or null")
    return value


def _choose(rows: list[ScoredRow], name: str, wanted: Mapping[str, float | None]) -> list[ScoredRow]:
    """Keeps the rows of one K, tau and temperature."""
    asked = list(wanted.values())
    if any(value is not None for value in asked) and any(row.setting is None for row in rows):
        raise CommandError(
            f"{name} has rows without K, tau and temperature; leave out {', '.join(f'--{key}' for key in wanted)}"
        )
    kept = [
        row
        for row in rows
        if row.setting is None
        or all(value is None or math.isclose(value, own) for value, own in zip(asked, row.setting, strict=True))
    ]
    settings = dict.fromkeys(row.setting for row in kept)
    if len(settings) != 1:
        found = dict.fromkeys(row.setting for row in rows if row.setting is not None)
        listed = "; ".join(f"--k {k} --tau {tau:g} --temperature {t:g}" for k, tau, t in found)
        raise CommandError(
            f"{name} holds {listed or 'no rows'}: choose rows of one setting, {len(settings)} are chosen"
        )
    return kept


def _columns(columns: Mapping[str, Column], rows: Sequence[ScoredRow]) -> dict[str, list[Any]]:
    """The columns of which at least one row has a value."""
    filled = {name: [column(row) for row in rows] for name, column in columns.items()}
    return {name: values for name, values in filled.items() if any(value is not None for value in values)}


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


def _epistemic_certainty(row: ScoredRow) -> float | None:
    """1 - MI / ln K: the mutual information lies in [0, ln K]."""
    if row.epistemic is None or row.num_samples < 2:
        return None
    return 1 - row.epistemic / math.log(row.num_samples)

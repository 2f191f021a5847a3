"""The rows of an evaluation, one JSON object each: what ``credence eval --rows`` writes and other tools read."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from credence.training.data import DataFile, DataFormat, Row
from credence.training.evaluate import Entry, Evaluation
from credence.training.predict import Scores
from credence.training.prompts import Example


def row_documents(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    """Yields, for every K, tau and temperature, each test row and then each row from elsewhere.

    Keys: ``file``, ``line``, ``ood``, ``k``, ``tau``, ``temperature``, ``answer`` and ``predicted`` (a label, a choice, or text),
    ``correct`` (null for rows from elsewhere), ``confidence``, ``log_prob`` (of the answer, nats, summed over its tokens), ``total``,
    ``epistemic`` and, at temperature 1, ``aleatoric`` (nats per position). Free text is teacher-forced: ``correct`` says that every token
    is the most likely one, scores are means over the tokens, and ``tokens`` has them one by one.
    """
    for entry in evaluation.entries:
        parts = [(False, evaluation.data, evaluation.examples, entry.scores)]
        if entry.ood is not None and evaluation.ood is not None:
            parts.append((True, evaluation.ood, evaluation.ood_examples, entry.ood))
        for is_ood, data, examples, scores in parts:
            for row, example, positions in zip(data.rows, examples, positions_by_row(scores), strict=True):
                yield {
                    "file": data.path.name,
                    "line": row.line,
                    "ood": is_ood,
                    "k": entry.k,
                    "tau": entry.tau,
                    "temperature": entry.temperature,
                    **_document(evaluation, entry, data, row, example, scores, positions),
                }


def positions_by_row(scores: Scores) -> list[list[int]]:
    """Indices of each row's positions, in their order."""
    rows: list[list[int]] = [[] for _ in range(int(scores.row.max()) + 1)]
    for position, row in enumerate(scores.row.tolist()):
        rows[row].append(position)
    return rows


def answer_names(evaluation: Evaluation, row: Row) -> Sequence[str]:
    """The texts of a row's answers in the order of its candidates; none for free text."""
    if evaluation.data.format is DataFormat.CHOICES:
        choices: Sequence[str] = row.fields["choices"]
        return choices
    return evaluation.encoder.space.labels if evaluation.encoder.space is not None else ()


def reference(data: DataFile, row: Row) -> str:
    """The right answer of a row as text."""
    if data.format is DataFormat.CHOICES:
        return str(row.fields["choices"][row.fields["answer"]])
    if data.format is DataFormat.MESSAGES:
        return str(row.fields["messages"][-1]["content"])
    return str(row.fields["label" if data.format is DataFormat.LABEL else "completion"])


def _document(
    evaluation: Evaluation,
    entry: Entry,
    data: DataFile,
    row: Row,
    example: Example,
    scores: Scores,
    positions: Sequence[int],
) -> dict[str, Any]:
    names = answer_names(evaluation, row)
    is_labelled = not math.isnan(float(scores.log_prob[positions[0]]))
    total, epistemic = (float(getattr(scores, name)[positions].mean()) for name in ("total", "epistemic"))
    document: dict[str, Any] = {
        "answer": reference(data, row),
        "predicted": names[int(scores.choice[positions[0]])] if names else None,
        "correct": bool(scores.correct[positions].all()) if is_labelled else None,
        "confidence": float(scores.confidence[positions].mean()),
        "log_prob": float(scores.log_prob[positions].sum()) if is_labelled else None,
        "total": total,
        "aleatoric": total - epistemic if entry.temperature == 1 else None,
        "epistemic": epistemic,
    }
    if not names:
        decode = evaluation.encoder.tokenizer.decode
        document["tokens"] = [
            {
                "token": decode([token]),
                "log_prob": float(scores.log_prob[position]),
                "total": float(scores.total[position]),
                "epistemic": float(scores.epistemic[position]),
            }
            for token, position in zip(example.target, positions, strict=True)
        ]
    return document

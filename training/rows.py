"""The rows of an evaluation, one JSON object each: what ``credence eval --rows`` writes and other tools read."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from credence.training.data import DataFile, DataFormat, Row
from credence.training.evaluate import Entry, Evaluation
from credence.training.predict import Scores
from credence.training.prompts import Example


def row_documents(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    """Yields, for every K, tau and temperature, each test row and then each row from elsewhere.

    Keys: ``file``, ``line``, ``ood``, ``k``, ``tau``, ``temperature``, ``answer`` and ``predicted`` (a label, a choice, or text),
    ``correct`` (null for rows from elsewhere), ``confidence``, ``log_prob`` (of the answer, nats, summed over its tokens), ``total``,
    ``epistemic`` and, at temperature 1, ``aleatoric`` (nats per position). Label and choice rows have ``top``, their most likely answers
    with probabilities. Free text is teacher-forced: ``correct`` says that every token is the most likely one, scores are means over the
    tokens, and ``tokens`` has them one by one.
    """
    for entry in evaluation.entries:
        yield from entry_documents(evaluation, entry)


def entry_documents(evaluation: Evaluation, entry: Entry) -> Iterator[dict[str, Any]]:
    """The rows of one K, tau and temperature; see :func:`row_documents`."""
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


def question(data: DataFile, row: Row) -> str:
    """What the adapter is asked in a row, as text."""
    if data.format is DataFormat.MESSAGES:
        return "\n".join(f"{message['role']}: {message['content']}" for message in row.fields["messages"][:-1])
    return str(row.fields["text" if data.format is DataFormat.LABEL else "prompt"])


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
    if names:
        top = zip(scores.top[positions[0]].tolist(), scores.top_probs[positions[0]].tolist(), strict=True)
        document["top"] = [{"answer": names[index], "prob": prob} for index, prob in top if prob > 0]
    else:
        decode = evaluation.encoder.tokenizer.decode
        document["tokens"] = [
            {
                "token": text,
                "predicted": decode([int(scores.choice[position])]),
                "correct": bool(scores.correct[position]),
                "confidence": float(scores.confidence[position]),
                "log_prob": float(scores.log_prob[position]),
                "total": float(scores.total[position]),
                "epistemic": float(scores.epistemic[position]),
            }
            for text, position in zip(_token_texts(decode, example.target), positions, strict=True)
        ]
    return document


def _token_texts(decode: Callable[[list[int]], str], tokens: Sequence[int]) -> Iterator[str]:
    """The text that each token adds after the one before it: alone, SentencePiece tokens lose the space that opens a word."""
    before: list[int] = []
    for token in tokens:
        start, both = decode(before), decode([*before, token])
        yield both.removeprefix(start) if before and both.startswith(start) else decode([token])
        before = [token]

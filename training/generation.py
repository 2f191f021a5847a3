"""Evaluation of generated text: every row is answered, a verifier says whether the answer is right, and the scores have to find the errors.

Of free text the confidence is one number for the whole answer: by the artifact's map (docs/equations.md, section 7) the probability that it
is right, without one the geometric mean of its tokens' probabilities.
"""

import math
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from credence.adapters.artifact import Artifact, load_artifact
from credence.adapters.calibration import probability_correct
from credence.adapters.sampling import NoiseSource
from credence.training import metrics
from credence.training.data import DataFile, read_data
from credence.training.errors import DataError, MetricError
from credence.training.evaluate import Tau, taus_of
from credence.training.generate import Sampling, generate, stop_tokens
from credence.training.maps import CLIP
from credence.training.predict import Predictor, Scores
from credence.training.prompts import Encoder
from credence.training.session import artifact_format, open_session
from credence.training.summary import intervals, summarise
from credence.training.verifiers import Verifier, reference, verifier

DEFAULT_MAX_NEW_TOKENS = 256
PASS_AT = (1, 10, 100)


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A text as an engine wrote it.

    Attributes:
        tokens: with the stop token, if it ``stopped`` by one.
        text: without special tokens.
        score: mean log-probability of its tokens under the average at temperature 1, nats.
        total, epistemic: means over its tokens, nats.
    """

    tokens: tuple[int, ...]
    text: str
    stopped: bool
    score: float
    total: float
    epistemic: float


class Writer(Protocol):
    """What writes the texts of an artifact's samples."""

    @property
    def encoder(self) -> Encoder:
        """Encodes the rows."""

    def write(
        self,
        prompts: Sequence[tuple[int, ...]],
        k: int,
        tau: float,
        max_new_tokens: int,
        seeds: Sequence[int] | None = None,
    ) -> list[Written]:
        """One text for each prompt by the average over samples 0, ..., k - 1 at ``tau`` (the mean at tau 0).

        Args:
            seeds: draws the tokens at temperature 1, each text by its seed; None takes the most likely ones.
        """


class WriterSource(Protocol):
    """Where a writer comes from that is not transformers + PEFT in this process."""

    def open_writer(self, artifact: Artifact, base: str | Path, largest_k: int) -> AbstractContextManager[Writer]:
        """Opens a writer of this artifact for up to ``largest_k`` samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineWriter:
    """Transformers + PEFT in this process."""

    predictor: Predictor
    encoder: Encoder
    artifact: Artifact

    def write(
        self,
        prompts: Sequence[tuple[int, ...]],
        k: int,
        tau: float,
        max_new_tokens: int,
        seeds: Sequence[int] | None = None,
    ) -> list[Written]:
        """See :class:`Writer`."""
        seed, tokenizer = self.artifact.config.default_seed, self.encoder.tokenizer
        texts = generate(
            self.predictor,
            prompts,
            [self.artifact.draw(seed=seed, index=index, tau=tau) for index in range(k)],
            stop=stop_tokens(self.predictor.model, tokenizer),
            max_new_tokens=max_new_tokens,
            max_length=self.encoder.max_length,
            sampling=Sampling(seeds=seeds) if seeds is not None else None,
        )
        return [
            Written(
                tokens=text.tokens,
                text=tokenizer.decode(list(text.tokens), skip_special_tokens=True),
                stopped=text.stopped,
                score=text.score,
                total=sum(text.total) / len(text.tokens),
                epistemic=sum(text.epistemic) / len(text.tokens),
            )
            for text in texts
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEntry:
    """The answers of one predictor, row by row.

    Attributes:
        k: samples averaged (0 is the mean), or of token samples the number of texts of the mean.
        calibrated: whether the confidence is that of the artifact's map.
        texts: the answers. samples: of token samples every text of a row, else the answer alone.
        correct, confidence: of the answers.
        total: nats; of token samples the entropy of the shares of a row's answers. epistemic: nats; 0 of token samples.
        pass_at: of token samples pass@k by k.
    """

    k: int
    tau: float
    calibrated: bool
    texts: tuple[Written, ...]
    samples: tuple[tuple[Written, ...], ...]
    correct: tuple[bool, ...]
    confidence: tuple[float, ...]
    total: tuple[float, ...]
    epistemic: tuple[float, ...]
    pass_at: dict[int, float] = field(default_factory=dict)

    @property
    def scores(self) -> Scores:
        """One position a row: the answer is right or wrong, with the confidence as the probability that it is right."""
        correct = torch.tensor(self.correct)
        confidence, total, epistemic = (
            torch.tensor(values, dtype=torch.float64) for values in (self.confidence, self.total, self.epistemic)
        )
        right = torch.where(correct, confidence, 1 - confidence)
        return Scores(
            row=torch.arange(len(correct)),
            log_prob=right.clamp(CLIP, 1 - CLIP).log(),
            choice=torch.zeros(len(correct), dtype=torch.int64),
            top=torch.zeros(len(correct), 1, dtype=torch.int64),
            top_probs=confidence[:, None],
            correct=correct,
            confidence=confidence,
            brier=(confidence - correct.double()) ** 2,
            total=total,
            epistemic=epistemic,
        )

    def document(self, resamples: int) -> dict[str, Any]:
        """Its settings and metrics, with bootstrap intervals if there are ``resamples``."""
        scores = self.scores
        wrong = ~scores.correct.numpy()
        found = {
            **summarise(scores),
            "error_aupr_total": metrics.aupr(scores.total.numpy(), wrong),
            "error_aupr_epistemic": metrics.aupr(scores.epistemic.numpy(), wrong) if any(self.epistemic) else None,
        }
        every = [text for row in self.samples for text in row]
        ends = {"intervals": _without_ood(intervals(scores, resamples=resamples))} if resamples else {}
        return {
            "k": self.k,
            "tau": self.tau,
            "calibrated": self.calibrated,
            **_without_ood(found),
            "mean_tokens": float(np.mean([len(text.tokens) for text in every])),
            "stopped": float(np.mean([text.stopped for text in every])),
            **({"pass_at": {str(k): value for k, value in self.pass_at.items()}} if self.pass_at else {}),
            **ends,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEvaluation:
    """What was measured.

    Attributes:
        entries: one for every K and tau. token_samples: one for every K > 0, if asked for.
    """

    artifact: Artifact
    data: DataFile
    verifier: Verifier
    max_new_tokens: int
    entries: tuple[TextEntry, ...]
    token_samples: tuple[TextEntry, ...] = ()

    def document(self, resamples: int = 0) -> dict[str, Any]:
        """``credence eval --generate --json``. A metric that is not defined on these data is None."""
        return {
            "adapter": {"method": self.artifact.config.method, "digest": self.artifact.digest},
            "data": {"file": self.data.path.name, "rows": len(self.data.rows)},
            "generate": {"verifier": self.verifier.name, "max_new_tokens": self.max_new_tokens},
            **({"bootstrap": {"resamples": resamples, "level": 0.95, "seed": 0}} if resamples else {}),
            "results": [entry.document(resamples) for entry in self.entries],
            **(
                {"token_samples": [entry.document(resamples) for entry in self.token_samples]}
                if self.token_samples
                else {}
            ),
        }

    def row_documents(self) -> Iterator[dict[str, Any]]:
        """Yields every row's answer under every predictor, and of token samples all its texts: ``credence eval --generate --rows``."""
        for entry, sampled in [*((e, False) for e in self.entries), *((e, True) for e in self.token_samples)]:
            for index, (row, text, samples) in enumerate(zip(self.data.rows, entry.texts, entry.samples, strict=True)):
                yield {
                    "file": self.data.path.name,
                    "line": row.line,
                    "k": entry.k,
                    "tau": entry.tau,
                    "answer": reference(row.fields),
                    "predicted": text.text,
                    "correct": entry.correct[index],
                    "confidence": entry.confidence[index],
                    "log_prob": text.score * len(text.tokens),
                    "total": entry.total[index],
                    "epistemic": entry.epistemic[index],
                    "num_tokens": len(text.tokens),
                    "stopped": text.stopped,
                    **({"token_samples": [sample.text for sample in samples]} if sampled else {}),
                }


def measure_generation(
    path: str | Path,
    base: str | Path,
    data: str | Path,
    verify: str,
    ks: Sequence[int] = (0, 10),
    tau: Tau | Sequence[Tau] = "fitted",
    *,
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    dtype: str | None = None,
    batch_size: int = 64,
    token_samples: bool = False,
    allow_code_execution: bool = False,
    server: WriterSource | None = None,
) -> TextEvaluation:
    """Answers every row with the mean (K = 0) and averages of K samples, greedily, and verifies the answers.

    Args:
        verify: name of the verifier (``training/verifiers.py``).
        token_samples: also, for every K > 0, the comparator of equal cost: K texts drawn from the mean at temperature 1, of which the most
            frequent answer counts and its share is the confidence.
        allow_code_execution: whether the verifier may run generated programs.
        server: answers the rows; None answers them in this process.

    Raises:
        ArtifactError, DataError, ModelError, MetricError: with the reason.
        CredenceError: the server did not answer; see ``credence.clients.errors``.
    """
    ks = list(dict.fromkeys(ks))
    if not ks or min(ks) < 0 or max_new_tokens < 1:
        raise MetricError(
            f"one K is needed, each 0 (the mean) or more, and at least one new token, got {ks} and {max_new_tokens}"
        )
    checked = verifier(verify, allow_code_execution=allow_code_execution)
    artifact = load_artifact(path)
    expected = artifact_format(artifact)
    if expected.has_candidates:
        raise MetricError(
            f"the adapter was trained on {expected} rows, whose answer is one token of a known set; leave --generate out"
        )
    file = read_data(data, expected=expected)
    for row in file.rows:
        complaint = checked.complaint(row.fields)
        if complaint:
            raise DataError(f"{complaint}; the verifier {checked.name} needs it", file=file.path, line=row.line)
    asked: list[Tau] = [tau] if isinstance(tau, str | float | int) else list(tau)
    points = [(k, value) for k in ks for value in taus_of(artifact, k, asked)]
    with _writer(artifact, base, server, max(ks), dtype, batch_size) as writer:
        judge = _Judge(checked, file)
        prompts = writer.encoder.prompts(file)
        written: dict[tuple[int, float], list[Written]] = {}
        entries = []
        for k, value in points:
            # K = 0 and any K at tau 0 are the mean; the members of an ensemble are so many and no more.
            size = 1 if value == 0 else min(k, artifact.num_distinct_samples or k)
            if (size, value) not in written:
                written[size, value] = writer.write(prompts, size, value, max_new_tokens)
            entries.append(_entry(artifact, judge, k, value, written[size, value]))
        counts = [k for k in ks if k > 0] if token_samples else []
        drawn = [
            writer.write(
                prompts,
                1,
                0.0,
                max_new_tokens,
                [NoiseSource(0, index, "tokens").token_seed(str(row)) for row in range(len(prompts))],
            )
            for index in range(max(counts, default=0))
        ]
    return TextEvaluation(
        artifact=artifact,
        data=file,
        verifier=checked,
        max_new_tokens=max_new_tokens,
        entries=tuple(entries),
        token_samples=tuple(_most_frequent(judge, drawn[:k]) for k in counts),
    )


class _Judge:
    """Says whether a text is right for a row; a text is looked at once for each row."""

    def __init__(self, checked: Verifier, data: DataFile) -> None:
        self.verifier = checked
        self.rows = data.rows
        self._known: dict[tuple[int, str], bool] = {}

    def answer(self, text: Written) -> Hashable | None:
        """What counts of a text; None without an answer."""
        if self.verifier.needs_end and not text.stopped:
            return None
        return self.verifier.answer(text.text)

    def is_right(self, row: int, text: Written) -> bool:
        if self.answer(text) is None:
            return False
        key = row, text.text
        if key not in self._known:
            self._known[key] = self.verifier.is_right(text.text, self.rows[row].fields)
        return self._known[key]


def _entry(artifact: Artifact, judge: _Judge, k: int, tau: float, texts: Sequence[Written]) -> TextEntry:
    fitted = artifact.calibration.fitted_map(k if tau > 0 else 0)
    return TextEntry(
        k=k,
        tau=tau,
        calibrated=fitted is not None,
        texts=tuple(texts),
        samples=tuple((text,) for text in texts),
        correct=tuple(judge.is_right(row, text) for row, text in enumerate(texts)),
        confidence=tuple(
            probability_correct(fitted, text.score) if fitted else math.exp(min(text.score, 0.0)) for text in texts
        ),
        total=tuple(text.total for text in texts),
        epistemic=tuple(text.epistemic if k > 1 else 0.0 for text in texts),
    )


def _most_frequent(judge: _Judge, drawn: Sequence[Sequence[Written]]) -> TextEntry:
    """The most frequent answer of each row's K texts; of equals the one with the likeliest text, then the first.

    A text without an answer has no vote, but counts in the share. Where no text has an answer the row is wrong with confidence 0.
    """
    samples = list(zip(*drawn, strict=True))
    texts, confidence, entropy, passed = [], [], [], []
    for row, of_row in enumerate(samples):
        votes: dict[Hashable, list[Written]] = {}
        for text in of_row:
            answer = judge.answer(text)
            if answer is not None:
                votes.setdefault(answer, []).append(text)
        best = max(votes.values(), key=lambda group: (len(group), max(text.score for text in group)), default=[])
        texts.append(max(best, key=lambda text: text.score) if best else of_row[0])
        confidence.append(len(best) / len(of_row))
        abstained = len(of_row) - sum(map(len, votes.values()))
        shares = np.array([*map(len, votes.values()), *[1] * abstained]) / len(of_row)
        entropy.append(float(abs((shares * np.log(shares)).sum())))
        passed.append(sum(judge.is_right(row, text) for text in of_row))
    k = len(drawn)
    return TextEntry(
        k=k,
        tau=0.0,
        calibrated=False,
        texts=tuple(texts),
        samples=tuple(samples),
        correct=tuple(judge.is_right(row, text) for row, text in enumerate(texts)),
        confidence=tuple(confidence),
        total=tuple(entropy),
        epistemic=(0.0,) * len(texts),
        pass_at={
            at: float(np.mean([metrics.pass_at_k(k, count, at) for count in passed]))
            for at in sorted({*(at for at in PASS_AT if at <= k), k})
        },
    )


@contextmanager
def _writer(
    artifact: Artifact,
    base: str | Path,
    server: WriterSource | None,
    largest_k: int,
    dtype: str | None,
    batch_size: int,
) -> Iterator[Writer]:
    if server is not None:
        with server.open_writer(artifact, base, largest_k) as served:
            yield served
    else:
        with open_session(artifact, base, dtype=dtype, batch_size=batch_size) as session:
            yield OfflineWriter(predictor=session.predictor, encoder=session.encoder, artifact=artifact)


def _without_ood(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if not name.startswith("ood_")}

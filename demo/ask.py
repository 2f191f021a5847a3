"""Asks a server the demo's questions over HTTP and turns the answers into cases and separations."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from credence.clients import Client, TokenUncertainty
from credence.demo.server import DemoError
from credence.demo.world import Fact, Kind
from credence.training.metrics import auroc

MAX_TOKENS = 4
LATENCY_METRIC = "credence_request_duration_seconds"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One question and its answer; scores in nats per token of the answer, higher is more uncertain.

    Attributes:
        text: what the ensemble of samples answered.
        total, aleatoric, epistemic: of the ensemble; total = aleatoric + epistemic.
        mean_entropy: of the mean adapter's own answer to the same question.
        tokens: the answer's tokens with their scores.
    """

    fact: Fact
    text: str
    confidence: float
    total: float
    aleatoric: float
    epistemic: float
    mean_entropy: float
    tokens: tuple[TokenUncertainty, ...]

    def to_json(self) -> dict[str, Any]:
        """The case as it stands in summary.json."""
        return {
            "kind": self.fact.kind,
            "prompt": self.fact.prompt,
            "text": self.text,
            "confidence": self.confidence,
            "total": self.total,
            "aleatoric": self.aleatoric,
            "epistemic": self.epistemic,
        }


def ask(client: Client, model: str, fact: Fact, *, n_samples: int, seed: int | None = None) -> Case:
    """Asks one question twice: the ensemble of `n_samples` samples, and the mean adapter alone (one sample at tau 0).

    Raises:
        CredenceError: the server did not answer as it should.
        DemoError: an answer has no token, hence no score.
    """
    prompt = fact.prompt
    ensemble = client.complete(
        prompt,
        model=model,
        uncertainty=True,
        n_samples=n_samples,
        granularity="token",
        max_tokens=MAX_TOKENS,
        temperature=0.0,
    )
    mean = client.complete(
        prompt, model=model, uncertainty=True, n_samples=1, tau=0.0, max_tokens=MAX_TOKENS, temperature=0.0
    )
    scores, alone = ensemble.uncertainty, mean.uncertainty
    assert scores is not None and alone is not None  # the client raises where the server left them out
    if (
        scores.confidence is None
        or scores.total is None
        or scores.aleatoric is None
        or scores.epistemic is None
        or alone.total is None
    ):
        raise DemoError(f"the answer to {prompt!r} is empty, so it has no scores")
    return Case(
        fact=fact,
        text=ensemble.text,
        confidence=scores.confidence,
        total=scores.total,
        aleatoric=scores.aleatoric,
        epistemic=scores.epistemic,
        mean_entropy=alone.total,
        tokens=scores.tokens or (),
    )


def ask_all(
    client: Client,
    model: str,
    facts: Sequence[Fact],
    *,
    n_samples: int,
    threads: int,
    check: Callable[[], None],
    progress: Callable[[], None],
) -> list[Case]:
    """Asks every question, `threads` at a time, in the order given; calls `check` and `progress` after each.

    Raises:
        Exception: what `check` raised, or else the first question that failed; the rest are not asked.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        futures = [pool.submit(ask, client, model, fact, n_samples=n_samples) for fact in facts]
        cases = []
        for future in futures:
            try:
                cases.append(future.result())
            except Exception:
                check()  # a server that is gone explains more than a connection that broke
                raise
            progress()
        return cases
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True, kw_only=True)
class Separation:
    """AUROC of the kinds by the scores: 1 separates them perfectly, 0.5 not at all.

    Attributes:
        by_epistemic, by_total: unknown against known, by the ensemble's scores.
        by_mean_entropy: unknown against known, by the mean adapter's own entropy.
        noisy_by_aleatoric: noisy against known, by the ensemble's aleatoric score.
        unknown_from_noisy: unknown against noisy, by the share of the total that is epistemic.
    """

    by_epistemic: float
    by_total: float
    by_mean_entropy: float
    noisy_by_aleatoric: float
    unknown_from_noisy: float


def separate(cases: Sequence[Case]) -> Separation:
    """Measures how well the scores tell the kinds apart.

    Raises:
        DemoError: a kind has no case.
    """

    def area(positive: Kind, negative: Kind, score: Callable[[Case], float]) -> float:
        chosen = [case for case in cases if case.fact.kind in (positive, negative)]
        value = None
        if chosen:
            value = auroc([score(case) for case in chosen], [case.fact.kind == positive for case in chosen])
        if value is None:
            raise DemoError(f"no {positive} or no {negative} question was asked; ask some of each kind")
        return value

    return Separation(
        by_epistemic=area("unknown", "known", lambda case: case.epistemic),
        by_total=area("unknown", "known", lambda case: case.total),
        by_mean_entropy=area("unknown", "known", lambda case: case.mean_entropy),
        noisy_by_aleatoric=area("noisy", "known", lambda case: case.aleatoric),
        unknown_from_noisy=area("unknown", "noisy", lambda case: case.epistemic / max(case.total, 1e-12)),
    )


def latencies(metrics: str) -> dict[int, tuple[float, float]]:
    """Number of answers and their summed seconds, by number of samples K, from the text of `/metrics`."""
    found: dict[int, list[float]] = {}
    for family in text_string_to_metric_families(metrics):
        if family.name != LATENCY_METRIC:
            continue
        for sample in family.samples:
            if sample.labels.get("outcome") != "ok":
                continue
            counts = found.setdefault(int(sample.labels["k"]), [0.0, 0.0])
            if sample.name.endswith("_count"):
                counts[0] += sample.value
            elif sample.name.endswith("_sum"):
                counts[1] += sample.value
    return {k: (count, seconds) for k, (count, seconds) in sorted(found.items())}


def mean_latency_ms(before: str, after: str) -> dict[int, float]:
    """Mean milliseconds per answer by K, of the answers between two readings of `/metrics`."""
    first = latencies(before)
    result = {}
    for k, (count, seconds) in latencies(after).items():
        count_before, seconds_before = first.get(k, (0.0, 0.0))
        if count > count_before:
            result[k] = 1000 * (seconds - seconds_before) / (count - count_before)
    return result

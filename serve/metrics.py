"""Prometheus metrics of our part of the server; vLLM's own stay beside them in the same /metrics.

Label values are closed sets, initialised at start where their product is small: never a prompt, a user, a seed or a path. vLLM counts every
member of an ensemble as a request of its own; these count what users asked for. docs/observability.md has the table; a test compares.
"""

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from credence.adapters.errors import ArtifactReason

K_VALUES = (0, 1, 2, 4, 8, 16, 32)
MODES = ("mean", "ensemble", "score", "choices", "generate")
OUTCOMES = ("ok", "client_error", "server_error", "disconnected")
REJECTIONS = (
    "bad_request", "unauthorized", "forbidden", "unknown_model", "unknown_route", "conflict", "too_large", "artifact_refused", "rate_limit",
    "overload", "draining",
    "sample_failed", "internal",
)  # fmt: skip
DEGRADATIONS = ("sample_failed",)
CACHE_RESULTS = ("hit", "miss")
SLOT_STATES = ("leased", "resident", "free")
LOAD_RESULTS = ("ok", "refused")
INTEGRITY_FAILURES: tuple[str, ...] = get_args(ArtifactReason)
LATENCY_BUCKETS_S = (
    0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.4, 0.6, 1, 1.5, 2.5, 4, 6, 10, 15, 25, 40, 60, 120, 300,
)  # fmt: skip
LOAD_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
NATS_BUCKETS = (1e-4, 1e-3, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3)


def k_label(k: int) -> str:
    """The smallest of :data:`K_VALUES` that is at least ``k`` (the largest for any K beyond it)."""
    return str(next((value for value in K_VALUES if value >= k), K_VALUES[-1]))


def outcome_label(status: int) -> str:
    """Outcome by HTTP status."""
    return "ok" if status < 400 else "client_error" if status < 500 else "server_error"


class Metrics:
    """All metrics of one server.

    Args:
        registry: where to register; each test has its own.
        adapters: (name, method, digest) of every served adapter.
    """

    def __init__(self, registry: CollectorRegistry, adapters: Iterable[tuple[str, str, str]]) -> None:
        self.request_duration_seconds = Histogram(
            "credence_request_duration_seconds",
            "Time from the request's arrival to the end of its answer, by number of posterior samples (k=0: the mean).",
            ["endpoint", "mode", "k", "outcome"],
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.time_to_first_token_seconds = Histogram(
            "credence_time_to_first_token_seconds",
            "Time from a streaming request's arrival to the first event of its answer, by number of posterior samples.",
            ["mode", "k"],
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.gang_wait_seconds = Histogram(
            "credence_gang_wait_seconds",
            "Time that the complete group of an ensemble's members waited in the scheduler for its first common step, by its size.",
            ["k"],
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.inflight_requests = Gauge(
            "credence_inflight_requests", "Uncertainty requests being served.", registry=registry
        )
        self.samples_requested = Counter(
            "credence_samples_requested", "Posterior samples asked for by uncertainty requests.", registry=registry
        )
        self.sample_cache_requests = Counter(
            "credence_sample_cache_requests",
            "Samples asked for that already held a slot (hit) or had to be drawn (miss).",
            ["result"],
            registry=registry,
        )
        self.sample_slots = Gauge("credence_sample_slots", "Sample slots by state.", ["state"], registry=registry)
        self.sample_materialize_seconds = Histogram(
            "credence_sample_materialize_seconds",
            "Time to draw one posterior sample in the workers and register it.",
            buckets=LOAD_BUCKETS_S,
            registry=registry,
        )
        self.adapter_loads = Counter(
            "credence_adapter_loads", "Artifacts read and verified, by result.", ["result"], registry=registry
        )
        self.adapter_load_seconds = Histogram(
            "credence_adapter_load_seconds",
            "Time to verify an artifact and load its mean.",
            buckets=LOAD_BUCKETS_S,
            registry=registry,
        )
        self.adapter_info = Gauge(
            "credence_adapter_info", "Served adapters (always 1).", ["adapter", "method", "digest8"], registry=registry
        )
        self.adapter_integrity_failures = Counter(
            "credence_adapter_integrity_failures", "Artifacts refused by verification.", ["reason"], registry=registry
        )
        self.adapter_release_accuracy = Gauge(
            "credence_adapter_release_accuracy",
            "Accuracy that the release of an adapter measured at the server's default number of samples.",
            ["adapter"],
            registry=registry,
        )
        self.adapter_release_ece = Gauge(
            "credence_adapter_release_ece",
            "Expected calibration error that the release of an adapter measured at the server's default number of samples.",
            ["adapter"],
            registry=registry,
        )
        self.degraded_requests = Counter(
            "credence_degraded_requests",
            "Requests served with fewer samples than asked for.",
            ["reason"],
            registry=registry,
        )
        self.rejections = Counter(
            "credence_rejections", "Requests refused at the door or failed.", ["reason"], registry=registry
        )
        self.client_disconnects = Counter(
            "credence_client_disconnects", "Clients that went away before the end of their answer.", registry=registry
        )
        self.audit_failures = Counter(
            "credence_audit_failures", "Lines of the audit log that could not be written.", registry=registry
        )
        self.engine_up = Gauge("credence_engine_up", "1 while the engine answers.", registry=registry)
        self.confidence = Histogram(
            "credence_confidence",
            "Confidence of the answers, per adapter.",
            ["adapter"],
            buckets=tuple(step / 20 for step in range(1, 21)),
            registry=registry,
        )
        self.epistemic_nats = Histogram(
            "credence_epistemic_nats",
            "Epistemic uncertainty of the answers (nats/token), per adapter.",
            ["adapter"],
            buckets=NATS_BUCKETS,
            registry=registry,
        )
        self.flagged = Counter(
            "credence_flagged", "Answers below the request's threshold.", ["adapter"], registry=registry
        )
        self._info: dict[str, tuple[str, str, str]] = {}
        self._initialise()
        for name, method, digest in adapters:
            self.serve(name, method, digest)

    def serve(self, name: str, method: str, digest: str) -> None:
        """Starts the series of a served name (at zero, so that the first answer is an increase), or moves them to another artifact."""
        self._forget(name)
        self._info[name] = (name, method, digest.removeprefix("sha256:")[:8])
        self.adapter_info.labels(*self._info[name]).set(1)
        for metric in (self.confidence, self.epistemic_nats, self.flagged):
            metric.labels(name)

    def withdraw(self, name: str) -> None:
        """Ends the series of a name that is served no longer."""
        self._forget(name)
        for metric in (self.confidence, self.epistemic_nats, self.flagged):
            metric.remove(name)

    def released(self, adapter: str, measured: Mapping[str, Any], k: int) -> None:
        """Shows what the release of a served artifact measured at K samples; nothing for free text, which has no accuracy.

        Args:
            adapter: served name; call :meth:`serve` first, which forgets the artifact before.
            measured: the artifact's metrics.json.
        """
        release = measured.get("release", {})
        accuracy, ece = (release.get(name, {}).get(str(k)) for name in ("accuracy", "ece15"))
        if isinstance(accuracy, (int, float)) and isinstance(ece, (int, float)):
            self.adapter_release_accuracy.labels(adapter).set(accuracy)
            self.adapter_release_ece.labels(adapter).set(ece)

    def _forget(self, name: str) -> None:
        if name in self._info:
            self.adapter_info.remove(*self._info.pop(name))
        for gauge in (self.adapter_release_accuracy, self.adapter_release_ece):
            with contextlib.suppress(KeyError):
                gauge.remove(name)

    def _initialise(self) -> None:
        for mode in MODES:
            for k in K_VALUES:
                if (k == 0) == (mode == "mean"):
                    self.request_duration_seconds.labels("/v1/completions", mode, str(k), "ok")
                    self.time_to_first_token_seconds.labels(mode, str(k))
        for k in K_VALUES[1:]:
            self.gang_wait_seconds.labels(str(k))
        closed: tuple[tuple[Counter | Gauge, tuple[str, ...]], ...] = (
            (self.sample_cache_requests, CACHE_RESULTS),
            (self.sample_slots, SLOT_STATES),
            (self.adapter_loads, LOAD_RESULTS),
            (self.adapter_integrity_failures, INTEGRITY_FAILURES),
            (self.degraded_requests, DEGRADATIONS),
            (self.rejections, REJECTIONS),
        )
        for metric, values in closed:
            for value in values:
                metric.labels(value)

"""A real server as the people see it who run it: /metrics, its log, its traces."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from credence.adapters import Artifact
from credence.serve import metrics
from credence.serve.routes import UNCERTAINTY_PATHS
from tests.deploy.expressions import scraped_names
from tests.serve.collector import Collector, ReceivedSpan
from tests.servers import Server, credence_command, start
from tests.tiny import make_artifact

pytestmark = [pytest.mark.engine, pytest.mark.slow]

DOCS = Path(__file__).parents[2] / "docs" / "observability.md"
PROMPT = "w1 w2 w3 w40 w5"
SEED = 987654321
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"

ADAPTER = frozenset({"diag", "row", "point"})
K = frozenset(map(str, metrics.K_VALUES))
MODE = frozenset(metrics.MODES)
REQUEST = {"endpoint": frozenset(UNCERTAINTY_PATHS), "mode": MODE, "k": K, "outcome": frozenset(metrics.OUTCOMES)}
DIGEST = re.compile(r"[0-9a-f]{8}")
TABLE: dict[str, tuple[str, dict[str, frozenset[str] | re.Pattern[str]]]] = {
    "credence_request_duration_seconds": ("histogram", REQUEST),
    "credence_time_to_first_token_seconds": ("histogram", {"mode": MODE, "k": K}),
    "credence_gang_wait_seconds": ("histogram", {"k": K}),
    "credence_inflight_requests": ("gauge", {}),
    "credence_samples_requested": ("counter", {}),
    "credence_sample_cache_requests": ("counter", {"result": frozenset({"hit", "miss"})}),
    "credence_sample_slots": ("gauge", {"state": frozenset({"leased", "resident", "free"})}),
    "credence_sample_materialize_seconds": ("histogram", {}),
    "credence_adapter_loads": ("counter", {"result": frozenset({"ok", "refused"})}),
    "credence_adapter_load_seconds": ("histogram", {}),
    "credence_adapter_integrity_failures": ("counter", {"reason": frozenset(metrics.INTEGRITY_FAILURES)}),
    "credence_adapter_info": (
        "gauge", {"adapter": ADAPTER, "method": frozenset({"ivon", "monteclora", "map"}), "digest8": DIGEST},
    ),
    "credence_adapter_release_accuracy": ("gauge", {"adapter": ADAPTER}),
    "credence_adapter_release_ece": ("gauge", {"adapter": ADAPTER}),
    "credence_degraded_requests": ("counter", {"reason": frozenset({"sample_failed"})}),
    "credence_rejections": ("counter", {"reason": frozenset(metrics.REJECTIONS)}),
    "credence_client_disconnects": ("counter", {}),
    "credence_audit_failures": ("counter", {}),
    "credence_engine_up": ("gauge", {}),
    "credence_confidence": ("histogram", {"adapter": ADAPTER}),
    "credence_epistemic_nats": ("histogram", {"adapter": ADAPTER}),
    "credence_flagged": ("counter", {"adapter": ADAPTER}),
}  # fmt: skip
"""Every metric of ours, as the client library calls it: type, and labels with all the values they may have."""


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="module")
def server(
    model_path: Path, artifacts: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory, collector: Collector
) -> Iterator[Server]:
    """Our server, that logs JSON and exports its traces, after some traffic of every kind."""
    adapters = {name: artifact.path for name, artifact in artifacts.items()}
    measured = {"release": {"accuracy": {"8": 0.875}, "ece15": {"8": 0.0625}}}
    adapters["diag"] = make_artifact(tmp_path_factory.mktemp("released") / "diag", metrics=measured).path
    command = credence_command(
        model_path, adapters, "--log-format", "json", "--otlp-traces-endpoint", collector.endpoint
    )
    environment = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_BSP_SCHEDULE_DELAY": "200"}
    running = start(command, tmp_path_factory.mktemp("observed") / "log", "/readyz", environment)
    try:
        talk(running)
        yield running
    finally:
        running.stop()


def talk(server: Server) -> None:
    """Each mode, streams, a choice of seeds, refusals, and a client that goes away in the middle of a plain stream."""
    traced = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "traced-1"}
    body = {"model": "diag", "prompt": PROMPT, "max_tokens": 4, "uncertainty": {"n_samples": 4}}
    assert server.client.post("/v1/completions", json=body, headers=traced).status_code == 200
    plain = {"model": "diag", "prompt": PROMPT, "max_tokens": 4}
    assert server.client.post("/v1/completions", json=plain, headers=traced | {"x-request-id": "traced-2"}).is_success
    scored = {"model": "diag", "prompt": PROMPT, "completion": "w6 w7", "uncertainty": {"n_samples": 2}}
    headers = traced | {"x-request-id": "traced-3"}
    assert server.client.post("/v1/uncertainty/score", json=scored, headers=headers).is_success
    for extra in ({"mode": "score"}, {"mode": "choices", "choices": ["w1", "w2"]}, {"mode": "generate"}):
        options = {"n_samples": 2, "seed": SEED, "threshold": 0.999, **extra}
        assert server.complete(model="row", prompt=PROMPT, max_tokens=4, uncertainty=options).status_code == 200
    assert server.complete(model="point", prompt=PROMPT, max_tokens=2, uncertainty=True).status_code == 200
    assert server.complete(model="nobody", prompt=PROMPT, uncertainty=True).status_code == 404
    assert server.complete(model="diag", prompt=PROMPT, uncertainty={"n_samples": 99}).status_code == 400
    assert server.client.get("/no/such/route").status_code == 404
    server.complete(model="diag", prompt=PROMPT, max_tokens=4, stream=True, uncertainty={"n_samples": 2})
    long = {"model": "diag", "prompt": PROMPT, "max_tokens": 150, "stream": True, "ignore_eos": True, "n": 8}
    with server.client.stream("POST", "/v1/completions", json=long, headers={"x-request-id": "gone-1"}) as response:
        next(response.iter_lines())


def scrape(server: Server) -> str:
    return server.client.get("/metrics").text


def lines(server: Server) -> list[dict[str, object]]:
    """The JSON lines of the log; C libraries write to the same output."""
    return [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]


def wait_for_line(server: Server, request_id: str) -> dict[str, object]:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = [line for line in lines(server) if line.get("request_id") == request_id]
        if found:
            return found[-1]
        time.sleep(0.1)
    raise AssertionError(f"no line of {request_id}")


def test_metrics_are_those_of_the_table(server: Server) -> None:
    families = {
        family.name: family
        for family in text_string_to_metric_families(scrape(server))
        if family.name.startswith("credence_") and not family.name.endswith("_created")
    }
    assert {name: family.type for name, family in families.items()} == {name: row[0] for name, row in TABLE.items()}
    for name, (_, labels) in TABLE.items():
        for sample in families[name].samples:
            found = {label: value for label, value in sample.labels.items() if label != "le"}
            assert set(found) == set(labels), name
            for label, value in found.items():
                allowed = labels[label]
                assert allowed.fullmatch(value) if isinstance(allowed, re.Pattern) else value in allowed, (
                    name,
                    label,
                    value,
                )


def test_small_label_sets_are_there_from_the_start(server: Server) -> None:
    text = scrape(server)
    for name, (kind, labels) in TABLE.items():
        if len(labels) == 1 and name not in ("credence_adapter_release_accuracy", "credence_adapter_release_ece"):
            ((label, values),) = labels.items()
            suffix = {"counter": "_total", "histogram": "_count"}.get(kind, "")
            assert isinstance(values, frozenset)
            for value in values - ({"0"} if label == "k" else set()):
                assert f'{name}{suffix}{{{label}="{value}"}}' in text, (name, value)


@pytest.mark.parametrize(
    "line",
    [
        'credence_request_duration_seconds_count{endpoint="/v1/completions",k="4",mode="ensemble",outcome="ok"}',
        'credence_request_duration_seconds_count{endpoint="/v1/completions",k="2",mode="generate",outcome="ok"}',
        'credence_request_duration_seconds_count{endpoint="/v1/uncertainty/score",k="2",mode="score",outcome="ok"}',
        'credence_time_to_first_token_seconds_count{k="2",mode="ensemble"}',
        'credence_gang_wait_seconds_count{k="4"}',
        "credence_samples_requested_total",
        'credence_sample_cache_requests_total{result="hit"}',
        'credence_sample_cache_requests_total{result="miss"}',
        'credence_sample_slots{state="resident"}',
        "credence_sample_materialize_seconds_count",
        'credence_adapter_loads_total{result="ok"}',
        "credence_adapter_load_seconds_count",
        'credence_rejections_total{reason="bad_request"}',
        'credence_rejections_total{reason="unknown_model"}',
        'credence_rejections_total{reason="unknown_route"}',
        "credence_engine_up",
        'credence_confidence_count{adapter="diag"}',
        'credence_epistemic_nats_count{adapter="diag"}',
        'credence_flagged_total{adapter="row"}',
    ],
)  # fmt: skip
def test_what_happened_was_counted(server: Server, line: str) -> None:
    assert server.metric(line) >= 1


def test_the_release_is_shown_beside_the_served(server: Server) -> None:
    assert server.metric('credence_adapter_release_accuracy{adapter="diag"}') == 0.875
    assert server.metric('credence_adapter_release_ece{adapter="diag"}') == 0.0625
    assert 'credence_adapter_release_accuracy{adapter="row"}' not in scrape(server)


def test_a_plain_stream_that_is_left_is_a_disconnect(server: Server) -> None:
    assert wait_for_line(server, "gone-1")["status"] == 499
    assert server.metric("credence_client_disconnects_total") == 1


def test_no_label_holds_what_belongs_to_one_request(server: Server) -> None:
    ours = "\n".join(line for line in scrape(server).splitlines() if line.startswith("credence_"))
    for private in ("w40", "traced-1", str(SEED), "nobody", "/no/such/route", str(server.log.parent.parent)):
        assert private not in ours, private


def test_the_documentation_has_the_same_table(server: Server) -> None:
    rows = re.findall(r"^\| `(credence_\w+)` \| (\w+) \| (.*?) \|", DOCS.read_text(), re.MULTILINE)
    documented = {
        name.removesuffix("_total"): (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows
    }
    assert documented == {name: (kind, set(labels)) for name, (kind, labels) in TABLE.items()}


def test_rules_and_dashboard_name_metrics_that_exist(server: Server) -> None:
    exported = set(re.findall(r"^([a-z_:0-9]+)[{ ]", scrape(server), re.MULTILINE))
    assert scraped_names() <= exported


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian package prometheus) is not installed")
def test_promtool_accepts_our_metrics(server: Server) -> None:
    """vLLM's own names break its rules (colons); that is vLLM's."""
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=scrape(server), capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 3), done.stderr
    complaints = [line for line in (done.stdout + done.stderr).splitlines() if line and not line.startswith("vllm:")]
    assert complaints == []


def test_vllms_metrics_stay(server: Server) -> None:
    text = scrape(server)
    for name in ("vllm:lora_requests_info", "vllm:num_requests_running", "vllm:kv_cache_usage_perc"):
        assert f"# TYPE {name} " in text


def test_the_log_has_one_line_per_request(server: Server) -> None:
    wait_for_line(server, "gone-1")
    access = [line for line in lines(server) if line["logger"] == "credence.access"]
    assert sum(line["method"] == "POST" for line in access) == 11
    (line,) = [line for line in access if line["request_id"] == "traced-1"]
    assert (line["status"], line["mode"], line["k"], line["model"], line["flag"]) == (200, "ensemble", 4, "diag", "ok")
    assert {line["reason"] for line in access} >= {"unknown_model", "bad_request", "unknown_route"}
    loggers = {str(line["logger"]) for line in lines(server)}
    assert "uvicorn.error" in loggers and any(name.startswith("vllm.") for name in loggers)
    assert "uvicorn.access" not in loggers
    assert "w40" not in server.log.read_text()


def test_request_ids_reach_vllm_and_come_back(server: Server) -> None:
    body = {"model": "diag", "prompt": PROMPT, "max_tokens": 2}
    for extra in ({}, {"uncertainty": True}, {"stream": True}, {"stream": True, "uncertainty": True}):
        response = server.client.post("/v1/completions", json=body | extra, headers={"x-request-id": "mine"})
        assert response.headers.get_list("x-request-id") == ["mine"]
        assert '"id":"cmpl-mine"' in response.text.replace(" ", "")
    preflight = {"origin": "http://page", "access-control-request-method": "POST"}
    answers = [
        server.client.get("/no/such/route"),
        server.client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"}),
        server.client.get("/metrics"),
        server.client.options("/v1/completions", headers=preflight),  # vLLM's CORS answers, outside the gate
    ]
    assert [len(answer.headers["x-request-id"]) for answer in answers] == [32] * 4


def test_our_spans_continue_the_callers_trace_and_vllms_hang_below(server: Server, collector: Collector) -> None:
    def below(spans: list[ReceivedSpan]) -> list[ReceivedSpan]:
        return [span for span in spans if span.trace_id == TRACE and span.name == "llm_request"]

    spans = collector.wait_for(lambda spans: len(below(spans)) >= 4 + 1 + 2)
    ours = {
        span.attributes["credence.request_id"]: span
        for span in spans
        if span.scope == "credence.serve" and span.trace_id == TRACE
    }
    assert set(ours) == {"traced-1", "traced-2", "traced-3"}
    assert {span.parent_id for span in ours.values()} == {PARENT}
    members = {name: [span for span in below(spans) if span.parent_id == ours[name].span_id] for name in ours}
    assert {name: len(found) for name, found in members.items()} == {"traced-1": 4, "traced-2": 1, "traced-3": 2}
    assert all("traced-1" in span.attributes["gen_ai.request.id"] for span in members["traced-1"])

    span = ours["traced-1"]
    expected = {
        "credence.mode": "ensemble",
        "credence.k": 4,
        "credence.n_effective": 4,
        "credence.tau": 1.0,
        "credence.model": "diag",
    }
    assert {name: span.attributes[name] for name in expected} == expected
    assert 0 <= span.attributes["credence.confidence"] <= 1 and span.attributes["credence.epistemic"] >= 0
    assert [name for name, _ in span.events] == ["samples leased", "gang start", "gang end"]
    assert span.events[0][1]["samples"] == 4 and span.events[2][1] == {"members": 4, "complete": True, "tokens": 4}
    assert "w40" not in str(collector.spans)


def test_a_server_that_is_asked_without_a_trace_starts_one(server: Server, collector: Collector) -> None:
    response = httpx.post(
        f"{server.url}/v1/completions",
        json={"model": "diag", "prompt": PROMPT, "max_tokens": 1, "uncertainty": True},
        timeout=60,
    )
    request_id = response.headers["x-request-id"]

    def mine(spans: list[ReceivedSpan]) -> list[ReceivedSpan]:
        return [span for span in spans if span.attributes.get("credence.request_id") == request_id]

    (span,) = mine(collector.wait_for(lambda spans: bool(mine(spans))))
    assert span.parent_id == "" and span.trace_id != TRACE

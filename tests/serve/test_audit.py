"""The audit log: what a line holds, and that a disk's troubles are nobody's but the log's."""

import json
import os
import threading
from pathlib import Path

import pytest

from credence.serve import audit as audit_module
from credence.serve.audit import AuditLog, record_of
from credence.serve.errors import ConfigurationError
from credence.serve.facts import RequestFacts
from credence.serve.routes import find
from credence.serve.schemas import AdapterIdentity, Uncertainty


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_appended_in_order_for_the_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.touch(0o600)
    path.write_text('{"number":-1}\n')
    log = AuditLog(path)
    for number in range(500):
        log.write({"number": number})
    log.close()
    assert [line["number"] for line in lines(path)] == list(range(-1, 500))
    fresh = tmp_path / "fresh"
    AuditLog(fresh).close()
    assert fresh.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("again", [True, False])
def test_a_file_that_was_moved_away_is_opened_anew(tmp_path: Path, again: bool) -> None:
    path, old = tmp_path / "audit.jsonl", tmp_path / "audit.jsonl.1"
    log = AuditLog(path)
    log.write({"number": 1})
    while not path.read_text():
        pass
    path.rename(old)
    if again:
        path.touch()
    log.write({"number": 2})
    log.close()
    assert [line["number"] for line in lines(old)] == [1]
    assert [line["number"] for line in lines(path)] == [2]


def test_a_full_disk_is_counted_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    failures: list[int] = []
    log = AuditLog(Path("/dev/full"), lambda: failures.append(1))
    for number in range(20):
        log.write({"number": number})
    log.close()
    assert len(failures) == 20
    assert caplog.text.count("are lost: [Errno 28]") == 1


def test_a_line_that_was_cut_off_does_not_spoil_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "audit.jsonl"
    failures: list[int] = []
    real = os.write
    cut = iter([True, False, False])

    def write(file: int, data: bytes) -> int:
        return real(file, data[:5] if next(cut) else data)

    monkeypatch.setattr(audit_module.os, "write", write)
    log = AuditLog(path, lambda: failures.append(1))
    for number in range(3):
        log.write({"number": number})
    log.close()
    assert path.read_text() == '{"num\n{"number": 1}\n{"number": 2}\n'
    assert len(failures) == 1


def test_a_disk_that_hangs_delays_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits is bounded; the rest is lost, and counted."""
    monkeypatch.setattr(audit_module, "MAX_WAITING", 10)
    hangs, failures = threading.Event(), []
    log = AuditLog(tmp_path / "audit.jsonl", lambda: failures.append(1))
    monkeypatch.setattr(log, "_append", lambda line: hangs.wait(10))
    for number in range(50):
        log.write({"number": number})
    hangs.set()
    log.close()
    assert len(failures) in (39, 40), "10 wait, and one may be with the disk"


def test_a_file_that_cannot_be_opened_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"--audit-log .* cannot be opened"):
        AuditLog(tmp_path / "absent" / "audit.jsonl")


def test_a_line_holds_who_asked_what_and_how_sure_the_answer_was() -> None:
    facts = RequestFacts(
        request_id="r", method="POST", path="/v1/completions", started_s=0.0, key="team", model="triage"
    )
    facts.mode, facts.n_samples_asked, facts.status = "ensemble", "auto", 200
    facts.sample_prompt_tokens, facts.sample_completion_tokens = 16, 8
    for confidence in (0.5, 0.75):
        facts.uncertainties.append(
            Uncertainty(
                mode="ensemble", n_samples=8, n_effective=7, tau=1.5, seed=3, confidence=confidence, calibrated=True, flag="ok",
                total=0.3, aleatoric=0.2, epistemic=0.1, sequence=None, adapter=AdapterIdentity(name="triage", digest="sha256:ab"),
            )
        )  # fmt: skip
    route = find("/v1/completions")
    assert route is not None
    record = record_of(facts, route)
    assert record.pop("time").endswith("Z") and record.pop("seconds") > 0
    score = {"total": 0.3, "aleatoric": 0.2, "epistemic": 0.1, "unit": "nats/token", "flag": "ok"}
    assert record == {
        "request_id": "r", "key": "team", "method": "POST", "route": "/v1/completions", "status": 200, "reason": None, "model": "triage",
        "mode": "ensemble", "n_samples_asked": "auto", "adapter": "triage", "digest": "sha256:ab", "n_samples": 8, "n_effective": 7,
        "tau": 1.5, "seed": 3, "answers": [{"confidence": 0.5, **score}, {"confidence": 0.75, **score}],
        "usage": {"sample_prompt_tokens": 16, "sample_completion_tokens": 8},
    }  # fmt: skip


def test_an_admin_call_is_named_by_its_route() -> None:
    path = "/admin/v1/adapters/anything goes here"
    facts = RequestFacts(request_id="r", method="DELETE", path=path, started_s=0.0, key="boss", status=404)
    route = find(path)
    assert route is not None
    record = record_of(facts, route)
    assert record["route"] == "/admin/v1/adapters/{name}" and "anything" not in json.dumps(record)

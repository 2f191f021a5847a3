"""credence.serve.vllm_plugin.gang_step: forced tokens, records on their way from the device, and that no step waits for the device."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from credence.serve.step_stats import StepStats
from credence.serve.vllm_plugin import gang_step
from credence.serve.vllm_plugin.averaging import (
    ChoiceRule,
    average,
    calibrated_log_prob,
    choose_token,
    mean_log_normaliser,
    penalise,
)
from credence.serve.vllm_plugin.gang_member import GangMember
from credence.serve.vllm_plugin.gang_step import Gang, RecordQueue, StatsFile, attach, average_gangs

pytestmark = pytest.mark.filterwarnings("ignore")
V = 31

RULES = [
    ChoiceRule(seed=3),
    ChoiceRule(seed=3, temperature=1.4),
    ChoiceRule(seed=4, temperature=1.2, top_k=7, top_p=0.8, min_p=0.01),
    ChoiceRule(seed=5, temperature=0.9, presence_penalty=0.4, frequency_penalty=0.2, repetition_penalty=1.3),
]


def random_logits(rows: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


def gang(name: str, rows: list[int], stats: str = "", rule: ChoiceRule = RULES[0], **changes: Any) -> Gang:
    keys = {key: changes.pop(key) for key in ("temperature", "support", "num_top") if key in changes}
    leader = GangMember(gang=name, num_samples=len(rows), index=0, seed=rule.seed, stats=stats, **keys)
    return Gang(**{"rows": rows, "leader": leader, "rule": rule, "step": 0, "file": StatsFile(leader), **changes})


def test_gangs_of_several_sizes_against_one_gang_at_a_time(tmp_path: Path) -> None:
    """Tokens and every column of the records, from the definitions in averaging (tested by themselves)."""
    logits, prompt, output = random_logits(9), [1, 2, 3], [3, 5, 5]
    layout = [("a", [4, 0]), ("b", [7]), ("c", [2, 8, 1]), ("d", [5, 6])]
    files = {name: StepStats.create(tmp_path / name, len(rows), 9, i) for i, (name, rows) in enumerate(layout)}
    gangs = [
        gang(name, rows, files[name].path, RULES[i], step=i, prompt=prompt, output=output, num_top=i,
             temperature=1.0 + i, support=(2, 9, 4) if i % 2 else ())
        for i, (name, rows) in enumerate(layout)
    ]  # fmt: skip
    after = logits.clone()
    for records in average_gangs(after, gangs):
        records.write()
    for i, (name, rows) in enumerate(layout):
        alone = average(logits[rows][None])
        mean = alone.scores.mean_log_probs[0]
        scores = mean
        if RULES[i].penalised:
            scores = penalise(mean + mean_log_normaliser(logits[rows]), RULES[i], prompt, output)
        token = int(choose_token(scores, RULES[i], i))
        expected = torch.full((V,), -torch.inf)
        expected[token] = 0.0
        assert all(torch.equal(after[row], expected) for row in rows)
        table = files[name].read(i + 1, start=i)
        record = alone.record(torch.tensor([token]))[0]
        calibrated = calibrated_log_prob(mean, token, 1.0 + i, (2, 9, 4) if i % 2 else ())
        assert table.token_id.tolist() == [token]
        got = [table.log_prob, table.total, table.aleatoric, table.epistemic, table.variation_ratio]
        assert [float(column[0]) for column in got] == record[:5]
        k = len(rows)
        assert table.member_log_probs[0].tolist() == record[5 : 5 + k]
        assert table.member_tokens[0].tolist() == record[5 + k : 5 + 2 * k]
        assert table.member_token_log_probs[0].tolist() == record[5 + 2 * k :]
        assert table.calibrated_log_prob[0] == pytest.approx(calibrated, abs=0, nan_ok=True)
        assert (table.top_tokens[0].tolist(), table.top_log_probs[0].tolist()) == tuple(x[0] for x in alone.top(i))
    assert torch.equal(after[3], logits[3]), "a row of no gang"


def test_the_logits_to_average_may_be_others_than_those_to_force() -> None:
    raw, logits = random_logits(2), random_logits(2, seed=1)
    kept = raw.clone()
    token = int(average(raw[None]).scores.mean_log_probs.argmax())
    assert token != int(average(logits[None]).scores.mean_log_probs.argmax())
    average_gangs(logits, [gang("g", [0, 1])], raw)
    assert logits.argmax(-1).tolist() == [token, token] and torch.equal(raw, kept)


def test_half_precision_logits() -> None:
    logits = random_logits(2).bfloat16()
    token = int(average(logits[None]).scores.mean_log_probs.argmax())
    average_gangs(logits, [gang("g", [0, 1])])
    assert logits[:, token].tolist() == [0, 0] and logits.isneginf().sum() == 2 * (V - 1)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("broken", [torch.nan, -torch.inf, torch.inf])
def test_a_gang_without_a_distribution_keeps_its_rows_and_has_no_record(
    tmp_path: Path, rule: ChoiceRule, broken: float, caplog: pytest.LogCaptureFixture
) -> None:
    files = [StepStats.create(tmp_path / name, 2, 1) for name in ("bad", "good")]
    logits = random_logits(4)
    logits[1, 5 if broken == torch.inf else slice(None)] = broken
    after = logits.clone()
    gangs = [gang("bad", [0, 1], files[0].path, rule), gang("good", [2, 3], files[1].path, rule)]
    [records] = average_gangs(after, gangs)
    records.write()
    assert torch.equal(after[:2].nan_to_num(7.0), logits[:2].nan_to_num(7.0)), "untouched"
    assert after[2:].isneginf().sum() == 2 * (V - 1)
    assert [file.read(1).missing.size for file in files] == [1, 0]
    assert [record.message for record in caplog.records] == [
        "1 gangs have logits that are no distribution in this step"
    ]


@pytest.mark.parametrize("rule", RULES)
def test_nothing_is_read_back_from_the_device(rule: ChoiceRule) -> None:
    """Meta tensors have no values: whatever would wait for a device's value raises here."""
    logits = torch.empty(5, V, device="meta")
    tokens = torch.empty(6, dtype=torch.int32, device="meta")
    constrained = gang(
        "b", [2, 3], rule=rule, prompt=[1, 2], output=[3], num_top=2, support=(3, 4), raw=torch.empty(V, device="meta")
    )
    average_gangs(logits, [gang("a", [0, 1], rule=rule, prompt=tokens[:4], output=tokens[4:]), constrained])
    with pytest.raises(RuntimeError, match="meta"):
        logits[torch.zeros((), dtype=torch.int64, device="meta")]  # the trap that choose_token avoids


class Copy:
    """Stands for a copy to pinned memory: the host buffer is garbage until the event has been waited for."""

    def __init__(self) -> None:
        self.waited = 0
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def __call__(self, columns: Tensor) -> tuple[Tensor, Any]:
        host = torch.full_like(columns, -9.0)
        self._pairs.append((host, columns.clone()))
        return host, self

    def synchronize(self) -> None:
        self.waited += 1
        for host, columns in self._pairs:
            host.copy_(columns)


def test_records_on_a_device_wait_in_the_queue_and_are_written_after_their_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [StepStats.create(tmp_path / name, k, 1) for name, k in (("a", 2), ("b", 1))]
    gangs = [gang("a", [0, 1], files[0].path), gang("b", [2], files[1].path)]
    queue, copy, logits = RecordQueue(), Copy(), random_logits(3)
    monkeypatch.setattr(gang_step, "copy_to_host", copy)
    for records in average_gangs(logits, gangs):
        queue.put(records)
    assert copy.waited == 0 and [file.read(1).missing.size for file in files] == [1, 1]
    waiting = queue.take()
    assert len(waiting) == 2 and queue.take() == []
    for records in waiting:
        records.write()
    assert copy.waited == 2
    assert [int(file.read(1).token_id[0]) for file in files] == [int(logits[0].argmax()), int(logits[2].argmax())]


def test_records_on_the_host_are_written_at_once(tmp_path: Path) -> None:
    file, queue = StepStats.create(tmp_path / "a", 2, 1), RecordQueue()
    for records in average_gangs(random_logits(2), [gang("a", [0, 1], file.path)]):
        queue.put(records)
    assert queue.take() == [] and not file.read(1).missing.size


def test_an_asynchronous_output_writes_its_records_once_before_it_gives_its_tokens() -> None:
    happened: list[str] = []

    class Output:
        def get_output(self) -> str:
            happened.append("tokens")
            return "tokens"

    gang_step.write_before_output(Output)
    gang_step.write_before_output(Output)
    output, plain = Output(), SimpleNamespace(tokens=[1])
    records: Any = [SimpleNamespace(write=lambda name=name: happened.append(name)) for name in "ab"]
    attach(output, records)
    assert happened == [] and output.get_output() == "tokens" == output.get_output()
    assert happened == ["a", "b", "tokens", "tokens"]
    attach(plain, records)
    assert happened[4:] == ["a", "b"]
    attach(Output(), [])
    with pytest.raises(RuntimeError, match="SimpleNamespace has no get_output"):
        gang_step.write_before_output(SimpleNamespace)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rule", RULES)
def test_on_a_gpu_tokens_and_records_are_those_of_the_cpu_and_nothing_waits(rule: ChoiceRule, tmp_path: Path) -> None:
    files = [StepStats.create(tmp_path / name, 3, 1, 2) for name in ("cpu", "cuda")]
    logits = random_logits(3)
    rows = []
    for device, file in zip(("cpu", "cuda"), files, strict=True):
        here = logits.to(device)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            parts = average_gangs(here, [gang("g", [0, 1, 2], file.path, rule, prompt=[1], output=[2], num_top=2)])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for part in parts:
            assert part.on_host == (device == "cpu")
            part.write()
        rows.append((here.cpu(), file.read(1)))
    (on_cpu, cpu), (on_gpu, cuda) = rows
    assert torch.equal(on_cpu, on_gpu) and cpu.token_id.tolist() == cuda.token_id.tolist()
    assert cpu.top_tokens.tolist() == cuda.top_tokens.tolist()
    for name in ("log_prob", "total", "epistemic", "variation_ratio", "calibrated_log_prob", "member_log_probs"):
        assert getattr(cpu, name) == pytest.approx(getattr(cuda, name), abs=1e-5)

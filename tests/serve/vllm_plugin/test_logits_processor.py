"""credence.serve.vllm_plugin.logits_processor: the persistent batch, which gangs are averaged, records, and who may form a gang."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from credence.serve.step_stats import StepStats
from credence.serve.vllm_plugin.averaging import ChoiceRule, average, choose_token

pytestmark = pytest.mark.filterwarnings("ignore")
V = 29


def processor() -> Any:
    from credence.serve.vllm_plugin.logits_processor import EnsembleLogitsProcessor

    return EnsembleLogitsProcessor(None, torch.device("cpu"), False)


def params(
    gang: str | None = None,
    k: int = 2,
    member: int = 0,
    seed: int = 0,
    stats: str = "",
    top: int = 0,
    targets: list[list[int]] | None = None,
    **sampling: Any,
) -> Any:
    from vllm import SamplingParams

    extra = {
        "credence_gang": gang, "credence_k": k, "credence_member": member, "credence_seed": seed, "credence_stats": stats,
        "credence_temperature": 1.0, "credence_support": [], "credence_top": top, "credence_targets": targets or [],
        "credence_token": "secret",
    }  # fmt: skip
    return SamplingParams(**{"temperature": 0.0, **sampling}, extra_args=None if gang is None else extra)


def add(target: Any, rows: dict[int, Any], outputs: dict[int, list[int]] | None = None) -> dict[int, list[int]]:
    """Adds requests to an empty batch and returns their output lists."""
    from vllm.v1.sample.logits_processor import BatchUpdate

    lists = outputs or {index: [] for index in rows}
    added = [(index, request, [5, 6], lists[index]) for index, request in rows.items()]
    target.update_state(BatchUpdate(batch_size=len(rows), removed=[], added=added, moved=[]))
    return lists


def remove(target: Any, *rows: int) -> None:
    from vllm.v1.sample.logits_processor import BatchUpdate

    target.update_state(BatchUpdate(batch_size=0, removed=list(rows), added=[], moved=[]))


def random_logits(rows: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


def forced_token(row: Tensor) -> int:
    assert row.isneginf().sum() == V - 1 and row.max() == 0
    return int(row.argmax())


def test_a_complete_gang_gets_one_token_and_a_record_and_others_are_untouched(tmp_path: Path) -> None:
    path = tmp_path / "gang"
    stats = StepStats.create(path, 3, 8)
    target, logits = processor(), random_logits(5)
    # Rows in disorder, with plain requests between them.
    outputs = add(target, {0: params("g", 3, 2, stats=str(path)), 1: params(), 2: params("g", 3, 0, stats=str(path)),
                           3: params("g", 3, 1, stats=str(path)), 4: params(temperature=0.7)})  # fmt: skip
    expected = average(logits[[2, 3, 0]][None])
    before = logits.clone()
    after = target.apply(logits)
    token = int(expected.scores.mean_log_probs.argmax())
    assert [forced_token(after[row]) for row in (0, 2, 3)] == [token] * 3
    assert torch.equal(after[[1, 4]], before[[1, 4]])
    table = stats.read(1)
    assert table.token_id.tolist() == [token]
    assert table.log_prob[0] == pytest.approx(float(expected.scores.mean_log_probs[0, token]))
    assert table.member_log_probs[0].tolist() == expected.member_log_probs[0, :, token].tolist()
    assert table.total[0] == pytest.approx(table.aleatoric[0] + table.epistemic[0], abs=1e-12)
    for row in (0, 2, 3):
        outputs[row].append(-1)  # async scheduling: a placeholder counts as a token
    target.apply(random_logits(5, seed=1))
    assert stats.read(3).missing.tolist() == [2]


def test_sampling_uses_the_gangs_own_rule_and_step() -> None:
    target = processor()
    sampling = {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.01}
    outputs = add(target, {row: params("g", 2, row, seed=77, **sampling) for row in range(2)})
    for step in range(20):
        logits = random_logits(2, seed=step)
        mean = average(logits[None]).scores.mean_log_probs[0]
        expected = int(choose_token(mean, ChoiceRule(seed=77, **sampling), step))
        after = target.apply(logits)
        assert forced_token(after[0]) == forced_token(after[1]) == expected
        for output in outputs.values():
            output.append(expected)


def test_frequency_penalty_applies_to_the_average() -> None:
    target = processor()
    outputs = add(target, {row: params("g", 2, row, frequency_penalty=2.0) for row in range(2)})
    tokens = []
    for _ in range(4):
        tokens.append(forced_token(target.apply(torch.linspace(0, 3, V).repeat(2, 1))[0]))
        for output in outputs.values():
            output.append(tokens[-1])
    assert len(set(tokens)) == 4


def test_gangs_of_one_step_record_as_many_top_tokens_as_each_wants(tmp_path: Path) -> None:
    wanted = {"a": 3, "b": 0, "c": 1}
    files = {name: StepStats.create(tmp_path / name, 2, 4, top) for name, top in wanted.items()}
    target, logits = processor(), random_logits(6)
    names = [name for name in wanted for _ in range(2)]
    add(target, {i: params(name, 2, i % 2, stats=files[name].path, top=wanted[name]) for i, name in enumerate(names)})
    mean = average(logits.clone().view(3, 2, V)).scores.mean_log_probs
    target.apply(logits)
    for position, (name, top) in enumerate(wanted.items()):
        table = files[name].read(1)
        values, tokens = mean[position].topk(top)
        assert not table.missing.size
        assert table.top_tokens[0].tolist() == tokens.tolist()
        assert table.top_log_probs[0].tolist() == pytest.approx(values.tolist())


def test_scoring_gangs_are_left_alone(tmp_path: Path) -> None:
    stats = StepStats.create(tmp_path / "gang", 2, 1)
    target, logits = processor(), random_logits(4)
    rows = {i: params("scored", 2, i, stats=stats.path, targets=[[0, 1]], max_tokens=1) for i in range(2)}
    add(target, {**rows, **{i + 2: params("decoded", 2, i) for i in range(2)}})
    after = target.apply(logits.clone())
    assert torch.equal(after[:2], logits[:2]) and stats.read(1).missing.tolist() == [0]
    assert forced_token(after[2]) == forced_token(after[3])


def constrain(target: Any, logits: Tensor, row: int, change: Any) -> Tensor:
    """What vLLM does between the forward pass and our processor: the raw logits are seen, then one row is changed in place."""
    target.keep_raw_rows(logits)
    change(logits[row])
    target.keep_raw_rows(logits)  # the second hook of the step must not see the changed row
    after: Tensor = target.apply(logits)
    target.drop_raw_rows()
    return after


def test_a_constraint_of_the_leader_acts_on_the_average_and_not_on_the_scores(tmp_path: Path) -> None:
    stats = StepStats.create(tmp_path / "gang", 3, 4, 2)
    target = processor()
    outputs = add(target, {row: params("g", 3, 2 - row, stats=stats.path, top=2, **({"logit_bias": {7: 2.5}} if row == 2 else {}))
                           for row in range(3)})  # fmt: skip
    for step in range(2):
        logits = random_logits(3, seed=step)
        mean = average(logits[[2, 1, 0]][None]).scores.mean_log_probs[0]
        allowed = torch.full((V,), -torch.inf)
        allowed[[3, 7, 11]] = 0.0
        allowed[7] = 2.5
        expected = int((mean + allowed).argmax())
        assert expected != int(mean.argmax())

        def change(row: Tensor) -> None:
            row[7] += 2.5
            kept = row[[3, 7, 11]].clone()
            row[:] = -torch.inf
            row[[3, 7, 11]] = kept

        after = constrain(target, logits, 2, change)
        assert [forced_token(after[row]) for row in range(3)] == [expected] * 3
        table = stats.read(step + 1, start=step)
        assert table.token_id.tolist() == [expected]
        assert table.log_prob[0] == pytest.approx(float(mean[expected]))
        assert table.top_tokens[0].tolist() == mean.topk(2).indices.tolist()
        for output in outputs.values():
            output.append(expected)


def test_a_gang_that_may_say_nothing_is_left_alone_and_unrecorded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stats = StepStats.create(tmp_path / "gang", 2, 4)
    target, logits = processor(), random_logits(4)
    rows = {i: params("g", 2, i, stats=stats.path, **({"allowed_token_ids": [1]} if i == 0 else {})) for i in range(2)}
    add(target, {**rows, 2: params("good", 2, 0), 3: params("good", 2, 1)})
    before = logits.clone()
    after = constrain(target, logits, 0, lambda row: row.fill_(-torch.inf))
    assert torch.equal(after[1], before[1]) and stats.read(4).missing.size == 4
    assert forced_token(after[2]) == forced_token(after[3])
    assert "1 gangs have logits that are no distribution" in caplog.text


@pytest.mark.parametrize(
    "constraint",
    [
        {"logit_bias": {3: 1.0}},
        {"allowed_token_ids": [3]},
        {"bad_words": ["w"]},
        {"min_tokens": 2},
        {"structured_outputs": "choice"},
    ],
    ids=lambda constraint: next(iter(constraint)),
)
def test_the_raw_row_is_kept_for_every_kind_of_constraint(secret: str, constraint: dict[str, Any]) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    if "structured_outputs" in constraint:
        constraint = {"structured_outputs": StructuredOutputsParams(choice=["a"])}
    target, logits = processor(), random_logits(3)
    leader = params("g", 2, 0, **constraint)
    add(target, {0: params("g", 2, 1), 1: leader, 2: params(**constraint)})
    target.keep_raw_rows(logits)
    assert list(target._raw) == [1] and torch.equal(target._raw[1], logits[1])
    logits[1] += 1
    assert not torch.equal(target._raw[1], logits[1])
    target.drop_raw_rows()
    assert target._raw is None
    validate(leader)
    with pytest.raises(ValueError, match="member 1 of a gang carries a constraint .*; only member 0 may"):
        validate(params("g", 2, 1, **constraint))


def test_the_hooks_see_the_logits_before_the_grammar_and_forget_them_after_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from types import SimpleNamespace

    from vllm.v1.worker import gpu_model_runner

    from credence.serve.vllm_plugin.logits_processor import install_hooks

    def mask(scheduler_output: Any, grammar_output: Any, input_batch: Any, logits: Tensor) -> None:
        logits[0, 1:] = -torch.inf

    def sample(self: Any, logits: Tensor, metadata: Any) -> Tensor:
        if self.fails:
            raise RuntimeError("the sampler failed")
        return target.apply(logits)

    monkeypatch.setattr(gpu_model_runner, "apply_grammar_bitmask", mask)
    monkeypatch.setattr(gpu_model_runner.GPUModelRunner, "_sample", sample)
    install_hooks()
    install_hooks()
    target, logits = processor(), random_logits(2)
    target.discarded = None
    from vllm.sampling_params import StructuredOutputsParams

    structured = {"structured_outputs": StructuredOutputsParams(choice=["a"])}
    add(target, {0: params("g", 2, 0, **structured), 1: params("g", 2, 1)})
    batch = SimpleNamespace(logitsprocs=SimpleNamespace(non_argmax_invariant=[target]), num_reqs=2)
    runner = SimpleNamespace(input_batch=batch, discard_request_mask=SimpleNamespace(np=np.zeros(4, bool)), fails=False)
    raw = logits[0].clone()
    gpu_model_runner.apply_grammar_bitmask(None, None, batch, logits)
    assert torch.equal(target._raw[0], raw) and logits[0, 1:].isneginf().all()
    after = gpu_model_runner.GPUModelRunner._sample(runner, logits, None)
    assert forced_token(after[0]) == forced_token(after[1]) == 0
    assert target._raw is None and target.discarded.tolist() == [False, False]
    runner.fails = True
    with pytest.raises(RuntimeError):
        gpu_model_runner.GPUModelRunner._sample(runner, random_logits(2), None)
    assert target._raw is None


def test_records_that_are_still_on_the_device_are_written_before_the_tokens_leave_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asynchronous scheduling: sample_tokens returns at once, and vLLM asks its output for the tokens later, in another thread."""
    from types import SimpleNamespace

    from vllm.v1.worker import gpu_model_runner

    from credence.serve.vllm_plugin import gang_step
    from credence.serve.vllm_plugin.logits_processor import install_hooks

    class Output:
        def get_output(self) -> int:
            return len(stats.read(1).missing)

    def sample_tokens(self: Any, grammar_output: Any) -> Output:
        target.apply(random_logits(2))
        return Output()

    stats, waited = StepStats.create(tmp_path / "g", 2, 1), []
    copied = SimpleNamespace(synchronize=lambda: waited.append(True))
    monkeypatch.setattr(gang_step, "copy_to_host", lambda columns: (columns, copied))
    monkeypatch.setattr(gpu_model_runner, "AsyncGPUModelRunnerOutput", Output)
    monkeypatch.setattr(gpu_model_runner, "apply_grammar_bitmask", lambda *_: None)
    monkeypatch.setattr(gpu_model_runner.GPUModelRunner, "_sample", lambda *_: None)
    monkeypatch.setattr(gpu_model_runner.GPUModelRunner, "sample_tokens", sample_tokens)
    install_hooks()
    target = processor()
    add(target, {row: params("g", 2, row, stats=stats.path) for row in range(2)})
    runner = SimpleNamespace(input_batch=SimpleNamespace(logitsprocs=SimpleNamespace(non_argmax_invariant=[target])))
    output = gpu_model_runner.GPUModelRunner.sample_tokens(runner, None)
    assert not waited and stats.read(1).missing.size == 1
    assert output.get_output() == 0 and waited == [True]


def test_a_gang_of_one() -> None:
    target, logits = processor(), random_logits(1)
    add(target, {0: params("g", 1, 0)})
    token = int(logits.argmax())
    assert forced_token(target.apply(logits)[0]) == token


def test_incomplete_or_uneven_gangs_are_neither_averaged_nor_recorded(tmp_path: Path) -> None:
    path = tmp_path / "gang"
    stats = StepStats.create(path, 3, 8)
    members = [params("g", 3, m, stats=str(path)) for m in range(3)]
    cases: list[tuple[dict[int, Any], dict[int, list[int]]]] = [
        ({0: members[0], 1: members[1]}, {0: [], 1: []}),
        ({0: members[0], 1: members[1], 2: members[2]}, {0: [], 1: [4], 2: []}),
        ({0: members[0], 1: members[1], 2: members[1]}, {0: [], 1: [], 2: []}),
        ({0: members[0], 1: members[1], 2: members[2], 3: members[2]}, {0: [], 1: [], 2: [], 3: []}),
    ]
    for rows, outputs in cases:
        target, logits = processor(), random_logits(4)
        add(target, rows, outputs)
        assert torch.equal(target.apply(logits.clone()), logits)
    assert stats.read(8).missing.tolist() == list(range(8))


def test_rows_whose_token_is_thrown_away_stop_the_gang_for_this_step(tmp_path: Path) -> None:
    """One member at the end of its prompt, the other still in it: equal (empty) outputs, but no common step."""
    path = tmp_path / "gang"
    stats = StepStats.create(path, 2, 8)
    target, logits = processor(), random_logits(3)
    add(target, {0: params("g", 2, 0, stats=str(path)), 2: params("g", 2, 1, stats=str(path))})
    target.discarded = np.array([False, False, True])
    assert torch.equal(target.apply(logits.clone()), logits) and stats.read(1).missing.tolist() == [0]
    target.discarded = np.array([False, True, False])
    forced_token(target.apply(logits)[0])
    assert not stats.read(1).missing.size


def test_logits_that_are_no_distribution_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "bad"
    stats = StepStats.create(path, 2, 8)
    for broken in (torch.nan, -torch.inf):
        target, logits = processor(), random_logits(4)
        rows = {0: params("bad", 2, 0, stats=str(path)), 1: params("bad", 2, 1, stats=str(path))}
        add(target, {**rows, 2: params("good", 2, 0), 3: params("good", 2, 1)})
        logits[1] = broken
        after = target.apply(logits)
        assert not after[0].isinf().any() and torch.isfinite(after[0]).all()
        assert forced_token(after[2]) == forced_token(after[3])
    assert stats.read(8).missing.size == 8
    assert "no distribution" in caplog.text


def test_a_vanished_statistics_file_is_said_once_and_hurts_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = processor()
    outputs = add(target, {row: params("g", 2, row, stats=str(tmp_path / "gone")) for row in range(2)})
    for step in range(3):
        assert forced_token(target.apply(random_logits(2, seed=step))[0]) >= 0
        for output in outputs.values():
            output.append(1)
    assert [record.message for record in caplog.records] == [
        f"no statistics for gang g: [Errno 2] cannot open the statistics file (No such file or directory): '{tmp_path / 'gone'}'"
    ]


def test_more_steps_than_the_file_has_do_not_stop_the_engine(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stats = StepStats.create(tmp_path / "gang", 1, 1)
    target = processor()
    outputs = add(target, {0: params("g", 1, 0, stats=str(stats.path))})
    for _ in range(3):
        target.apply(random_logits(1))
        outputs[0].append(1)
    assert len(caplog.records) == 1 and "step 1 is outside the 0..0" in caplog.text
    assert not stats.read(1).missing.size


def test_no_file_stays_open_and_a_resumed_gang_goes_on_in_its_file(tmp_path: Path) -> None:
    stats = StepStats.create(tmp_path / "gang", 2, 4)
    target = processor()
    rows = {row: params("g", 2, row, stats=stats.path) for row in range(2)}
    outputs = add(target, rows)
    target.apply(random_logits(2))
    held = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if name.isdigit()
            if os.path.exists(f"/proc/self/fd/{name}")]  # fmt: skip
    assert held.count(stats.path) == 1, "the reader's own descriptor, and none of the worker's"
    remove(target, 0, 1)
    assert target._rows == {}
    for output in outputs.values():
        output.append(3)
    # Resumed after preemption: the output is recomputed as part of the prompt, the step goes on where it was.
    add(target, rows, outputs)
    target.apply(random_logits(2))
    assert stats.read(3).missing.tolist() == [2]


@pytest.mark.parametrize("seed", range(6))
def test_update_state_follows_vllms_persistent_batch(seed: int) -> None:
    """Random adds, removals, preemptions, condensations and swaps on vLLM's own InputBatch, against the list of its request ids."""
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

    chance = random.Random(seed)
    target = processor()
    batch = InputBatch(
        max_num_reqs=24, max_model_len=64, max_num_batched_tokens=64, device=torch.device("cpu"), vocab_size=V,
        block_sizes=[16], max_num_blocks_per_req=[4], logitsprocs=LogitsProcessors([target]),
    )  # fmt: skip
    waiting: list[Any] = []
    owners: dict[str, tuple[str, int, int] | None] = {}
    averaged = 0
    for step in range(120):
        if chance.random() < 0.4:
            k = chance.choice([1, 2, 3, 5])
            for member in range(k):
                waiting.append(_state(CachedRequestState, f"{step}-{member}", params(f"g{step}", k, member)))
                owners[f"{step}-{member}"] = (f"g{step}", k, member)
        elif chance.random() < 0.6:
            waiting.append(_state(CachedRequestState, f"p{step}", params()))
            owners[f"p{step}"] = None
        running = [name for name in batch.req_ids if name]
        for name in chance.sample(running, min(len(running), chance.choice([0, 0, 1, 2, 4]))):
            state = batch.credence_states[name]
            batch.remove_request(name)
            if chance.random() < 0.4:
                waiting.append(state)  # preempted: comes back with its output
        chance.shuffle(waiting)
        for _ in range(chance.choice([0, 1, 3, 6])):
            if waiting and batch.num_reqs < 20:
                state = waiting.pop()
                batch.credence_states = {**getattr(batch, "credence_states", {}), state.req_id: state}
                batch.add_request(state)
        batch.condense()
        for _ in range(chance.choice([0, 0, 1, 3])):
            if batch.num_reqs >= 2:
                batch.swap_states(*chance.sample(range(batch.num_reqs), 2))
        batch.refresh_metadata()

        expected = {row: owners[name] for row, name in enumerate(batch.req_ids) if owners[name] is not None}
        found = {row: (r.member.gang, r.member.num_samples, r.member.index) for row, r in target._rows.items()}
        assert found == expected
        assert all(r.output is batch.req_output_token_ids[row] for row, r in target._rows.items())

        logits = random_logits(batch.num_reqs, seed=step)
        after = target.apply(logits.clone())
        gangs: dict[str, dict[int, int]] = {}
        for row, owner in expected.items():
            assert owner is not None
            gangs.setdefault(owner[0], {})[owner[2]] = row
        changed = set()
        for name, members in gangs.items():
            size = next(owner[1] for owner in expected.values() if owner is not None and owner[0] == name)
            lengths = {len(target._rows[row].output) for row in members.values()}
            if len(members) == size and len(lengths) == 1:
                rows = [members[index] for index in range(size)]
                token = int(average(logits[rows][None]).scores.mean_log_probs.argmax())
                assert {forced_token(after[row]) for row in rows} == {token}
                changed.update(rows)
                averaged += 1
        untouched = [row for row in range(batch.num_reqs) if row not in changed]
        assert torch.equal(after[untouched], logits[untouched])
        for name in batch.req_ids:
            if chance.random() < 0.9:
                batch.credence_states[name].output_token_ids.append(chance.choice([-1, 3]))
    assert averaged > 20


def _state(kind: Any, name: str, sampling: Any) -> Any:
    return kind(
        req_id=name, prompt_token_ids=[1, 2, 3], mm_features=[], sampling_params=sampling, generator=None,
        block_ids=([],), num_computed_tokens=0, output_token_ids=[],
    )  # fmt: skip


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CREDENCE_PLUGIN_TOKEN", "secret")
    return "secret"


def validate(sampling: Any) -> None:
    from credence.serve.vllm_plugin.logits_processor import EnsembleLogitsProcessor

    EnsembleLogitsProcessor.validate_params(sampling)


def test_the_servers_own_members_and_ordinary_requests_are_accepted(secret: str) -> None:
    from vllm import SamplingParams

    validate(params("g", 4, 3, seed=2**64 - 1, stats="/dev/shm/x"))
    validate(SamplingParams())
    validate(SamplingParams(extra_args={"anything": 1}))


@pytest.mark.parametrize("token", ["wrong", "", None, 7, "sécret", "secret "])
def test_reserved_keys_without_the_servers_token_are_refused(secret: str, token: Any) -> None:
    from vllm import SamplingParams

    forged = params("g")
    forged.extra_args["credence_token"] = token
    with pytest.raises(ValueError, match="reserved for the server"):
        validate(forged)
    del forged.extra_args["credence_token"]
    with pytest.raises(ValueError, match="reserved for the server"):
        validate(forged)
    with pytest.raises(ValueError, match="reserved for the server"):
        validate(SamplingParams(extra_args={"credence_anything": 1}))


@pytest.mark.parametrize("value", [None, ""])
def test_without_a_configured_token_nobody_may_use_the_keys(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("CREDENCE_PLUGIN_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("CREDENCE_PLUGIN_TOKEN", value)
    forged = params("g")
    forged.extra_args["credence_token"] = ""
    with pytest.raises(ValueError, match="reserved"):
        validate(forged)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("gang", "", "non-empty string"),
        ("gang", 3, "non-empty string"),
        ("k", 0, "below credence_k"),
        ("k", 2.0, "integer"),
        ("k", True, "integer"),
        ("member", 2, "below credence_k"),
        ("member", -1, "integer in 0"),
        ("seed", 2**64, "integer in 0"),
        ("seed", None, "integer in 0"),
        ("stats", "relative/path", "absolute path"),
        ("stats", None, "absolute path"),
        ("top", -1, "integer in 0"),
        ("top", 1001, "credence_top must be an integer in 0..1000"),
        ("top", 2.0, "integer in 0"),
        ("targets", None, r"list of \[position, token\] pairs"),
        ("targets", [[1, 2, 3]], "pairs"),
        ("targets", [3], "pairs"),
        ("targets", [[0, -1]], "pairs"),
        ("targets", [[0, True]], "pairs"),
        ("targets", [[4, 1], [3, 1]], "by ascending position"),
        ("colour", 1, "exactly the keys"),
    ],
)
def test_malformed_members_are_refused(secret: str, key: str, value: Any, message: str) -> None:
    request = params("g")
    request.extra_args[f"credence_{key}"] = value
    with pytest.raises(ValueError, match=message):
        validate(request)


def test_a_scoring_gang_generates_one_token(secret: str) -> None:
    validate(params("g", targets=[[0, 5], [0, 6], (7, 1)], max_tokens=1))
    with pytest.raises(ValueError, match="a scoring gang has max_tokens = 1, got 16"):
        validate(params("g", targets=[[0, 5]]))


def test_missing_keys_and_several_completions_are_refused(secret: str) -> None:
    request = params("g")
    del request.extra_args["credence_seed"]
    with pytest.raises(ValueError, match="exactly the keys"):
        validate(request)
    with pytest.raises(ValueError, match="n = 1, got n = 2"):
        validate(params("g", n=2, temperature=1.0))

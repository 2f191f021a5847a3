"""credence.serve.vllm_plugin.scoring: teacher-forced records against transformers + PEFT, and every way a record must not appear."""

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from credence.serve.step_stats import StepStats, StepTable
from credence.serve.vllm_plugin import scoring
from credence.serve.vllm_plugin.scoring import Scorer
from tests.serve.vllm_plugin.conftest import (
    CHUNK,
    VOCABULARY,
    Engine,
    Reference,
    gang_members,
    generate,
    model_runner,
    prompt,
)

pytestmark = pytest.mark.filterwarnings("ignore")

SUPPORT, TEMPERATURE = [3, 9, 27, 81], 1.7


def check(
    table: StepTable,
    log_probs_KTV: Tensor,
    targets: list[list[int]],
    tolerance: float = 1e-4,
    temperature: float = TEMPERATURE,
    support: list[int] = SUPPORT,
) -> None:
    """Compares records with the definitions, in float64: p = mean_k p_k, total H[p], aleatoric mean_k H[p_k]."""
    assert table.token_id.tolist() == [token for _, token in targets]
    for row, (position, token) in enumerate(targets):
        members = log_probs_KTV[:, position].double().exp()
        mean = members.mean(0)
        total = float(-torch.xlogy(mean, mean).sum())
        aleatoric = float(-torch.xlogy(members, members).sum(-1).mean())
        votes = members.argmax(-1) != mean.argmax()
        assert table.log_prob[row] == pytest.approx(float(mean[token].log()), abs=tolerance)
        assert table.total[row] == pytest.approx(total, abs=tolerance)
        assert table.aleatoric[row] == pytest.approx(aleatoric, abs=tolerance)
        assert table.epistemic[row] == pytest.approx(total - aleatoric, abs=tolerance)
        assert table.variation_ratio[row] == pytest.approx(float(votes.double().mean()))
        assert table.member_log_probs[row].tolist() == pytest.approx(members[:, token].log().tolist(), abs=tolerance)
        favourite = members.gather(1, torch.from_numpy(table.member_tokens[row])[:, None])[:, 0]
        assert favourite.log().tolist() == pytest.approx(members.max(-1).values.log().tolist(), abs=tolerance)
        assert table.member_token_log_probs[row].tolist() == pytest.approx(favourite.log().tolist(), abs=tolerance)
        if token in support:
            tempered = mean[support] ** (1 / temperature)
            expected = float((tempered[support.index(token)] / tempered.sum()).log())
            assert table.calibrated_log_prob[row] == pytest.approx(expected, abs=tolerance)
        else:
            assert math.isnan(table.calibrated_log_prob[row])
        num_top = table.top_tokens.shape[1]
        assert table.top_log_probs[row].tolist() == pytest.approx(
            mean.sort(descending=True).values[:num_top].log().tolist(), abs=tolerance
        )
        found = mean[torch.from_numpy(table.top_tokens[row])].log().tolist()
        assert found == pytest.approx(table.top_log_probs[row].tolist(), abs=tolerance)
        assert len(set(table.top_tokens[row].tolist())) == num_top


def spread_targets(length: int) -> list[list[int]]:
    """Positions at the ends of the chunks, apart, repeated, and the last one; tokens inside and outside the support."""
    positions = [5, 6, 6, 6, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 1, 2 * CHUNK + 1, length - 1, length - 1]
    return [[p, (SUPPORT * 3)[i] if i % 3 else 40 + i] for i, p in enumerate(positions)]


def score(
    engine: Engine,
    tokens: list[int],
    targets: list[list[int]],
    k: int,
    stats_path: str,
    name: str,
    loras: list[Any] | None = None,
    top: int = 5,
    beside: tuple[list[list[int]], list[Any], list[Any]] = ([], [], []),
) -> tuple[StepTable, list[Any]]:
    """Runs a scoring gang (with other requests beside it) and returns its records and outputs."""
    parameters, fresh = gang_members(
        engine.artifact, k, name, stats_path, top=top, targets=targets, calibration=(TEMPERATURE, SUPPORT), max_tokens=1
    )
    with StepStats.create(stats_path, k, len(targets), top) as stats:
        outputs = generate(
            engine, [*[tokens] * k, *beside[0]], [*parameters, *beside[1]], [*(loras or fresh), *beside[2]]
        )
        table = stats.read(len(targets))
    Path(stats_path).unlink()
    assert len(model_runner(engine).credence_scorer) <= 1
    return table, outputs


@pytest.mark.engine
@pytest.mark.parametrize("k", [1, 2, 4])
def test_scores_are_those_of_transformers_and_peft(
    engine: Engine, references: list[Reference], stats_path: str, k: int
) -> None:
    tokens = prompt(2 * CHUNK + 7, 300 + k)
    targets = spread_targets(len(tokens))
    table, outputs = score(engine, tokens, targets, k, stats_path, f"cold{k}")
    expected = torch.stack([model.log_probs(tokens) for model in references[:k]])
    check(table, expected, targets)
    assert all(len(output.outputs[0].token_ids) == 1 for output in outputs)
    if k > 1:
        assert table.epistemic.max() > 0.05, "the samples agree: the comparison proves nothing"


@pytest.mark.engine
@pytest.mark.parametrize("k", [1, 4])
def test_a_warm_prefix_cache_shortens_the_work_and_changes_nothing(
    engine: Engine, references: list[Reference], stats_path: str, k: int
) -> None:
    """The cache holds the whole prompt of every member; what lies before the first target is read from it, the rest is computed."""
    from vllm import SamplingParams

    tokens = prompt(3 * CHUNK + 9, 310 + k)
    targets = [[p, p % VOCABULARY] for p in (CHUNK + 3, CHUNK + 3, 2 * CHUNK + 5, len(tokens) - 1)]
    _, loras = gang_members(engine.artifact, k, "", "")
    generate(engine, [tokens] * k, SamplingParams(max_tokens=1, temperature=0), loras)
    expected = torch.stack([model.log_probs(tokens) for model in references[:k]])
    for attempt in ("first", "again"):
        table, outputs = score(engine, tokens, targets, k, stats_path, f"warm{k}{attempt}", loras)
        check(table, expected, targets)
        assert {output.num_cached_tokens for output in outputs} == {CHUNK}
    late = [[len(tokens) - 1, 7]]
    table, outputs = score(engine, tokens, late, k, stats_path, f"late{k}", loras)
    check(table, expected, late)
    assert {output.num_cached_tokens for output in outputs} == {3 * CHUNK}
    early = [[0, 7], [2, 9]]
    table, outputs = score(engine, tokens, early, k, stats_path, f"early{k}", loras)
    check(table, expected, early)
    assert {output.num_cached_tokens for output in outputs} == {0}


@pytest.mark.engine
def test_scoring_beside_a_decoding_gang_and_plain_requests(
    engine: Engine, references: list[Reference], stats_path: str, tmp_path: Path
) -> None:
    from vllm import SamplingParams

    tokens, other = prompt(2 * CHUNK, 320), prompt(9, 321)
    targets = [[p, tokens[p + 1]] for p in range(CHUNK - 4, len(tokens) - 1)]
    plain = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    decoding, loras = gang_members(engine.artifact, 2, "decodes", str(tmp_path / "decodes"), max_tokens=8)
    with StepStats.create(tmp_path / "decodes", 2, 8) as stats:
        alone = [
            list(o.outputs[0].token_ids) for o in generate(engine, [other] * 3, [*decoding, plain], [*loras, None])
        ]
        assert not stats.read(8).missing.size
        beside = ([other] * 3, [*decoding, plain], [*loras, None])
        table, outputs = score(engine, tokens, targets, 2, stats_path, "beside", loras, beside=beside)
    check(table, torch.stack([model.log_probs(tokens) for model in references[:2]]), targets)
    assert [list(output.outputs[0].token_ids) for output in outputs[2:]] == alone


@pytest.mark.engine
def test_members_that_come_one_after_another_are_scored_too(
    engine: Engine, references: list[Reference], stats_path: str, no_gangs: None
) -> None:
    """Nothing in the collection leans on lock-step: the first member is gone when the last one arrives at its targets."""
    tokens = prompt(2 * CHUNK + 3, 330)
    targets = spread_targets(len(tokens))
    table, _ = score(engine, tokens, targets, 2, stats_path, "apart")
    check(table, torch.stack([model.log_probs(tokens) for model in references[:2]]), targets)


@pytest.mark.engine
def test_small_blocks_of_positions_give_the_same_records(
    engine: Engine, references: list[Reference], stats_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = prompt(40, 340)
    targets = [[p, (7 * p + i) % VOCABULARY] for p in range(3, 40) for i in range(1 + p % 3)]
    sizes: list[int] = []
    compute = model_runner(engine).model.compute_logits
    monkeypatch.setattr(scoring, "BLOCK_BYTES", 5 * 2 * VOCABULARY * 4 + 1)
    monkeypatch.setattr(
        model_runner(engine).model, "compute_logits", lambda rows: (sizes.append(len(rows)), compute(rows))[1]
    )
    table, _ = score(engine, tokens, targets, 2, stats_path, "blocks")
    check(table, torch.stack([model.log_probs(tokens) for model in references[:2]]), targets)
    assert sizes.count(2 * 5) == 37 // 5


@pytest.mark.engine
def test_nothing_stays_after_the_end_or_an_abort(engine: Engine, stats_path: str) -> None:
    tokens = prompt(3 * CHUNK, 350)
    targets = [[p, 5] for p in range(2, len(tokens))]
    llm, runner = engine.llm.llm_engine, model_runner(engine)
    parameters, loras = gang_members(engine.artifact, 2, "aborted", stats_path, targets=targets, max_tokens=1)
    with StepStats.create(stats_path, 2, len(targets)) as stats:
        ids = [
            llm.add_request(f"aborted-{i}", {"prompt_token_ids": tokens}, parameters[i], lora_request=loras[i])
            for i in range(2)
        ]
        for _ in range(3):
            llm.step()
        assert len(runner.credence_scorer) == 1
        llm.abort_request(ids, internal=True)
        while llm.has_unfinished_requests():
            llm.step()
        llm.engine_core.get_output()
        assert stats.read(len(targets)).missing.size == len(targets)
    assert len(runner.credence_scorer) == 0
    Path(stats_path).unlink()
    score(engine, tokens, targets, 2, stats_path, "ended")
    generate(engine, [prompt(3, 351)], gang_members(engine.artifact, 1, "x", "", max_tokens=1)[0])
    assert len(runner.credence_scorer) == 0


@pytest.mark.engine
def test_a_target_outside_the_prompt_leaves_no_record(engine: Engine, stats_path: str) -> None:
    tokens = prompt(12, 360)
    table, _ = score(engine, tokens, [[4, 5], [12, 5]], 2, stats_path, "outside")
    assert table.missing.tolist() == [0, 1]


# --- without an engine


class Runner:
    """What the scorer sees of a model runner: requests, their rows in the batch, and an output layer."""

    def __init__(self, size: int = 23, width: int = 6) -> None:
        generator = torch.Generator().manual_seed(3)
        self.head = torch.randn(width, size, generator=generator)
        self.requests: dict[str, Any] = {}
        self.lora_config: Any = None
        self.input_batch = SimpleNamespace(req_id_to_index={}, vocab_size=size)
        self.query_start_loc = SimpleNamespace(np=np.zeros(1, dtype=np.int32))
        self.model = SimpleNamespace(compute_logits=lambda rows: rows @ self.head)
        self.scorer = Scorer()

    def add(self, name: str, k: int, member: int, targets: list[list[int]], stats: str, top: int = 0) -> None:
        extra = {
            "credence_gang": name, "credence_k": k, "credence_member": member, "credence_seed": 0, "credence_stats": stats,
            "credence_temperature": 1.0, "credence_support": [], "credence_token": "", "credence_top": top,
            "credence_targets": targets,
        }  # fmt: skip
        self.requests[f"{name}.{member}"] = SimpleNamespace(
            sampling_params=SimpleNamespace(extra_args=extra), lora_request=None, num_computed_tokens=0
        )

    def step(self, **chunks: tuple[int, Tensor]) -> None:
        """One step: (start, hidden states) of each request, after those of a request without a gang."""
        self.requests["plain"] = SimpleNamespace(sampling_params=SimpleNamespace(extra_args=None))
        names = ["plain", *(name.replace("_", ".") for name in chunks)]
        parts = [torch.full((2, self.head.shape[0]), 7.0), *(hidden for _, hidden in chunks.values())]
        for name, (start, _) in zip(names[1:], chunks.values(), strict=True):
            self.requests[name].num_computed_tokens = start
        self.input_batch.req_id_to_index = {name: index for index, name in enumerate(names)}
        self.query_start_loc.np = np.cumsum([0, *map(len, parts)])
        scheduled = {name: len(part) for name, part in zip(names, parts, strict=True)}
        self.scorer.collect(self, torch.cat(parts), dict(reversed(scheduled.items())))


@pytest.fixture
def stats(tmp_path: Path) -> Iterator[StepStats]:
    with StepStats.create(tmp_path / "gang", 2, 3) as file:
        yield file


TARGETS = [[1, 4], [1, 9], [3, 22]]


def hidden(seed: int, length: int = 4) -> Tensor:
    return torch.randn(length, 6, generator=torch.Generator().manual_seed(seed))


def expect(runner: Runner, stats: StepStats, *members: Tensor) -> None:
    log_probs = torch.stack([(rows.double() @ runner.head.double()).log_softmax(-1) for rows in members])
    check(stats.read(3), log_probs, TARGETS, 1e-5, 1.0, list(range(23)))


def test_rows_are_collected_over_steps_and_written_when_the_last_member_has_them(stats: StepStats) -> None:
    runner, first, second = Runner(), hidden(1), hidden(2)
    for member in range(2):
        runner.add("g", 2, member, TARGETS, stats.path)
    runner.step(g_0=(0, first[:2]))
    runner.step(g_0=(2, first[2:]), g_1=(0, second[:3]))
    assert stats.read(3).missing.size == 3
    runner.step(g_1=(3, second[3:]))
    expect(runner, stats, first, second)


def test_hidden_states_are_copied(stats: StepStats) -> None:
    """vLLM computes the next step into the same memory."""
    runner, first, second = Runner(), hidden(1), hidden(2)
    for member in range(2):
        runner.add("g", 2, member, TARGETS, stats.path)
    memory = first.clone()
    runner.requests["g.0"].num_computed_tokens = 0
    runner.input_batch.req_id_to_index = {"g.0": 0, "g.1": 0}
    runner.scorer.collect(runner, memory, {"g.0": 4})
    memory.copy_(second)
    runner.scorer.collect(runner, memory, {"g.1": 4})
    expect(runner, stats, first, second)


def test_preemption_and_recomputation_change_nothing(stats: StepStats) -> None:
    runner, first, second = Runner(), hidden(1), hidden(2)
    for member in range(2):
        runner.add("g", 2, member, TARGETS, stats.path)
    runner.step(g_0=(0, first), g_1=(0, second[:2]))
    runner.step(g_0=(0, first[:2]), g_1=(0, second[:1]))
    runner.step(g_0=(2, first[2:]), g_1=(1, second[1:]))
    expect(runner, stats, first, second)
    runner.step(g_0=(0, first), g_1=(0, second))
    expect(runner, stats, first, second)


def test_a_gang_is_recorded_once_although_a_complete_member_is_in_the_step(
    stats: StepStats, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last target is not the last token of the prompt, so members go on after they are complete."""
    runner, first, second = Runner(), hidden(1, 6), hidden(2, 6)
    written: list[int] = []
    monkeypatch.setattr(StepStats, "write", lambda self, step, *record: written.append(step))
    for member in range(2):
        runner.add("g", 2, member, TARGETS, stats.path)
    runner.step(g_0=(0, first[:4]), g_1=(0, second[:2]))
    runner.step(g_0=(4, first[4:5]), g_1=(2, second[2:4]))
    runner.step(g_0=(5, first[5:]), g_1=(4, second[4:]))
    assert written == [0, 1, 2]


def test_a_position_that_was_not_computed_leaves_no_record(stats: StepStats) -> None:
    runner = Runner()
    for member in range(2):
        runner.add("g", 2, member, TARGETS, stats.path)
    runner.step(g_0=(0, hidden(1)), g_1=(2, hidden(2)[2:]))
    assert stats.read(3).missing.size == 3


def test_a_member_that_never_comes_leaves_no_record(stats: StepStats, caplog: pytest.LogCaptureFixture) -> None:
    runner = Runner()
    runner.add("g", 2, 1, TARGETS, stats.path)
    runner.step(g_1=(0, hidden(1)))
    assert stats.read(3).missing.size == 3 and not caplog.records


def test_a_request_that_takes_the_place_of_another_starts_without_its_rows(stats: StepStats) -> None:
    runner = Runner()
    for member in range(2):
        runner.add("g", 2, member, TARGETS, stats.path)
    runner.step(g_0=(0, hidden(1)[:2]), g_1=(0, hidden(2)))
    runner.add("g", 2, 0, TARGETS, stats.path)
    runner.step(g_0=(2, hidden(1)[2:]))
    assert stats.read(3).missing.size == 3
    runner.step(g_0=(0, hidden(3)))
    expect(runner, stats, hidden(3), hidden(2))


def test_members_with_other_targets_leave_no_record(stats: StepStats, caplog: pytest.LogCaptureFixture) -> None:
    runner = Runner()
    runner.add("g", 2, 0, TARGETS, stats.path)
    runner.add("g", 2, 1, [[1, 4], [1, 9], [3, 21]], stats.path)
    runner.step(g_0=(0, hidden(1)), g_1=(0, hidden(2)))
    assert stats.read(3).missing.size == 3 and "differ in credence_targets" in caplog.text


def test_what_is_no_distribution_is_left_out_and_said_once(stats: StepStats, caplog: pytest.LogCaptureFixture) -> None:
    runner, broken = Runner(), hidden(2)
    broken[1] = torch.nan
    for member in range(2):
        runner.add("g", 2, member, TARGETS, stats.path)
    runner.step(g_0=(0, hidden(1)), g_1=(0, broken))
    assert stats.read(3).missing.tolist() == [0, 1]
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "2 of the 3 targets of gang g have no scores" in caplog.text


def test_a_token_outside_the_vocabulary_is_left_out(stats: StepStats, caplog: pytest.LogCaptureFixture) -> None:
    runner = Runner()
    for member in range(2):
        runner.add("g", 2, member, [[1, 4], [2, 23], [3, 10**9]], stats.path)
    runner.step(g_0=(0, hidden(1)), g_1=(0, hidden(2)))
    assert stats.read(3).missing.tolist() == [1, 2]
    assert "2 of the 3 targets" in caplog.text


def test_a_gang_is_forgotten_with_its_last_request(stats: StepStats) -> None:
    runner = Runner()
    for member in range(2):
        runner.add("g", 2, member, TARGETS, stats.path)
    runner.step(g_0=(0, hidden(1)[:2]), g_1=(0, hidden(2)[:2]))
    del runner.requests["g.1"]
    runner.scorer.prune(runner.requests)
    assert len(runner.scorer) == 1
    runner.add("g", 2, 0, TARGETS, stats.path)  # the same name again is another request
    runner.scorer.prune(runner.requests)
    assert len(runner.scorer) == 0
    runner.step(g_0=(2, hidden(1)[2:]))
    assert stats.read(3).missing.size == 3


def test_hidden_states_are_freed_with_the_records(stats: StepStats) -> None:
    runner = Runner()
    for member in range(2):
        runner.add("g", 2, member, TARGETS, stats.path)
    runner.step(g_0=(0, hidden(1)), g_1=(0, hidden(2)))
    assert [rows.rows for rows in runner.scorer._gangs["g"].members.values()] == [None, None]


def test_a_vanished_statistics_file_hurts_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runner = Runner()
    runner.add("g", 1, 0, TARGETS, str(tmp_path / "gone"))
    runner.step(g_0=(0, hidden(1)))
    assert "no statistics for gang g: [Errno 2]" in caplog.text and len(caplog.records) == 1


def test_top_lists_are_padded_in_a_small_vocabulary(tmp_path: Path) -> None:
    with StepStats.create(tmp_path / "gang", 1, 3, 30) as file:
        runner = Runner()
        runner.add("g", 1, 0, TARGETS, file.path, top=30)
        runner.step(g_0=(0, hidden(1)))
        table = file.read(3)
    assert sorted(table.top_tokens[0].tolist()) == [-1] * 7 + list(range(23))
    assert table.top_log_probs[0, 23:].tolist() == [-math.inf] * 7


@pytest.mark.parametrize(("modules", "scored"), [(["model.layers.0.mlp.up_proj"], True), (["lm_head"], False)])
def test_adapters_on_the_output_layer_are_refused(
    stats: StepStats, modules: list[str], scored: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The output layer is computed without LoRA, so a member that adapts it would get a wrong number."""
    runner = Runner()
    calls: list[str] = []

    class Wrapper:
        def add_lora_logits(self, y: Tensor, *args: Any) -> None:
            calls.append("lora")

    wrapper = Wrapper()

    def compute_logits(rows: Tensor) -> Tensor:
        logits = rows @ runner.head
        wrapper.add_lora_logits(logits, rows)
        return logits

    runner.model.compute_logits = compute_logits
    adapter = SimpleNamespace(loras=dict.fromkeys(modules))
    runner.lora_config = object()
    runner.lora_manager = SimpleNamespace(
        _adapter_manager=SimpleNamespace(
            get_adapter=lambda number: adapter, punica_wrapper_mapping={"language_model": wrapper}
        )
    )
    for member in range(2):
        runner.add("g", 2, member, TARGETS, stats.path)
        runner.requests[f"g.{member}"].lora_request = SimpleNamespace(lora_int_id=member + 1)
    runner.step(g_0=(0, hidden(1)), g_1=(0, hidden(2)))
    assert calls == []
    wrapper.add_lora_logits(torch.zeros(1))
    assert calls == ["lora"], "the LoRA path must be back after scoring"
    if scored:
        expect(runner, stats, hidden(1), hidden(2))
    else:
        assert stats.read(3).missing.size == 3 and "its adapter changes lm_head" in caplog.text


def test_install_can_be_repeated_and_comes_in_any_order_with_the_other_hooks() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from credence.serve.vllm_plugin import cpu_fixes

    scoring.install()
    cpu_fixes.install()
    before = GPUModelRunner._bookkeeping_sync, GPUModelRunner._update_states
    scoring.install()
    assert (GPUModelRunner._bookkeeping_sync, GPUModelRunner._update_states) == before

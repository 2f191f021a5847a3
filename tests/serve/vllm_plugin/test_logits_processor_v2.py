"""credence.serve.vllm_plugin.logits_processor_v2 on a fake of vLLM's second model runner, against the adapter to the first one.

The second model runner needs a GPU. Real here are its interfaces (LogitsContext, LogitsProcRequestState),
Sampler.apply_sampling_params and AsyncOutput.get_output; fake are the runner's steps, its kernels and the copies.
"""

import inspect
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from credence.serve.step_stats import StepStats
from credence.serve.vllm_plugin import gang_step
from credence.serve.vllm_plugin.averaging import ChoiceRule, average, choose_token
from tests.serve.vllm_plugin.test_gang_step import Copy
from tests.serve.vllm_plugin.test_logits_processor import V, forced_token, params, random_logits

pytestmark = pytest.mark.filterwarnings("ignore")
SLOTS, LENGTH = 40, 64


def engine_config(**changes: Any) -> Any:
    """What the adapter looks at in a VllmConfig."""
    parallel = {"enable_batch_sharded_sampling": False, "prefill_context_parallel_size": 1}
    parallel |= {key: changes.pop(key) for key in list(changes) if key in parallel}
    model = SimpleNamespace(is_diffusion=changes.pop("is_diffusion", False))
    rest = {"speculative_config": None, "watermark_config": None, **changes}
    return SimpleNamespace(parallel_config=SimpleNamespace(**parallel), model_config=model, **rest)


class Requests:
    """The runner's request slots, with the buffers of vLLM's RequestState on the host."""

    def __init__(self) -> None:
        from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcRequestState

        self.tokens = torch.full((SLOTS, LENGTH), -77, dtype=torch.int32)
        self.prompt_len, self.prefill_len, self.total_len = (np.zeros(SLOTS, np.int32) for _ in range(3))
        self.view = LogitsProcRequestState(
            device=torch.device("cpu"), max_num_reqs=SLOTS, vocab_size=V,
            all_token_ids=SimpleNamespace(gpu=self.tokens), prompt_len=SimpleNamespace(np=self.prompt_len),
            prefill_len=SimpleNamespace(np=self.prefill_len), total_len=SimpleNamespace(),
        )  # fmt: skip
        self._free = list(range(SLOTS))

    def add(self, prompt: list[int], output: list[int]) -> int:
        slot = self._free.pop()
        fed = [*prompt, *output]
        self.prompt_len[slot], self.prefill_len[slot], self.total_len[slot] = len(prompt), len(fed), len(fed)
        self.tokens[slot, : len(fed)] = torch.tensor(fed, dtype=torch.int32)
        return slot

    def free(self, slot: int) -> None:
        self._free.append(slot)

    def append(self, slot: int, token: int) -> None:
        self.tokens[slot, self.total_len[slot]] = token
        self.total_len[slot] += 1


def context(slots: list[int], lengths: list[int]) -> Any:
    """A step's layout; the lengths are padded, as for a full CUDA graph."""
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

    mapping, rows = torch.tensor(slots), torch.zeros(len(slots), dtype=torch.int32)
    return LogitsContext(
        expanded_idx_mapping=mapping, idx_mapping=mapping, idx_mapping_np=np.array(slots, dtype=np.intp),
        expanded_local_pos=rows, input_ids=rows, pos=rows.long(),
        seq_lens_upper_bound_np=np.array([*lengths, 0, 0], dtype=np.int32),
    )  # fmt: skip


class Stage:
    """Stands for vLLM's built-in stages before ours: bias, penalties, bad words; ``change(slot, row)`` in place."""

    def __init__(self, change: Callable[[int, Tensor], object] = lambda slot, row: None) -> None:
        self.change = change

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        for row, slot in enumerate(ctx.idx_mapping_np.tolist()):
            self.change(slot, logits[row])
        return logits


def processor(requests: Requests) -> Any:
    from credence.serve.vllm_plugin.logits_processor_v2 import EnsembleLogitsProcessorV2

    return EnsembleLogitsProcessorV2(engine_config(), requests.view)


def sampler_of(target: Any, stage: Any) -> Any:
    """vLLM's Sampler as far as ``apply_sampling_params`` needs it; what follows our processor does nothing to forced rows."""
    from vllm.v1.worker.gpu.sample.sampler import Sampler

    sampler = Sampler.__new__(Sampler)
    sampler.logits_processors = [stage, target]
    sampler.needs_logits_processing = np.ones(SLOTS, dtype=bool)
    sampler.thinking_budget_state = SimpleNamespace(apply=lambda logits, ctx: None)
    sampler.sampling_states = SimpleNamespace(
        apply_temperature=lambda logits, *_: None, apply_min_p=lambda logits, *_: None
    )
    return sampler


def sample(sampler: Any, logits: Tensor, ctx: Any) -> Tensor:
    after: Tensor = sampler.apply_sampling_params(
        logits, ctx.expanded_idx_mapping, ctx.idx_mapping, ctx.idx_mapping_np, ctx.pos, ctx.input_ids, ctx.expanded_local_pos,
        ctx.seq_lens_upper_bound_np, skip_top_k_top_p=True,
    )  # fmt: skip
    for target in sampler.logits_processors[1:]:
        target.forget_logits()
    return after


class Member:
    """A request of the fake runner; ``computed`` tokens are in the cache."""

    def __init__(self, sampling: Any, prompt: list[int]) -> None:
        self.sampling, self.prompt, self.output = sampling, prompt, []  # type: ignore[var-annotated]
        self.computed = 0
        self.slot: int | None = None

    @property
    def gang(self) -> str | None:
        return (self.sampling.extra_args or {}).get("credence_gang")


VARIANTS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.3},
    {"temperature": 0.9, "top_k": 9, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 1.0, "frequency_penalty": 0.7, "presence_penalty": 0.2, "repetition_penalty": 1.3},
    {"temperature": 1.1, "logit_bias": {7: 2.5}},
]


@pytest.mark.parametrize("seed", range(3))
def test_random_traffic_gives_the_tokens_and_records_of_the_first_runners_adapter(seed: int, tmp_path: Path) -> None:
    """Gangs of 1..8, incomplete ones, chunked prompts, preemptions that resume with output, reused slots, ordinary requests."""
    from credence.serve.vllm_plugin.logits_processor import EnsembleLogitsProcessorV1

    chance = random.Random(seed)
    requests, biased = Requests(), {}
    target = processor(requests)

    def change(slot: int, row: Tensor) -> None:
        if running_in.get(slot) is not None and running_in[slot].sampling.logit_bias:
            row[7] += 2.5
            row[::3] = -torch.inf
        elif running_in[slot].sampling.frequency_penalty:
            row += torch.linspace(-1, 1, V)  # our adapter must average what was there before the penalties

    sampler = sampler_of(target, Stage(change))
    live: list[Member] = []
    files: dict[str, tuple[StepStats, StepStats]] = {}
    averaged = skipped = 0
    for step in range(60):
        if chance.random() < 0.5 and len(live) < 20:
            k, name, variant = chance.randint(1, 8), f"g{step}", chance.choice(VARIANTS)
            files[name] = tuple(StepStats.create(tmp_path / f"{name}-{v}", k, 64, 2) for v in (1, 2))  # type: ignore[assignment]
            prompt = [chance.randrange(V) for _ in range(chance.choice([2, 9]))]
            for m in range(k):
                kept = {key: value for key, value in variant.items() if m == 0 or key != "logit_bias"}
                sampling = params(name, k, m, seed=step, stats=files[name][1].path, top=2, **kept)
                live.append(Member(sampling, prompt))
        elif chance.random() < 0.5:
            live.append(Member(params(temperature=0.7), [1, 2, 3]))
        together: dict[Any, list[Member]] = {}
        for member in live:
            together.setdefault(member.gang or member, []).append(member)
        batch = []
        for members in together.values():
            # Usually the members of a gang do everything together, as under our scheduler.
            apart = chance.random() < 0.1
            draws = [(chance.random(), chance.random(), chance.choice([4, 16])) for _ in members]
            for member, (preempted, absent, chunk) in zip(
                members, draws if apart else draws[:1] * len(members), strict=True
            ):
                if member.slot is not None and preempted < 0.05:
                    requests.free(member.slot)
                    member.slot, member.computed = None, 0
                if absent < 0.05:
                    continue
                if member.slot is None:
                    member.slot = requests.add(member.prompt, member.output)
                    assert target.add_request(member.slot, member.sampling) == (member.gang is not None)
                member.computed = min(member.computed + chunk, len(member.prompt) + len(member.output))
                batch.append(member)
        chance.shuffle(batch)
        if not batch:
            continue
        running_in = {member.slot: member for member in batch}
        ctx = context([member.slot for member in batch], [member.computed for member in batch])  # type: ignore[misc]
        logits = random_logits(len(batch), seed=1000 * seed + step)
        before = logits.clone()
        after = sample(sampler, logits, ctx)
        assert torch.equal(logits, before), "vLLM's own logits are not ours to change"

        first = EnsembleLogitsProcessorV1(None, torch.device("cpu"), False)
        again = {i: _with_stats(m.sampling, files) for i, m in enumerate(batch)}
        from vllm.v1.sample.logits_processor import BatchUpdate

        added = [(i, again[i], m.prompt, m.output) for i, m in enumerate(batch)]
        first.update_state(BatchUpdate(batch_size=len(batch), removed=[], added=added, moved=[]))
        first.discarded = np.array([m.computed < len(m.prompt) + len(m.output) for m in batch])
        first.keep_raw_rows(before)
        constrained = before.clone()
        for row, member in enumerate(batch):
            if member.sampling.logit_bias:
                change(member.slot, constrained[row])  # type: ignore[arg-type]
        unforced = constrained.clone()
        expected = first.apply(constrained)
        for row, member in enumerate(batch):
            if torch.equal(expected[row], unforced[row]):
                skipped += member.gang is not None
                stage = before[row].clone()
                change(member.slot, stage)  # type: ignore[arg-type]
                assert torch.equal(after[row], stage), "left alone"
            else:
                averaged += 1
                assert forced_token(after[row]) == forced_token(expected[row])
        for row, member in enumerate(batch):
            if member.computed == len(member.prompt) + len(member.output):
                token = int(after[row].argmax())
                member.output.append(token)
                requests.append(member.slot, token)  # type: ignore[arg-type]
        for members in together.values():
            uneven = len({len(member.output) for member in members}) > 1
            if len(members[0].output) > 12 or (uneven and chance.random() < 0.3):
                for member in members:
                    live.remove(member)
                    if member.slot is not None:
                        requests.free(member.slot)
        biased.update({m.gang: True for m in batch if m.sampling.logit_bias})
    assert averaged > 100 and skipped > 20 and biased
    written = 0
    for ours in files.values():
        one, two = (file.read(64) for file in ours)
        assert one.token_id.tolist() == two.token_id.tolist()
        for column in (
            "log_prob",
            "total",
            "epistemic",
            "calibrated_log_prob",
            "member_log_probs",
            "top_tokens",
            "top_log_probs",
        ):
            assert np.array_equal(getattr(one, column), getattr(two, column)), column
        written += 64 - len(two.missing)
    assert written > 20


def _with_stats(sampling: Any, files: dict[str, tuple[StepStats, StepStats]]) -> Any:
    clone = sampling.clone()
    if clone.extra_args:
        clone.extra_args = {**clone.extra_args, "credence_stats": files[clone.extra_args["credence_gang"]][0].path}
    return clone


def complete_gang(target: Any, requests: Requests, file: str = "", **sampling: Any) -> list[int]:
    """Slots of a gang of two whose prompts are [1, 2, 3] and computed."""
    slots = [requests.add([1, 2, 3], []) for _ in range(2)]
    for member, slot in enumerate(slots):
        kept = {key: value for key, value in sampling.items() if member == 0 or key not in CONSTRAINTS}
        target.add_request(slot, params("g", 2, member, stats=file, **kept))
    return slots


CONSTRAINTS = {"logit_bias", "allowed_token_ids", "bad_words", "min_tokens", "structured_outputs"}


def test_a_row_whose_token_is_thrown_away_stops_the_gang_for_this_step() -> None:
    requests = Requests()
    target = processor(requests)
    slots, logits = complete_gang(target, requests), random_logits(2)
    target.keep_logits(logits.clone())
    for lengths in ([3, 2], [2, 3], [2, 2], [3, 4]):
        assert torch.equal(target.apply(logits.clone(), context(slots, lengths)), logits), lengths
    assert forced_token(target.apply(logits.clone(), context(slots, [3, 3]))[0]) >= 0
    rows = context(slots, [3, 3])
    assert torch.equal(target.apply(random_logits(3), rows), random_logits(3)), "several rows for one request"


def test_slots_are_found_by_what_they_hold_now() -> None:
    requests = Requests()
    target = processor(requests)
    slots, logits = complete_gang(target, requests), random_logits(2)
    target.keep_logits(logits.clone())
    assert target.add_request(slots[1], params()) is False
    assert torch.equal(target.apply(logits.clone(), context(slots, [3, 3])), logits)
    scored = params("s", 1, 0, targets=[[0, 1]], max_tokens=1)
    assert target.add_request(slots[0], scored) is False
    assert torch.equal(target.apply(logits.clone(), context(slots[:1], [3]))[:1], logits[:1])


def test_the_step_counts_output_tokens_also_after_a_preemption() -> None:
    """The fourth token of a sampled gang is that of step 3, with the output fed back as part of the prompt or not."""
    sampling = {"temperature": 1.5}
    logits = random_logits(2)
    mean = average(logits[None]).scores.mean_log_probs[0]
    expected = [int(choose_token(mean, ChoiceRule(seed=0, **sampling), step)) for step in range(4)]
    assert expected[3] != expected[0]
    for output in ([], [5, 5, 5]):
        requests = Requests()
        target = processor(requests)
        slots = [requests.add([1, 2, 3], output) for _ in range(2)]
        for member, slot in enumerate(slots):
            target.add_request(slot, params("g", 2, member, **sampling))
        target.keep_logits(logits.clone())
        assert forced_token(target.apply(logits.clone(), context(slots, [6, 6]))[0]) == expected[3]


def test_without_the_hooks_nothing_is_averaged() -> None:
    requests = Requests()
    target = processor(requests)
    slots = complete_gang(target, requests)
    with pytest.raises(RuntimeError, match="not a supported version"):
        target.apply(random_logits(2), context(slots, [3, 3]))


def async_output(happened: list[str]) -> Any:
    """vLLM's AsyncOutput of two requests with one token each, without its CUDA streams."""
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.worker.gpu.async_utils import AsyncOutput

    output = AsyncOutput.__new__(AsyncOutput)
    output.copy_event = SimpleNamespace(synchronize=lambda: happened.append("tokens"))
    output.model_runner_output = ModelRunnerOutput(req_ids=["a", "b"], req_id_to_index={"a": 0, "b": 1})
    output.sampled_token_ids, output.num_sampled_tokens_np = np.array([[4], [4]]), np.array([1, 1])
    output.sampling_mask_tensors = output.num_nans = output.logprobs_tensors = None
    output.prompt_logprobs_dict, output.prompt_token_id_logprobs_dict = {}, {}
    output.pending_aux_output = output._has_fault = None
    return output


def test_a_whole_step_with_a_grammar_and_records_that_come_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hooks in the order of vLLM's sample_tokens: the grammar acts on the average, and the file is written with the tokens."""
    from vllm.sampling_params import StructuredOutputsParams
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker

    from credence.serve.vllm_plugin.logits_processor_v2 import install_hooks

    requests, happened, logits = Requests(), [], random_logits(2).bfloat16()
    raw, forced = logits.clone(), []

    def mask(self: Any, logits: Tensor, input_batch: Any, ids: list[str], bitmask: Any) -> None:
        logits[1] = torch.where(torch.tensor([i in (4, 9, 11) for i in range(V)]), logits[1], -torch.inf)

    def run(self: Any, hidden_states: Any, input_batch: Any, grammar_output: Any) -> None:
        self.structured_outputs_worker.apply_grammar_bitmask(logits, input_batch, ["b"], None)
        forced.append(self.sampler.apply_sampling_params(
            logits, ctx.expanded_idx_mapping, ctx.idx_mapping, ctx.idx_mapping_np, ctx.pos, ctx.input_ids, ctx.expanded_local_pos,
            ctx.seq_lens_upper_bound_np, skip_top_k_top_p=True,
        ))  # fmt: skip
        if self.fails:
            raise ValueError("the sampler failed")

    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        self.sample(None, input_batch, grammar_output)
        return async_output(happened)

    monkeypatch.setattr(StructuredOutputsWorker, "apply_grammar_bitmask", mask)
    monkeypatch.setattr(GPUModelRunner, "sample", run)
    monkeypatch.setattr(GPUModelRunner, "sample_tokens", sample_tokens)
    install_hooks()
    install_hooks()
    file, copy = StepStats.create(tmp_path / "g", 2, 4), Copy()
    monkeypatch.setattr(gang_step, "copy_to_host", copy)
    target = processor(requests)
    grammar = StructuredOutputsParams(choice=["a"])
    slots = complete_gang(target, requests, file.path, structured_outputs=grammar)[::-1]  # the leader in row 1
    ctx = context(slots, [3, 3])
    input_batch = SimpleNamespace(idx_mapping_np=ctx.idx_mapping_np)
    runner = GPUModelRunner.__new__(GPUModelRunner)
    runner.sampler, runner.fails = sampler_of(target, Stage()), False
    runner.structured_outputs_worker = StructuredOutputsWorker.__new__(StructuredOutputsWorker)

    output = runner.sample_tokens(None)
    mean = average(raw.float()[[1, 0]][None]).scores.mean_log_probs[0]
    token = max((4, 9, 11), key=lambda i: float(mean[i]))
    assert token != int(mean.argmax())
    assert [forced_token(row) for row in forced[0]] == [token, token]
    assert copy.waited == 0 and file.read(1).missing.size == 1 and happened == []
    assert output.get_output().sampled_token_ids == [[4], [4]]
    assert copy.waited == 1 and happened == ["tokens"]
    table = file.read(1)
    assert table.token_id.tolist() == [token]
    assert table.log_prob[0] == pytest.approx(float(mean[token]), abs=1e-6)
    assert target._raw_logits is None and target._raw_rows == {} and target.queue.take() == []
    runner.fails = True
    with pytest.raises(ValueError, match="sampler failed"):
        runner.sample_tokens(None)
    assert target._raw_logits is None and target._raw_rows == {}


def test_vllm_has_what_is_hooked() -> None:
    """The signatures the hooks rely on, in the installed vLLM."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.sample.sampler import Sampler
    from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker

    def names(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert names(Sampler.apply_sampling_params)[:2] == ["self", "logits"]
    assert names(StructuredOutputsWorker.apply_grammar_bitmask)[:3] == ["self", "logits", "input_batch"]
    assert names(GPUModelRunner.sample)[:3] == ["self", "hidden_states", "input_batch"]
    assert names(GPUModelRunner.sample_tokens) == ["self", "grammar_output"]
    source = inspect.getsource(inspect.unwrap(GPUModelRunner.sample))
    mask, draw = source.index("structured_outputs_worker.apply_grammar_bitmask("), source.index("self.sampler(logits")
    assert mask < draw


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDENCE_PLUGIN_TOKEN", "secret")


def validate(sampling: Any) -> None:
    from credence.serve.vllm_plugin.logits_processor_v2 import EnsembleLogitsProcessorV2

    EnsembleLogitsProcessorV2.validate_params(sampling)


def test_members_this_runner_treats_exactly_are_accepted(secret: None) -> None:
    validate(params())
    validate(params(frequency_penalty=1.0, logit_bias={1: 2.0}))
    for variant in VARIANTS:
        validate(params("g", **variant))


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        ({"targets": [[0, 1]], "max_tokens": 1}, "scores of a given text are not available .*MODEL_RUNNER=0"),
        ({"frequency_penalty": 1.0, "logit_bias": {1: 2.0}}, "penalties or constraints .*, not both"),
        ({"repetition_penalty": 1.1, "min_tokens": 1}, "penalties or constraints .*, not both"),
        ({"thinking_token_budget": 5}, "thinking_token_budget would overwrite"),
        ({"trace_decode_token_ids": [1]}, "trace_decode_token_ids would overwrite"),
        ({"n": 2, "temperature": 1.0}, "n = 1, got n = 2"),
    ],
)
def test_members_it_cannot_treat_exactly_are_refused(secret: None, sampling: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        validate(params("g", **sampling))


def test_reserved_keys_without_the_servers_token_are_refused(secret: None) -> None:
    forged = params("g")
    forged.extra_args["credence_token"] = "wrong"
    with pytest.raises(ValueError, match="reserved for the server"):
        validate(forged)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"speculative_config": object()}, "speculative decoding"),
        ({"enable_batch_sharded_sampling": True}, "batch-sharded sampling"),
        ({"prefill_context_parallel_size": 2}, "prefill context parallelism"),
        ({"is_diffusion": True}, "a diffusion model"),
        ({"watermark_config": object()}, "watermarking"),
    ],
)
def test_engines_that_would_not_average_exactly_are_refused(change: dict[str, Any], said: str) -> None:
    from credence.serve.vllm_plugin.logits_processor_v2 import check_engine

    check_engine(engine_config())
    with pytest.raises(ValueError, match=f"do not work with {said}; start the server with VLLM_USE_V2_MODEL_RUNNER=0"):
        check_engine(engine_config(**change))


def test_the_names_of_the_refused_features_are_vllms() -> None:
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig

    assert {"enable_batch_sharded_sampling", "prefill_context_parallel_size"} <= set(
        ParallelConfig.__dataclass_fields__
    )
    assert {"speculative_config", "watermark_config"} <= set(VllmConfig.__dataclass_fields__)
    assert hasattr(ModelConfig, "is_diffusion")


def test_the_second_runner_refuses_the_first_ones_adapter() -> None:
    """Without the variable this process has the first runner's; if vLLM takes the second one all the same, it does not start."""
    from vllm.v1.worker.gpu.sample.logits_processor import loader

    with pytest.raises(ValueError, match="V1-interface plugins are not supported by the V2 model runner"):
        loader._load_v2_logitsprocs_plugins()


@pytest.mark.parametrize(("value", "version"), [(False, "V1"), (True, "V2"), (None, "V1")])
def test_the_adapter_follows_the_variable(monkeypatch: pytest.MonkeyPatch, value: bool | None, version: str) -> None:
    """As vLLM has read it; an engine in this process has frozen its reading."""
    from credence.serve.vllm_plugin import logits_processor

    monkeypatch.setattr(logits_processor, "envs", SimpleNamespace(VLLM_USE_V2_MODEL_RUNNER=value))
    assert logits_processor._adapter().__name__ == f"EnsembleLogitsProcessor{version}"


@pytest.mark.slow
def test_vllms_loader_finds_the_second_runners_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: the entry point, the variable, and the server's own check of the entry points."""
    program = (
        "from vllm.v1.worker.gpu.sample.logits_processor import loader\n"
        "from credence.serve.vllm_plugin import server\n"
        "server.check_entry_points()\n"
        "print(*[base.__name__ for base in loader._load_v2_logitsprocs_plugins()[0].__mro__[:2]])"
    )
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setenv("VLLM_PLUGINS", "")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    assert result.stdout.split("\n")[-2] == "EnsembleLogitsProcessor EnsembleLogitsProcessorV2"

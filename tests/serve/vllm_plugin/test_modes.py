"""Adaptive stages of a request, without an engine."""

import asyncio
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from credence.adapters import BeforeAfter, PlattMap, lowest_score
from credence.serve.schemas import UncertaintyOptions
from credence.serve.vllm_plugin.modes import Run


class FakeEnsemble:
    """Counts what is drawn."""

    def __init__(self, maximum: int, adaptive: bool) -> None:
        self.plan = SimpleNamespace(num_samples=maximum, adaptive=adaptive)
        self.drawn: list[int] = []

    async def draw(self, number: int) -> None:
        self.drawn.append(number)


def stages(
    maximum: int, settles_at: int, hopeless: tuple[int, ...] = (), adaptive: bool = True
) -> tuple[Any, Any, int]:
    """The record, what was drawn, and how often the work was done."""
    ensemble = FakeEnsemble(maximum, adaptive)
    run = Run(ensemble=ensemble, runner=None, tokenizer=None, max_logprobs=0)  # type: ignore[arg-type]
    worked = []

    async def work() -> None:
        worked.append(ensemble.drawn[-1] if ensemble.drawn else 0)

    auto = asyncio.run(
        run._until_settled(work, lambda: worked[-1] >= settles_at, lambda number: number not in hopeless)
    )
    return auto, ensemble.drawn, len(worked)


@pytest.mark.parametrize(
    ("settles_at", "hopeless", "tried", "settled"),
    [
        (4, (), [4], True),
        (8, (), [4, 8], True),
        (16, (8,), [4, 16], True),
        (32, (), [4, 8, 16, 32], False),
        (99, (8, 16), [4, 32], False),
        (4, (4, 8), [4], True),  # the first stage is never skipped
    ],
)
def test_stages_end_when_settled_and_skip_the_hopeless(
    settles_at: int, hopeless: tuple[int, ...], tried: list[int], settled: bool
) -> None:
    auto, drawn, worked = stages(32, settles_at, hopeless)
    assert (auto.stages, auto.settled, drawn, worked) == (tried, settled, tried, len(tried))


def test_a_given_k_is_no_matter_of_stages() -> None:
    assert stages(32, 99, adaptive=False) == (None, [], 1)


def test_few_samples_are_one_stage() -> None:
    auto, drawn, _ = stages(3, 99)
    assert (auto.stages, auto.settled, drawn) == ([3], False, [3])


MAP = PlattMap(
    slope=8.0,
    intercept=4.0,
    rows=20,
    correct=9,
    nll=BeforeAfter(before=0.9, after=0.5),
    brier=BeforeAfter(before=0.4, after=0.2),
)


def flag_is_settled(probs: list[float], threshold: float, fitted: PlattMap | None) -> bool:
    """Of a text of one token, to which each of the samples drawn gives a probability; 32 samples decide."""
    ensemble = FakeEnsemble(32, True)
    ensemble.plan.options = UncertaintyOptions(n_samples="auto", mode="score", threshold=threshold)
    ensemble.plan.adapter = SimpleNamespace(support=(), can_calibrate=False)
    ensemble.plan.confidence_map = lambda num_samples: fitted
    run = Run(ensemble=ensemble, runner=None, tokenizer=None, max_logprobs=0)  # type: ignore[arg-type]
    table = SimpleNamespace(
        member_log_probs=np.log([probs]), log_prob=np.log([np.mean(probs)]), calibrated_log_prob=np.array([math.nan])
    )
    return run._flag_is_settled(table)  # type: ignore[arg-type]


@pytest.mark.parametrize("probs", [[0.6, 0.62, 0.58, 0.6], [0.95, 0.3, 0.6, 0.5], [0.75, 0.74, 0.76, 0.77]])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.9])
def test_a_mapped_confidence_settles_where_the_probability_settles_on_its_side(
    probs: list[float], threshold: float
) -> None:
    same_side = math.exp(lowest_score(MAP, threshold))
    assert flag_is_settled(probs, threshold, MAP) == flag_is_settled(probs, same_side, None)


def test_a_threshold_that_no_text_reaches_or_every_text_does_is_settled_at_once() -> None:
    apart = [0.99, 0.01, 0.6, 0.3]
    assert not flag_is_settled(apart, 0.5, None)
    assert flag_is_settled(apart, 0.999, MAP)  # the map ends at 1 / (1 + exp(-4))
    flat = MAP.model_copy(update={"slope": 0.0})
    assert flag_is_settled(apart, 0.5, flat)

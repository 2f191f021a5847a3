"""Adaptive stages of a request, without an engine."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

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

from typing import Any

import pytest

from credence.benchmarks.measure import Measurement, interleave
from credence.benchmarks.prompts import PromptSettings, _rows, document, markdown
from credence.benchmarks.workload import Workload
from tests.benchmarks.conftest import Fake

SETTINGS = PromptSettings(sample_counts=(0, 2), lengths=(4, 12), shared=9, new_tokens=1, rounds=3)


def test_rows_share_what_they_say(workload: Workload, fake: Fake) -> None:
    target, asked = fake()
    rows = _rows(target, workload, SETTINGS)
    assert list(rows) == [(0, 4, 0), (2, 4, 0), (0, 12, 0), (2, 12, 0), (0, 12, 9), (2, 12, 9)]
    interleave({str(key): row for key, row in rows.items()}, rounds=2, warmup=0)
    shared: dict[int, list[list[int]]] = {0: [], 2: []}
    fresh = []
    for body in asked:
        prompt = body["prompt"]
        assert len(prompt) in SETTINGS.lengths
        if prompt[:9] == workload.prompt(9, 0):
            shared[body.get("uncertainty", {}).get("n_samples", 0)].append(prompt)
        else:
            fresh.append(tuple(prompt[:4]))
    assert {k: len(prompts) for k, prompts in shared.items()} == {0: 2, 2: 2}
    assert len({tuple(prompt[9:]) for prompts in shared.values() for prompt in prompts}) == 4
    assert len(set(fresh)) == len(fresh) == 8


def test_without_shared_tokens_there_is_no_such_row(workload: Workload, fake: Fake) -> None:
    settings = PromptSettings(sample_counts=(0,), lengths=(4,), shared=0)
    assert list(_rows(fake()[0], workload, settings)) == [(0, 4, 0)]


def test_the_page_compares_with_the_smallest_k(workload: Workload) -> None:
    walls = {(0, 4, 0): 10.0, (2, 4, 0): 15.0, (0, 12, 9): 12.0, (2, 12, 9): 30.0}
    results = {
        key: [Measurement(wall_ms=wall + noise, cpu_ms=2 * wall) for noise in (-1, 0, 5)] for key, wall in walls.items()
    }
    result = document(results, workload, SETTINGS, 0.1)
    assert result["rows"][1] == {"k": 2, "prompt": 4, "shared": 0, "p50_ms": 15.0, "cpu_ms": 30.0}
    page = markdown(result, "credence bench prompts")
    for line in ("| 4 | 0 | 0 | 10 | 20 | 1.00 |", "| 4 | 0 | 2 | 15 | 30 | 1.50 |", "| 12 | 9 | 2 | 30 | 60 | 2.50 |"):
        assert line in page


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample_counts": ()}, "numbers of 0 or more"),
        ({"sample_counts": (-1,)}, "numbers of 0 or more"),
        ({"lengths": ()}, "numbers of 1 or more"),
        ({"lengths": (16,), "shared": 16}, "16 shared tokens; give fewer than the longest prompt's 16"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptSettings(**settings)

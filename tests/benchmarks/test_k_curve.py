import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from credence.benchmarks.k_curve import AT_ONCE, KCurveSettings, _rows, _same_tokens, document, markdown
from credence.benchmarks.measure import BenchError, Measurement, interleave
from credence.benchmarks.plot import plot_k_curve
from credence.benchmarks.workload import Workload
from tests.benchmarks.conftest import Fake

SETTINGS = KCurveSettings(
    sample_counts=(0, 1, 4), peft_counts=(1, 4), at_once_counts=(0, 4), prompt_tokens=6, new_tokens=3, rounds=3
)
CONTRACT = {
    "k", "p50_ms", "p95_ms", "cpu_ms", "ttft_ms", "requests_per_s_8", "hf_loop_p50_ms", "hf_loop_cpu_ms",
}  # fmt: skip


class FakeLoop:
    """Stands for PeftLoop and remembers what it was asked."""

    def __init__(self, tokens: Sequence[int] = (0, 1, 2)) -> None:
        self.asked: list[tuple[str, int, int]] = []
        self.tokens = list(tokens)

    def loop(self, prompts: Sequence[Sequence[int]], *, new_tokens: int, num_samples: int) -> list[list[int]]:
        self.asked.append(("loop", len(prompts), num_samples))
        return [self.tokens[:new_tokens] for _ in prompts]

    def batched(self, prompt: Sequence[int], *, new_tokens: int, num_samples: int) -> list[int]:
        self.asked.append(("batched", 1, num_samples))
        return self.tokens[:new_tokens]


def measured(*walls: float, cpu: float = 2.0) -> list[Measurement]:
    return [Measurement(wall_ms=wall, cpu_ms=cpu * wall) for wall in walls]


def results() -> dict[str, list[Measurement]]:
    rows = {
        "stock/one": measured(90, 100, 190), "stock/first": measured(9, 10, 11), "stock/eight": measured(400, 500, 700),
        "n/4": measured(130, 140, 150), "loop/1": measured(150, 160, 170), "loop/4": measured(590, 600, 800),
        "batched/1": measured(150, 155, 170), "batched/4": measured(290, 300, 310), "loop/4/eight": measured(3000, 3200, 3300),
    }  # fmt: skip
    for k, wall in ((0, 100.0), (1, 120.0), (4, 150.0)):
        rows[f"ours/{k}/one"] = measured(wall - 1, wall, wall + 19)
        rows[f"ours/{k}/first"] = measured(wall / 10)
        if k in SETTINGS.at_once_counts:
            rows[f"ours/{k}/eight"] = measured(4 * wall)
    return rows


def test_the_document_has_medians_in_the_agreed_form(workload: Workload) -> None:
    result = document(results(), workload, SETTINGS, {4: 0.5}, 0.25)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert {"model", "tokens", "machine", "rows", "stock_vllm"} <= result.keys()
    assert result["model"] == {"name": "fake", "parameters": 98_000_000, "dtype": "bfloat16"}
    assert result["tokens"] == {"prompt": 6, "new": 3}
    mean, one, four = result["rows"]
    assert all(row.keys() >= CONTRACT for row in result["rows"])
    assert [row["k"] for row in result["rows"]] == [0, 1, 4]
    assert (four["p50_ms"], four["cpu_ms"], four["ttft_ms"]) == (150.0, 300.0, 15.0)
    assert four["p95_ms"] == pytest.approx(150 + 0.9 * 19)
    assert four["requests_per_s_8"] == pytest.approx(AT_ONCE / 0.6, abs=1e-3)
    assert (four["hf_loop_p50_ms"], four["hf_loop_cpu_ms"]) == (600.0, 1200.0)
    assert (four["hf_batched_p50_ms"], four["token_samples_cpu_ms"]) == (300.0, 280.0)
    assert four["hf_loop_requests_per_s_8"] == 2.5 and four["hf_same_tokens"] == 0.5
    assert one["hf_loop_p50_ms"] == 160.0 and one["requests_per_s_8"] is None and one["token_samples_p50_ms"] is None
    assert mean["hf_loop_p50_ms"] is None and mean["hf_same_tokens"] is None
    assert result["stock_vllm"]["p50_ms"] == 100.0 and result["stock_vllm"]["cpu_ms"] == 200.0


def test_the_page_has_the_ratios(workload: Workload) -> None:
    page = markdown(document(results(), workload, SETTINGS, {4: 0.5}, 0.25), "credence bench k-curve")
    assert "`credence bench k-curve`" in page and "Other work took 25% of the machine" in page
    assert "| 4 | 150 | 167 | 300 | 1.50 | 0.38 | 15 | 13.33 |" in page
    assert "| stock vLLM, mean | 100 | 181 | 200 | 1.00 | | 10 | 16.00 |" in page
    assert "| 4 | 300 | 1200 (4.0) | 600 (2.0) | 280 (0.9) | 150 | 600 (4.0) | 300 (2.0) | 140 (0.9) |" in page
    assert "| 1 | 240 | 320 (1.3) | 310 (1.3) | - | 120 | 160 (1.3) | 155 (1.3) | - |" in page
    assert "K = 4, 8 requests at once: 13.33 requests/s, 8.0 times the PEFT loop, one request after the other" in page
    assert "5.3 times the loop over 8 prompts" in page
    assert "K = 4: 50% of the tokens equal the PEFT loop's" in page


def test_the_picture_shows_every_series(workload: Workload, tmp_path: Path) -> None:
    from PIL import Image

    plot_k_curve(document(results(), workload, SETTINGS, {}, 0.0), tmp_path / "curve.png")
    few = results()
    for name in ("loop/1", "loop/4", "batched/1", "batched/4", "n/4"):
        del few[name]
    plot_k_curve(document(few, workload, SETTINGS, {}, 0.0), tmp_path / "few.png")
    with Image.open(tmp_path / "curve.png") as picture, Image.open(tmp_path / "few.png") as plain:
        assert picture.size == plain.size and min(picture.size) > 500
        red, loop_colour = picture.convert("RGB"), (0xB3, 0x28, 0x2D)
        assert loop_colour in {colour for _, colour in red.getcolors(1 << 20)}
        assert loop_colour not in {colour for _, colour in plain.convert("RGB").getcolors(1 << 20)}


def test_every_row_asks_the_right_server(workload: Workload, fake: Fake) -> None:
    ours, our_requests = fake("http://ours")
    stock, stock_requests = fake("http://stock")
    loop: Any = FakeLoop()
    rows = _rows(ours, stock, loop, workload, SETTINGS)
    done = interleave(rows, rounds=1, warmup=0)
    assert set(done) == set(results())
    samples = [body.get("uncertainty", {}).get("n_samples", 0) for body in our_requests]
    # For each K a whole answer and a first token, and 8 requests where they are asked for.
    assert sorted(samples) == sorted([0] * 10 + [1] * 2 + [4] * 10)
    assert all("uncertainty" not in body for body in stock_requests)
    assert sorted(body.get("n", 1) for body in stock_requests) == [1] * 10 + [4]
    assert [body["max_tokens"] for body in our_requests if body.get("stream")] == [2] * 3
    assert [body["max_tokens"] for body in our_requests if not body.get("stream")] == [3] * 19
    prompts = [tuple(body["prompt"]) for body in our_requests + stock_requests]
    assert len(set(prompts)) == len(prompts) and {len(prompt) for prompt in prompts} == {6}
    assert loop.asked == [("loop", 1, 1), ("batched", 1, 1), ("loop", 1, 4), ("batched", 1, 4), ("loop", 8, 4)]


def test_agreement_counts_tokens_up_to_the_first_difference(workload: Workload, fake: Fake) -> None:
    ours, _ = fake()
    loop: Any = FakeLoop(tokens=(0, 7, 2))
    assert _same_tokens(ours, loop, workload, SETTINGS) == {1: 0.333, 4: 0.333}


def test_a_server_that_ignores_uncertainty_is_not_measured(workload: Workload, fake: Fake) -> None:
    import httpx2

    answer = {"choices": [{"token_ids": [0, 1, 2]}], "usage": {"completion_tokens": 3}}
    ours, _ = fake(answer=lambda body: httpx2.Response(200, json=answer))
    loop: Any = FakeLoop()
    with pytest.raises(BenchError, match="answered without uncertainty"):
        _same_tokens(ours, loop, workload, SETTINGS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample_counts": (1, 2)}, "begin with 0"),
        ({"sample_counts": (0, 4, 2)}, "rising"),
        ({"sample_counts": (0, 1), "peft_counts": (8,)}, r"K are \[8\]; choose from \[1\]"),
        ({"peft_counts": (0,)}, r"K are \[0\]"),
        ({"at_once_counts": (3,)}, r"8 at once for K = \[3\]"),
        ({"rounds": 0}, "1 or more"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KCurveSettings(**settings)

from dataclasses import replace
from pathlib import Path

import pytest

from credence.benchmarks.measure import Measurement
from credence.benchmarks.overhead import WARMUP_PAIRS, OverheadSettings, _pairs, document, markdown
from credence.benchmarks.workload import Workload
from tests.benchmarks.conftest import Fake

SETTINGS = OverheadSettings(pairs=5, prompt_tokens=4, new_tokens=2)


def test_the_ratio_is_the_median_of_the_pairs(workload: Workload) -> None:
    # The machine gets slower from pair to pair; within a pair ours takes 1.02 of the wall time and 0.9 of the CPU time.
    pairs = [
        (Measurement(wall_ms=1.02 * wall, cpu_ms=1.8 * wall), Measurement(wall_ms=wall, cpu_ms=2 * wall))
        for wall in (100.0, 130.0, 200.0, 500.0, 900.0)
    ]
    result = document({"mean adapter": pairs}, workload, SETTINGS, 0.1)
    (row,) = result["rows"]
    assert row["requests"] == "mean adapter" and row["pairs"] == 5
    assert row["wall_ms"].pop("pairs") == [[1.02 * wall, wall] for wall in (100.0, 130.0, 200.0, 500.0, 900.0)]
    assert row["wall_ms"] == {"ours": 204.0, "stock": 200.0, "ratio": 1.02, "ratio_low": 1.02, "ratio_high": 1.02}
    assert row["cpu_ms"]["ratio"] == 0.9
    page = markdown(result, "credence bench overhead")
    assert "| mean adapter | 5 | 204 | 200 | 1.020 [1.020, 1.020] | 360 | 400 | 0.900 [0.900, 0.900] |" in page


def test_the_interval_holds_the_median_and_not_everything(workload: Workload) -> None:
    ratios = [0.5, *[1.0 + index / 100 for index in range(38)], 3.0]
    pairs = [(Measurement(wall_ms=100 * r, cpu_ms=100 * r), Measurement(wall_ms=100, cpu_ms=100)) for r in ratios]
    wall = document({"base model": pairs}, workload, SETTINGS, 0.1)["rows"][0]["wall_ms"]
    assert 1.0 < wall["ratio_low"] < wall["ratio"] < wall["ratio_high"] < 1.37
    assert wall["ratio"] == pytest.approx(1.185)


def test_pairs_are_identical_requests_in_alternating_order(
    workload: Workload, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("credence.benchmarks.measure.SETTLE_S", 0.0)
    monkeypatch.setattr("credence.benchmarks.measure.IDLE_LOOK_S", 0.001)
    ours, our_requests = fake("http://ours")
    stock, stock_requests = fake("http://stock")
    order: list[str] = []
    for target in (ours, stock):
        target.http.event_hooks = {"request": [lambda request, url=target.url: order.append(url)]}
    pairs = _pairs(ours, stock, workload, SETTINGS, lambda line: None)
    assert {name: len(measured) for name, measured in pairs.items()} == {"mean adapter": 5, "base model": 5}
    assert our_requests == stock_requests
    assert [body["model"] for body in our_requests] == ["bench", "base"] * (SETTINGS.pairs + WARMUP_PAIRS)
    prompts = [tuple(body["prompt"]) for body in our_requests]
    assert len(set(prompts)) == len(prompts)
    firsts = order[::2]
    assert firsts == ["http://stock", "http://stock", "http://ours", "http://ours"] * 4


def test_of_a_merged_model_the_mean_alone_is_measured(
    workload: Workload, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("credence.benchmarks.measure.SETTLE_S", 0.0)
    monkeypatch.setattr("credence.benchmarks.measure.IDLE_LOOK_S", 0.001)
    ours, requests = fake("http://ours")
    stock, _ = fake("http://stock")
    merged = replace(workload, merged=Path("merged"))
    pairs = _pairs(ours, stock, merged, SETTINGS, lambda line: None)
    assert {name: len(measured) for name, measured in pairs.items()} == {"merged mean": 5}
    assert {body["model"] for body in requests} == {"base"}
    pairs["merged mean"] = [(Measurement(wall_ms=100, cpu_ms=90), Measurement(wall_ms=100, cpu_ms=100))] * 5
    page = markdown(document(pairs, merged, SETTINGS, 0.1), "credence bench overhead --merged")
    assert "| merged mean | 5 | 100 | 100 | 1.000" in page
    assert "Stock: the merged model, no plugins" in page

"""What is shown: colours by score, and verdicts that follow the numbers, good or bad."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from credence.clients import TokenUncertainty
from credence.demo.ask import Separation
from credence.demo.screen import BAR_CELLS, bar, coloured, show, token_style, truth, verdict
from tests.demo.test_ask import case

GOOD = Separation(
    by_epistemic=0.95, by_total=0.93, by_mean_entropy=0.90, noisy_by_aleatoric=0.97, unknown_from_noisy=0.7
)


def test_colours_grow_with_uncertainty() -> None:
    assert len({token_style(nats) for nats in (0.0, 0.5, 2.0)}) == 3
    assert "red" in token_style(100.0)


def test_tokens_are_coloured_one_by_one() -> None:
    tokens = tuple(
        TokenUncertainty(token=token, logprob=-0.1, total=total, epistemic=0.0)
        for token, total in ((" in", 0.01), (" Harwick", 2.0), ("</s>", 0.0))
    )
    text = coloured(replace(case("known"), tokens=tokens))
    assert text.plain.endswith(" in Harwick")
    assert [str(span.style) for span in text.spans] == [token_style(0.01), token_style(2.0)]


@pytest.mark.parametrize(("total", "aleatoric"), [(0.0, 0.0), (1.0, 0.4), (50.0, 1.0)])
def test_bar_has_a_fixed_width(total: float, aleatoric: float) -> None:
    assert len(bar(case("known", total=total, aleatoric=aleatoric)).plain) == BAR_CELLS


def test_truth_names_every_answer_that_was_told() -> None:
    noisy = case("noisy")
    assert all(answer in truth(noisy).plain for answer in noisy.fact.answers)
    assert not set(truth(case("unknown")).plain.split()) & set(case("unknown").fact.answers)


def test_verdict_on_good_numbers() -> None:
    assert not [line for line in verdict(GOOD) if " NOT " in line]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"by_epistemic": 0.6, "by_total": 0.7, "by_mean_entropy": 0.5}, "does NOT separate the unknown"),
        ({"by_mean_entropy": 0.96}, "NOT better than the mean adapter's own entropy (0.960)"),
        ({"by_mean_entropy": 0.95}, "NOT better"),
        ({"by_epistemic": 0.6}, "do not separate epistemically"),
        ({"noisy_by_aleatoric": 0.5}, "do NOT show reliably as aleatoric"),
    ],
)
def test_verdict_says_what_fails(changes: dict[str, float], expected: str) -> None:
    assert expected in "\n".join(verdict(replace(GOOD, **changes)))


def test_everything_is_printed_whatever_it_is() -> None:
    output = io.StringIO()
    cases = [case("known"), case("noisy"), case("unknown")]
    bad = Separation(
        by_epistemic=0.123, by_total=0.234, by_mean_entropy=0.345, noisy_by_aleatoric=0.456, unknown_from_noisy=0.567
    )
    show(Console(file=output, width=160), cases, bad, {0: 12.0, 8: 34.5}, n_samples=8)
    printed = output.getvalue()
    for text in ("0.123", "0.234", "0.345", "0.456", "KNOWN", "NOISY", "UNKNOWN", "K = 8", "34.5 ms"):
        assert text in printed

"""Normalised answers: what is joined and what is kept apart; agreement against a plain count and by hand."""

import math
import unicodedata
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from credence.adapters.agreement import AnswerCount, agreement, normalise_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Paris", "paris"),
        ("  Paris. ", "paris"),
        ("New\n  York\t", "new york"),
        ("Straße", "strasse"),
        ("ＡＢＣ １２", "abc 12"),
        ("ﬁve\u00a0o'clock", "five o'clock"),
        ("e\u0301te\u0301", "\u00e9t\u00e9"),
        ("ΣΊΣΥΦΟΣ", "σίσυφοσ"),
        ("5 ㎒", "5 mhz"),
        ("yes!!!", "yes"),
        ("well…", "well"),
        ("¿Quién?", "quién"),
        ("東京。", "東京"),
        ('"Paris."', "paris"),
        ("“Paris”.", "paris"),
        ("«Paris»", "paris"),
        ("**42**", "42"),
        ("`x`", "x"),
        ("(B)", "b"),
        ("('b').", "b"),
        ("", ""),
        (" \n ", ""),
        ("?", "?"),
        ("...", "..."),
        ('""', '""'),
        ("( )", "( )"),
    ],
)
def test_normalised_answers(text: str, answer: str) -> None:
    assert normalise_answer(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "the answer", "a", "1,000", "1.5", "-5", ".5", "$5", "50%", "c++", "f(x)", "[0, 1]", "{1}", "(a) or (b)", '"a" and "b"', "(a)(b)",
        "a) b", "*a* b *c*", "'tis", "x (y", "(a (b)",
    ],
)  # fmt: skip
def test_the_inside_of_an_answer_and_its_signs_stay(text: str) -> None:
    assert normalise_answer(text) == text


@settings(max_examples=400, deadline=None)
@given(text=st.one_of(st.text(max_size=12), st.text(alphabet="aA \"'().*?¿«»“”\u0301\u0345…", max_size=10)))
def test_normalising_twice_changes_nothing_and_ignores_case_and_whitespace(text: str) -> None:
    answer = normalise_answer(text)
    assert normalise_answer(answer) == answer
    assert normalise_answer(f" {text}\n") == answer
    assert normalise_answer(unicodedata.normalize("NFD", text).casefold()) == answer
    assert (answer == "") == (not unicodedata.normalize("NFKC", text).split())


def test_agreement_by_hand() -> None:
    result = agreement(["Paris.", "Lyon", "paris", "London", '"Paris"'], [-0.9, -0.1, -0.4, -2.0, -0.5])
    assert result.answer == "paris"
    assert result.index == 2
    assert result.agreement == pytest.approx(0.6) and result.variation_ratio == pytest.approx(0.4)
    assert result.answer_entropy == pytest.approx(-0.6 * math.log(0.6) - 2 * 0.2 * math.log(0.2))
    assert result.answers == (
        AnswerCount(answer="paris", count=3, share=0.6),
        AnswerCount(answer="lyon", count=1, share=0.2),
        AnswerCount(answer="london", count=1, share=0.2),
    )
    assert result.answer_K == (0, 1, 0, 2, 0)


@settings(max_examples=200, deadline=None)
@given(
    completions=st.lists(
        st.tuples(
            st.sampled_from(["a", "A.", "b", " b", "c", "", " "]), st.sampled_from([-0.5, -1.0, -2.0, -math.inf])
        ),
        min_size=1,
        max_size=9,
    )
)
def test_agreement_is_that_of_a_plain_count(completions: list[tuple[str, float]]) -> None:
    texts, log_probs = [text for text, _ in completions], [value for _, value in completions]
    k = len(texts)
    result = agreement(texts, log_probs)
    normal = [text.strip(" .").lower() for text in texts]
    counts = Counter(normal)
    assert {a.answer: a.count for a in result.answers} == dict(counts)
    assert [a.share for a in result.answers] == [a.count / k for a in result.answers]
    assert result.agreement == max(counts.values()) / k
    assert result.variation_ratio == pytest.approx(1 - result.agreement)
    assert result.answer_entropy == pytest.approx(-sum(c / k * math.log(c / k) for c in counts.values()), abs=1e-12)
    assert 0 <= result.answer_entropy <= math.log(k)
    assert [result.answers[position].answer for position in result.answer_K] == normal

    def rank(answer: str) -> tuple[int, float, int]:
        members = [i for i in range(k) if normal[i] == answer]
        return -len(members), -max(log_probs[i] for i in members), members[0]

    assert [a.answer for a in result.answers] == sorted(counts, key=rank)
    assert result.answer == result.answers[0].answer == normal[result.index]
    members = [i for i in range(k) if normal[i] == result.answer]
    best = max(log_probs[i] for i in members)
    assert result.index == next(i for i in members if log_probs[i] == best)


def test_ties_are_broken_by_the_best_log_probability_and_then_by_order() -> None:
    assert agreement(["b", "a"], [-1.0, -0.5]).answer == "a"
    assert agreement(["b", "a"], [-0.5, -0.5]).answer == "b"
    # the group's best counts, not its sum
    assert agreement(["b", "b", "a", "a"], [-1.0, -1.0, -0.9, -9.0]).answer == "a"
    assert agreement(["a", "A"], [-0.5, -0.5]).index == 0


def test_one_completion_agrees_with_itself() -> None:
    result = agreement(["Yes."], [-0.2])
    assert (result.answer, result.index, result.agreement, result.variation_ratio) == ("yes", 0, 1.0, 0.0)
    assert result.answer_entropy == 0.0 and result.answer_K == (0,)


def test_equal_and_distinct_answers_reach_the_bounds_of_the_entropy() -> None:
    assert agreement(["x"] * 7, [-1.0] * 7).answer_entropy == 0.0
    distinct = agreement([str(i) for i in range(7)], [-1.0] * 7)
    assert distinct.answer_entropy == pytest.approx(math.log(7)) and distinct.agreement == pytest.approx(1 / 7)


def test_empty_completions_are_an_answer_of_their_own() -> None:
    result = agreement(["", "  ", "no"], [-3.0, -1.0, -0.1])
    assert (result.answer, result.index, result.answers[0].count) == ("", 1, 2)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one completion .* got 0 texts and 0 values"):
        agreement([], [])
    with pytest.raises(ValueError, match="got 2 texts and 1 values"):
        agreement(["a", "b"], [-1.0])
    with pytest.raises(ValueError, match=r"must not be NaN, got \[-1.0, nan\]"):
        agreement(["a", "b"], [-1.0, math.nan])

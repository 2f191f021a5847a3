"""What a notebook shows: tokens with their scores, escaped, and a line about all of it."""

import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from credence.clients import ChatCompletion, Completion, Score, Uncertainty
from credence.clients.display import token_spans
from tests.clients.answers import UNCERTAINTY, chat_completion, completion, score


def token(text: str, **changes: Any) -> dict[str, Any]:
    return {"token": text, "logprob": -0.2, "total": 0.5, "epistemic": 0.1, "aleatoric": 0.4} | changes


class Page(HTMLParser):
    """The tags of a page, its text, and for each span its text, title and alpha."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.spans: list[tuple[str, str, float]] = []
        self._open: dict[str, str | None] | None = None
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert {name for name, _ in attrs} <= {"style", "title"}
        self._open = dict(attrs) if tag == "span" else None

    def handle_endtag(self, tag: str) -> None:
        self._open = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open is not None:
            (alpha,) = re.findall(r"rgba\([0-9]+,[0-9]+,[0-9]+,([0-9.]+)\)", str(self._open["style"]))
            self.spans.append((data, str(self._open["title"]), float(alpha)))


def page(answer: Any) -> Page:
    return Page(answer._repr_html_())


def answer(text: str, *tokens: dict[str, Any], **changes: Any) -> Completion:
    body = completion(UNCERTAINTY | {"tokens": list(tokens) or None} | changes)
    body["choices"][0]["text"] = text
    return Completion.model_validate(body)


def test_tokens_are_coloured_by_their_epistemic_score() -> None:
    full = 0.1 * math.log(8)
    tokens = [token(" a", epistemic=0.0), token(" b", epistemic=full / 2), token(" c", epistemic=5.0)]
    shown = page(answer(" a b c", *tokens))
    assert [(text, alpha) for text, _, alpha in shown.spans] == [(" a", 0.0), (" b", 0.28), (" c", 0.55)]
    assert shown.text.startswith(" a b c") and "colour: epistemic, full from 0.21 nats (10% of ln 8)" in shown.text


def test_one_sample_has_no_epistemic_score_so_the_total_colours() -> None:
    shown = page(answer(" a b", token(" a", epistemic=0.0, total=1.0), token(" b", total=0.0), n_effective=1))
    assert [alpha for _, _, alpha in shown.spans] == [0.28, 0.0]
    assert "colour: total, full from 2 nats" in shown.text


def test_the_hover_text_has_the_numbers() -> None:
    (span,) = page(answer("x", token("x", variation_ratio=0.25))).spans
    assert span[1].splitlines() == [
        "epistemic 0.1000 nats",
        "total 0.5000 nats",
        "aleatoric 0.4000 nats",
        "log-probability -0.2000 nats",
        "variation ratio 0.250",
    ]
    (span,) = page(answer("x", token("x", aleatoric=None))).spans
    assert "aleatoric" not in span[1] and "variation" not in span[1]


@pytest.mark.parametrize(
    "text", ['<script>alert("x")</script>', "</div><img src=x onerror=y>", "a & b < c", "'\"&quot;"]
)
def test_whatever_the_model_says_is_only_text(text: str) -> None:
    for tokens in ((), (token(text),), (token(text[:3]), token(text[3:]))):
        shown = page(answer(text, *tokens))
        assert shown.text.startswith(text) and shown.tags <= {"div", "span"}
    hostile = UNCERTAINTY | {"mode": text, "flag": text, "unit": text, "choices": [{"label": text, "prob": 0.5}]}
    assert page(Uncertainty.model_validate(hostile)).tags == {"div"}


def test_without_token_scores_there_is_the_text_and_what_is_known() -> None:
    shown = page(answer("hello"))
    assert shown.spans == [] and shown.text.startswith("helloconfidence 0.830 (calibrated) · total 0.410 nats/token")
    assert "8 of 8 samples, mode ensemble" in shown.text and "colour" not in shown.text
    empty = {"total": None, "aleatoric": None, "epistemic": None, "confidence": None, "flag": "low_confidence"}
    assert page(answer("", **empty)).text == "no confidence · low_confidence · 8 of 8 samples, mode ensemble"
    assert page(Completion.model_validate(completion(None))).text == " text 0"


def test_chats_scores_choices_and_uncertainties_are_shown_too() -> None:
    scores = UNCERTAINTY | {"tokens": [token(" a"), token(" b")]}
    assert page(Score.model_validate(score(scores))).text.startswith(" a bconfidence")
    assert page(Uncertainty.model_validate(scores)).text.startswith(" a bconfidence")
    chat = ChatCompletion.model_validate(chat_completion(scores, None))
    assert " text 0" in page(chat).text and page(chat).text.endswith(" text 1")
    assert page(chat.choices[1]).text == " text 1"
    labels = [{"label": " yes", "prob": 0.9, "std": 0.05}, {"label": " no", "prob": 0.1}]
    assert "' yes' 0.900 ± 0.050 · ' no' 0.100 ·" in page(answer("yes", choices=labels)).text


def test_tokens_are_found_in_the_text() -> None:
    """A token decoded alone may lack its space, or be no text of its own at all."""
    tokens = answer("x", token("Once"), token("\ufffd"), token("upon"), token("upon")).choices[0].uncertainty
    assert tokens is not None and tokens.tokens is not None
    spans = [(part, found.token if found else None) for part, found in token_spans("Once é upon upon!", tokens.tokens)]
    assert spans == [("Once", "Once"), (" é ", None), ("upon", "upon"), (" ", None), ("upon", "upon"), ("!", None)]
    assert list(token_spans("", ())) == []

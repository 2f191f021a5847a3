"""The playground in a real browser: against a real server, and against a server of this file that asks for a key and lies."""

import asyncio
import contextlib
import io
import json
import re
import shlex
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from credence.serve import playground
from tests.chromium import CTRL, Page, chromium
from tests.servers import Server

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROMPT = "w1 w2 w3 w40 w5"
K = 8
DONE = "document.querySelector('#status').textContent.startsWith('done')"
FAILED = "document.querySelector('#status').textContent === 'failed'"
TOKENS = "[...document.querySelectorAll('#tokens [role=option]')]"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture
def page(browser: Page, server: Server) -> Page:
    """The page at the real server, freshly loaded, with the adapter of kind diag."""
    browser.screen(1180, 900)
    browser.open(f"{server.url}/playground")
    browser.wait("document.querySelectorAll('#model option').length === 4")
    browser.evaluate("sessionStorage.clear()")
    browser.problems.clear()
    browser.fill("#model", "diag")
    browser.fill("#prompt", PROMPT)
    browser.fill("#k", str(K))
    browser.fill("#max-tokens", "6")
    return browser


def ask(page: Page) -> None:
    page.click("#send")
    page.wait(DONE)


def answer_of(server: Server, **uncertainty: Any) -> Any:
    """What the API answers to the page's request."""
    options = {"n_samples": K, "return_samples": True, **uncertainty}
    body = {"model": "diag", "prompt": PROMPT, "max_tokens": 6, "temperature": 0, "uncertainty": options}
    return server.complete(**body).json()["choices"][0]


def shown_numbers(page: Page) -> dict[str, str]:
    """The rows of the card."""
    names, values = (
        page.evaluate(f"[...document.querySelectorAll('#card {tag}')].map((n) => n.textContent)")
        for tag in ("dt", "dd")
    )
    return dict(zip(names, values, strict=True))


def nats(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


@pytest.mark.parametrize("mode", ["ensemble", "score", "generate"], ids=str)
def test_the_tokens_have_the_scores_of_the_api(page: Page, server: Server, mode: str) -> None:
    page.fill("#mode", mode)
    ask(page)
    expected = answer_of(server, mode=mode, granularity="token")["uncertainty"]
    assert page.evaluate(f"{TOKENS}.map((n) => n.textContent)") == [token["token"] for token in expected["tokens"]]
    for measure in ("aleatoric", "total", "epistemic"):
        page.click(f"input[value={measure}]")
        labels = page.evaluate(f"{TOKENS}.map((n) => n.ariaLabel)")
        for label, token in zip(labels, expected["tokens"], strict=True):
            assert float(label.rpartition(f"{measure} ")[2].removesuffix(" nats")) == pytest.approx(
                token[measure], abs=0.00101
            )
    page.evaluate(f"{TOKENS}[1].focus()")
    shown, token = shown_numbers(page), expected["tokens"][1]
    assert shown["log-probability"] == nats(token["logprob"])
    strip = page.evaluate("document.querySelector('#card .strip').ariaLabel").rpartition(": ")[2].split(", ")
    assert [float(value) for value in strip] == pytest.approx(token["member_logprobs"], abs=0.0101)
    assert len(strip) == K
    counts = Counter(top["token"] for top in token["member_tops"])
    favourites = page.evaluate("[...document.querySelectorAll('#card .favourites li')].map((n) => n.textContent)")
    shown_counts = sorted(int(favourite.partition(" of ")[0][-1]) for favourite in favourites)
    assert shown_counts == sorted(count for _, count in counts.most_common(5)) and sum(counts.values()) == K
    if mode != "generate":
        others = page.evaluate(
            "[...document.querySelectorAll('#card ol:not(.favourites) li')].map((n) => n.textContent)"
        )
        assert len(others) >= 5 and all(other.endswith("%") for other in others)
    summary = page.evaluate("document.querySelector('#summary').innerText")
    assert nats(expected["total"]) in summary and expected["adapter"]["digest"][:15] in summary
    assert page.problems == []


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_tokens_appear_while_they_are_written(page: Page, endpoint: str) -> None:
    page.click(f"input[value={endpoint}]")
    page.fill("#max-tokens", "24")
    page.evaluate(
        """(() => {
            const list = document.querySelector("#tokens");
            window.seen = [];
            new MutationObserver(() => window.seen.push([list.children.length, document.querySelector("#send").disabled]))
                .observe(list, { childList: true });
        })()"""
    )
    ask(page)
    growing = {count for count, running in page.evaluate("window.seen") if running}
    assert len(growing) >= 5, growing
    assert page.evaluate(f"{TOKENS}.every((n) => / nats$/.test(n.ariaLabel))")
    assert page.problems == []


def test_the_labels_have_bars_with_their_spread(page: Page, server: Server) -> None:
    page.fill("#mode", "choices")
    page.fill("#labels", "w3\nw5 w6\nw9")
    ask(page)
    expected = answer_of(server, mode="choices", choices=[" w3", " w5 w6", " w9"])["uncertainty"]
    ranked = sorted(expected["choices"], key=lambda choice: -choice["prob"])
    names, values = (
        page.evaluate(f"[...document.querySelectorAll('.bars .{part}')].map((n) => n.textContent)")
        for part in ("name", "value")
    )
    assert names == [choice["label"].strip() for choice in ranked]
    assert values == [f"{100 * choice['prob']:.1f} % ± {100 * choice['std']:.1f} %" for choice in ranked]
    assert page.evaluate("document.querySelectorAll('.bars .whisker').length") == 3
    assert page.evaluate("document.querySelectorAll('.bars .tick').length") == 3 * K
    assert page.problems == []


def test_the_mean_and_the_base_answer_without_scores(page: Page) -> None:
    for model, k in (("diag", "0"), ("base", "0")):
        page.fill("#model", model)
        page.fill("#k", k)
        ask(page)
        assert page.evaluate(f"{TOKENS}.length > 0 && {TOKENS}.every((n) => /not scored$/.test(n.ariaLabel))")
    page.fill("#model", "point")
    assert page.evaluate("document.querySelector('#k').max") == "1"
    assert page.problems == []


def test_refusals_are_shown_where_they_arise(page: Page) -> None:
    page.evaluate("document.querySelector('#model').append(new Option('nobody', 'nobody'))")
    page.fill("#model", "nobody")
    page.click("#send")
    page.wait(FAILED)
    error = page.evaluate("document.querySelector('#error').innerText")
    assert "404" in error and "nobody" in error and "does not exist" in error
    assert re.search(r"request id\s+[0-9a-f]{32}", error)
    page.fill("#model", "diag")
    page.fill("#mode", "choices")
    page.fill("#labels", "w3")
    page.click("#send")
    page.wait("document.querySelector('#error').innerText.includes('uncertainty.choices')")
    assert page.evaluate("document.querySelector('#labels').ariaInvalid") == "true"
    page.fill("#labels", "w3\nw4")
    ask(page)
    assert page.evaluate("document.querySelector('#error').hidden && !document.querySelector('[aria-invalid]')")


def test_escape_stops_the_answer_and_the_server(page: Page, server: Server) -> None:
    before = server.metric("credence_client_disconnects_total")
    page.fill("#max-tokens", "180")
    page.click("#send")
    page.wait(f"{TOKENS}.length > 2")
    page.press("Escape")
    page.wait("document.querySelector('#status').textContent.startsWith('stopped after')")
    assert page.evaluate(f"{TOKENS}.length") < 180
    deadline = time.monotonic() + 20
    while server.metric("credence_client_disconnects_total") == before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.metric("credence_client_disconnects_total") == before + 1
    page.fill("#max-tokens", "3")
    ask(page)  # and the next one is answered
    assert page.problems == []


def test_without_a_mouse(page: Page) -> None:
    page.fill("#prompt", "")
    page.evaluate("document.activeElement.blur()")

    def tab_to(condition: str) -> None:
        for _ in range(40):
            page.press("Tab")
            if page.evaluate(f"document.activeElement.matches({condition!r})"):
                assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
                return
        raise AssertionError(f"Tab never came to {condition}")

    tab_to("#prompt")
    page.type(PROMPT)
    page.press("Enter", CTRL)
    page.wait(DONE)
    tab_to("#tokens [role=option]")
    first = page.evaluate("document.querySelector('#card').innerText")
    page.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.index") == "1"
    assert page.evaluate("document.querySelector('#card').innerText") != first
    page.press("Escape")
    assert page.evaluate("document.querySelector('#card').hidden")
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, select, textarea')].filter((n) => !n.labels.length && !n.ariaLabel).map((n) => n.id)"
    )
    assert unnamed == [] and page.problems == []


# Contrast of the text on the strongest colour of a token (WCAG 2.2, 1.4.3), painted as the browser does.
CONTRAST = """(() => {
    const ink = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const luminance = (...colours) => {
        for (const colour of colours) { ink.fillStyle = colour; ink.fillRect(0, 0, 1, 1); }
        const [r, g, b] = [...ink.getImageData(0, 0, 1, 1).data].slice(0, 3).map((value) => value / 255)
            .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const token = getComputedStyle(document.querySelector(".legend .level-5"));
    const panel = getComputedStyle(document.querySelector("section")).backgroundColor;
    const [low, high] = [luminance(token.color), luminance(panel, token.backgroundColor)].sort((a, b) => a - b);
    return [(high + 0.05) / (low + 0.05), luminance(panel)];
})()"""


def test_dark_and_light_can_be_read(page: Page) -> None:
    for dark in (False, True):
        page.screen(1180, 900, dark=dark)
        contrast, panel = page.evaluate(CONTRAST)
        assert contrast > 4.5 and (panel < 0.1) == dark


def test_a_phone_scrolls_down_only(page: Page) -> None:
    page.screen(390, 844)
    page.fill("#labels", "w3\n" + "w" * 80)
    for mode in ("ensemble", "choices", "generate"):
        page.fill("#mode", mode)
        ask(page)
        page.click("#copy-curl")
        page.evaluate(f"{TOKENS}.at(-1)?.focus()")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, mode
    assert page.problems == []


def test_the_curve_is_that_of_the_servers_metrics(page: Page, server: Server) -> None:
    ask(page)
    page.click("#refresh")
    rows = re.findall(
        r'credence_request_duration_seconds_(\w+)\{endpoint="[^"]+",k="8",(?:le="([^"]+)",)?mode="ensemble",outcome="ok"\} (\S+)',
        server.client.get("/metrics").text,
    )
    sums = {"count": 0.0, "sum": 0.0}
    buckets: dict[float, float] = {}
    for name, bound, value in rows:
        if name == "bucket":
            buckets[float(bound)] = buckets.get(float(bound), 0.0) + float(value)
        elif name in sums:
            sums[name] += float(value)
    rank, lower, below, p95 = 0.95 * sums["count"], 0.0, 0.0, None
    for bound, inside in sorted(buckets.items()):
        if inside >= rank:
            p95 = lower + (bound - lower) * (rank - below) / (inside - below)
            break
        lower, below = bound, inside
    assert p95 is not None

    def text(seconds: float) -> str:
        return f"{1000 * seconds:.0f} ms" if seconds < 0.9995 else f"{seconds:.2f} s"

    expected = f"K 8: mean {text(sums['sum'] / sums['count'])}, p95 {text(p95)}"
    page.wait(f"document.querySelector('.curve').ariaLabel.includes({expected!r})", 10)


def test_the_request_can_be_taken_along_without_the_key(page: Page, server: Server) -> None:
    page.fill("#prompt", "w1 'w2' \"w3\" $HOME `w4`\n\\w5 é")
    for key in ("", "sk-secret"):
        page.fill("#key", key)
        page.click("#copy-curl")
        curl = page.evaluate("document.querySelector('#code').textContent")
        page.click("#copy-python")
        python = page.evaluate("document.querySelector('#code').textContent")
        assert "sk-secret" not in curl + python and (
            "CREDENCE_API_KEY" in curl and "CREDENCE_API_KEY" in python
        ) == bool(key)
        assert "sk-secret" not in page.evaluate("location.href")
        if not key:
            words = shlex.split(curl.replace("\\\n", ""))
            body = json.loads(words[words.index("-d") + 1])
            assert words[2] == f"{server.url}/v1/completions" and body["prompt"] == "w1 'w2' \"w3\" $HOME `w4`\n\\w5 é"
            assert server.complete(**body).status_code == 200
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(python, "copied.py", "exec"), {})
            assert "'n_effective': 8" in printed.getvalue()


MARKUP = "<img src=x onerror=document.title='broken'>"
"""What would show in the title if it were taken for markup."""


class Liar:
    """Serves the page, asks for the key ``right``, and answers with markup wherever text can stand."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str | None]] = []
        app = FastAPI()
        app.include_router(playground.router())

        @app.middleware("http")
        async def note(request: Request, call_next: Any) -> Any:
            self.seen.append((str(request.url), request.headers.get("authorization")))
            if request.url.path.startswith("/v1") and request.headers.get("authorization") != "Bearer right":
                error = {"message": f"not this key {MARKUP}", "type": "Unauthorized", "param": None, "code": 401}
                return JSONResponse({"error": error}, 401, {"X-Request-Id": f"r-1 {MARKUP}"})
            return await call_next(request)

        @app.get("/v1/models")
        async def models() -> Any:
            posterior = {
                "kind": MARKUP,
                "method": MARKUP,
                "digest": MARKUP,
                "tau": 1.0,
                "default_n_samples": 2,
                "max_n_samples": 4,
            }
            return {"data": [{"id": MARKUP, "posterior": posterior}]}

        @app.get("/metrics")
        async def metrics() -> Any:
            return Response("")

        @app.post("/v1/completions")
        async def complete() -> Any:
            scores = {"logprob": -0.5, "total": 1.0, "aleatoric": 0.8, "epistemic": 0.2, "variation_ratio": 0.5}
            token = {"token": MARKUP, **scores, "member_logprobs": [None, -0.25]}
            logprobs = {
                "tokens": [MARKUP],
                "token_logprobs": [-0.5],
                "top_logprobs": [{MARKUP: -0.5}],
                "text_offset": [0],
            }
            first = {
                "index": 0,
                "text": MARKUP,
                "finish_reason": None,
                "logprobs": logprobs,
                "uncertainty": {"tokens": [token]},
            }
            failure = {"error": {"message": MARKUP, "code": 500}}
            lines = f"data: {json.dumps({'choices': [first]})}\n\ndata: {json.dumps(failure)}\n\n".encode()
            # Cut everywhere: an event may come in any pieces.
            pieces = [lines[start : start + 7] for start in range(0, len(lines), 7)]

            async def slowly() -> AsyncIterator[bytes]:
                for piece in pieces:
                    yield piece
                    await asyncio.sleep(0)

            return StreamingResponse(slowly(), media_type="text/event-stream")

        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run)

    def __enter__(self) -> str:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def __exit__(self, *failure: object) -> None:
        self._server.should_exit = True
        self._thread.join()


def test_a_key_goes_into_the_header_alone_and_text_stays_text(browser: Page) -> None:
    liar = Liar()
    with liar as url:
        browser.open(f"{url}/playground")
        browser.wait("!document.querySelector('#error').hidden")
        error = browser.evaluate("document.querySelector('#error').innerText")
        assert "401" in error and f"not this key {MARKUP}" in error and "r-1" in error
        assert browser.evaluate("document.querySelector('#key').ariaInvalid") == "true"
        browser.fill("#key", "right")
        browser.wait("document.querySelectorAll('#model option').length === 1")
        browser.fill("#prompt", MARKUP)
        browser.problems.clear()
        browser.click("#send")
        browser.wait(FAILED)
        browser.evaluate(f"{TOKENS}[0].focus()")
        assert browser.evaluate("document.querySelector('#card li code').textContent").startswith("<img")
        assert "impossible for 1" in browser.evaluate("document.querySelector('#card').innerText")
        assert browser.evaluate("document.querySelector('#error p').textContent") == MARKUP
        assert browser.evaluate("document.images.length") == 0
        assert browser.evaluate("document.title") == "Credence playground"
        assert browser.problems == []
        assert browser.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
    assert ("Bearer right" in {key for _, key in liar.seen}) and not any("right" in address for address, _ in liar.seen)
    assert {key for address, key in liar.seen if "/playground" in address or "/metrics" in address} == {None}

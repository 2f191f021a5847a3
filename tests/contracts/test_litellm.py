"""LiteLLM against the real server: its `completion` and `text_completion`, with `extra_body`."""

import asyncio
import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.servers import Server

# Without it, importing LiteLLM asks the network for prices.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
litellm: Any = pytest.importorskip(
    "litellm", reason="LiteLLM is not installed; `make test-contracts` installs it, runs this file and removes it"
)

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    # Its own types warn when they are first used; its connections and an event loop stay open until the process ends.
    pytest.mark.filterwarnings(
        "ignore::UserWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
    ),
]

PROMPT = "w1 w2 w3 w40 w5"
USER = [{"role": "user", "content": "w3 w40 w5"}]


@pytest.fixture(scope="module", autouse=True)
def swept() -> Iterator[None]:
    """What LiteLLM leaves open is found here, where its warnings are ignored, and not in another test."""
    yield
    for _ in range(3):
        gc.collect()


@pytest.fixture
def options(server: Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(litellm, "suppress_debug_info", True)
    return {
        "api_base": f"{server.url}/v1",
        "api_key": "none",
        "max_tokens": 3,
        "temperature": 0,
        "extra_body": {"uncertainty": {"n_samples": 2, "granularity": "token"}},
    }


def check(uncertainty: dict[str, Any]) -> None:
    assert uncertainty["n_effective"] == 2 and len(uncertainty["tokens"]) == 3
    assert uncertainty["total"] == pytest.approx(uncertainty["aleatoric"] + uncertainty["epistemic"], abs=1e-6)


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_chat(options: dict[str, Any], provider: str) -> None:
    """LiteLLM keeps what it does not know in `provider_specific_fields` of the choice; in a stream, on the choice itself."""
    answer = litellm.completion(model=f"{provider}/diag", messages=USER, **options)
    check(answer.choices[0].provider_specific_fields["uncertainty"])
    assert answer.usage.completion_tokens == 3
    chunks = list(litellm.completion(model=f"{provider}/diag", messages=USER, stream=True, **options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.choices[0].message.content
    scores = [found for chunk in chunks if (found := getattr(chunk.choices[0], "uncertainty", None))]
    assert [len(each["tokens"]) for each in scores if "mode" not in each] == [1, 1]
    (whole,) = (each for each in scores if "mode" in each)
    check(whole)


def test_asynchronous_chat(options: dict[str, Any]) -> None:
    async def run() -> None:
        answer = await litellm.acompletion(model="openai/diag", messages=USER, **options)
        check(answer.choices[0].provider_specific_fields["uncertainty"])
        stream = await litellm.acompletion(model="openai/diag", messages=USER, stream=True, **options)
        assert [chunk async for chunk in stream if getattr(chunk.choices[0], "uncertainty", None)]

    asyncio.run(run())


def test_text_completion(options: dict[str, Any]) -> None:
    """A stream of it has the text alone: LiteLLM rebuilds its chunks from the fields it knows. docs/client.md says so."""
    answer = litellm.text_completion(model="text-completion-openai/diag", prompt=PROMPT, **options)
    check(answer.choices[0].uncertainty)
    chunks = list(litellm.text_completion(model="text-completion-openai/diag", prompt=PROMPT, stream=True, **options))
    assert "".join(chunk.choices[0].text or "" for chunk in chunks) == answer.choices[0].text
    assert not any(hasattr(chunk.choices[0], "uncertainty") for chunk in chunks)


def test_errors(options: dict[str, Any]) -> None:
    with pytest.raises(litellm.BadRequestError, match="uncertainty.samples") as caught:
        litellm.completion(
            model="openai/diag", messages=USER, **options | {"extra_body": {"uncertainty": {"samples": 4}}}
        )
    assert caught.value.status_code == 400 and caught.value.param == "uncertainty.samples"
    with pytest.raises(litellm.NotFoundError) as missing:
        litellm.completion(model="openai/nobody", messages=USER, **options)
    assert missing.value.status_code == 404

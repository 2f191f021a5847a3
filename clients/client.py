"""The synchronous client: one method per question a caller has for a Credence server.

Retried, with exponential backoff and at most `max_retries` times: a connection that could not be made, and a 429 or
503 that carries Retry-After. Never retried: a request whose outcome is unknown (it was sent, and no answer came),
because the server may have done the work. Logger: `credence.clients.client`, retries at INFO; no prompts, no keys.
"""

import logging
import random
import time
import uuid
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from credence.clients.errors import (
    ConnectionFailedError,
    CredenceError,
    InvalidResponseError,
    RequestTimeoutError,
    StatusError,
    TransportError,
    UncertaintyMissingError,
    error_from_response,
)
from credence.clients.types import (
    Completion,
    CompletionRequest,
    Granularity,
    Mode,
    Model,
    ModelList,
    UncertaintyOptions,
)

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 60.0
DEFAULT_MAX_RETRIES = 2
CONNECT_TIMEOUT_S = 5.0
FIRST_DELAY_S = 0.5
MAX_DELAY_S = 8.0
# A server that asks for more patience than this gets the error raised instead: the caller decides.
MAX_RETRY_AFTER_S = 60.0
# Below the five seconds after which uvicorn closes an idle connection: a request sent into a closing connection
# has an unknown outcome and could not be retried.
KEEPALIVE_EXPIRY_S = 3.0

_TEXT_FIELDS = frozenset({"prompt", "stop", "choices"})
_RETRIED_STATUSES = frozenset({429, 503})

_AnswerT = TypeVar("_AnswerT", bound=BaseModel)


class Client:
    """A connection to one Credence (or plain vLLM) server.

    Usable as a context manager; otherwise call `close`. Threads may share one client.

    Example:
        >>> with Client("http://localhost:8000") as client:
        ...     answer = client.complete("Text: hello\\nLabel:", model="triage", uncertainty=True, max_tokens=1)
        ...     print(answer.text, answer.uncertainty.confidence)
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_retries: int = DEFAULT_MAX_RETRIES,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Prepare the client; nothing is sent yet.

        Args:
            base_url: Address of the server, with or without `/v1`.
            api_key: Sent as a bearer token.
            timeout_s: Longest wait for the answer, in seconds, for each attempt.
            max_retries: Attempts after the first.
            transport: An httpx transport, to test without a network.

        Raises:
            ValueError: If an argument is not usable; the message never contains the key.
        """
        self._base_url = _checked_base_url(base_url)
        if isinstance(timeout_s, bool) or not 0.0 < timeout_s < float("inf"):
            raise ValueError(f"timeout_s is {timeout_s!r}; give a positive number of seconds")
        if isinstance(max_retries, bool) or not isinstance(max_retries, int) or max_retries < 0:
            raise ValueError(f"max_retries is {max_retries!r}; give a whole number, 0 or more")
        if api_key is not None and (not api_key.isascii() or not api_key.isprintable() or not api_key.strip(" ")):
            raise ValueError("api_key is empty or has characters that no HTTP header may carry; give printable ASCII")
        self._max_retries = max_retries
        self._http = httpx.Client(
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key.strip(' ')}"},
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S)),
            limits=httpx.Limits(keepalive_expiry=KEEPALIVE_EXPIRY_S),
            transport=transport,
        )

    def __repr__(self) -> str:
        """Return the address only: the key stays out of logs."""
        return f"Client({self._base_url!r})"

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the client."""
        self.close()

    def close(self) -> None:
        """Close the connections; the client cannot be used afterwards."""
        self._http.close()

    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        model: str,
        uncertainty: bool = False,
        n_samples: int | None = None,
        mode: Mode | None = None,
        tau: float | None = None,
        seed: int | None = None,
        choices: Sequence[str] | None = None,
        granularity: Granularity | None = None,
        return_samples: bool | None = None,
        min_samples: int | None = None,
        threshold: float | None = None,
        calibrated: bool | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        stop: str | Sequence[str] | None = None,
        logprobs: int | None = None,
        n: int | None = None,
        sampling_seed: int | None = None,
    ) -> Completion:
        """Complete a prompt, with the uncertainty of the answer when asked for.

        What is None is left to the server. The options from `n_samples` to `calibrated` need `uncertainty=True` and
        are described at `UncertaintyOptions`; the rest are OpenAI's and vLLM's sampling parameters.

        Args:
            prompt: Text, or token ids.
            model: Name of an adapter (or of the base model, without uncertainty).
            uncertainty: Ask for the uncertainty of every choice.
            seed: Seed of the posterior samples; `sampling_seed` is the one of the token sampling.
            n: Number of completions.

        Returns:
            The completion; with `uncertainty=True` every choice has its `uncertainty`.

        Raises:
            ValueError: An argument is wrong; nothing was sent.
            UncertaintyMissingError: The server ignored the question for uncertainty.
            CredenceError: Anything else that goes wrong; see `credence.clients.errors`.
        """
        options = _given(
            n_samples=n_samples,
            mode=mode,
            tau=tau,
            seed=seed,
            choices=_as_list(choices),
            granularity=granularity,
            return_samples=return_samples,
            min_samples=min_samples,
            threshold=threshold,
            calibrated=calibrated,
        )
        request = _validated(
            CompletionRequest,
            _given(
                model=model,
                prompt=_as_list(prompt),
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                min_p=min_p,
                stop=_as_list(stop),
                logprobs=logprobs,
                n=n,
                seed=sampling_seed,
                uncertainty=_uncertainty_field(uncertainty, options),
            ),
        )
        request_id = uuid.uuid4().hex
        response = self._send("POST", "/v1/completions", request_id, request.model_dump(exclude_none=True))
        completion = _parsed(Completion, response, request_id)
        completion = completion.model_copy(update={"request_id": response.headers.get("x-request-id") or request_id})
        missing = tuple(choice.index for choice in completion.choices if choice.uncertainty is None)
        if uncertainty and missing:
            raise UncertaintyMissingError(
                f"uncertainty was asked for, but choices {list(missing)} of model {model!r} came back without it; "
                "the server is probably a plain vLLM: start it with `credence serve`",
                choice_indices=missing,
                request_id=completion.request_id,
            )
        return completion

    def models(self) -> tuple[Model, ...]:
        """List what the server serves: the base model and every adapter, with its posterior where it has one.

        Raises:
            CredenceError: See `credence.clients.errors`.
        """
        request_id = uuid.uuid4().hex
        return _parsed(ModelList, self._send("GET", "/v1/models", request_id), request_id).data

    def health(self) -> bool:
        """Ask whether the server process is alive (GET /livez); False when it answers 503.

        Raises:
            CredenceError: The server cannot be reached, or answers with another error.
        """
        return self._probe("/livez")

    def ready(self) -> bool:
        """Ask whether the server takes requests (GET /readyz); False when it answers 503.

        Raises:
            CredenceError: The server cannot be reached, or answers with another error.
        """
        return self._probe("/readyz")

    def _probe(self, path: str) -> bool:
        request_id = uuid.uuid4().hex
        response = self._attempt("GET", path, request_id, None)
        if response.status_code == 503:
            return False
        if not response.is_success:
            raise error_from_response(response, request_id=request_id)
        return True

    def _send(self, method: str, path: str, request_id: str, body: dict[str, Any] | None = None) -> httpx.Response:
        retries = 0
        while True:
            error: CredenceError
            try:
                response = self._attempt(method, path, request_id, body)
            except ConnectionFailedError as failed:
                error = failed
            else:
                if response.is_success:
                    return response
                error = error_from_response(response, request_id=request_id)
            delay_s = _delay_before_retry(error, retries)
            if delay_s is None or retries >= self._max_retries:
                raise error
            retries += 1
            logger.info(
                "retry %d of %d of %s %s in %.2f s (%s, request id %s)",
                retries,
                self._max_retries,
                method,
                path,
                delay_s,
                type(error).__name__,
                request_id,
            )
            time.sleep(delay_s)

    def _attempt(self, method: str, path: str, request_id: str, body: dict[str, Any] | None) -> httpx.Response:
        url = self._base_url + path
        try:
            return self._http.request(method, url, json=body, headers={"X-Request-Id": request_id})
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise ConnectionFailedError(
                f"no connection to {self._base_url}: {error or type(error).__name__}; "
                "check the address and that the server is up",
                request_id=request_id,
            ) from error
        except httpx.TimeoutException as error:
            raise RequestTimeoutError(
                f"no answer from {url} within {self._http.timeout.read:g} s; "
                "the server may still be working on it: raise timeout_s, or ask for fewer samples or tokens",
                request_id=request_id,
            ) from error
        except httpx.RequestError as error:
            raise TransportError(
                f"the connection to {self._base_url} broke before the answer was complete: "
                f"{error or type(error).__name__}; whether the server did the work is unknown",
                request_id=request_id,
            ) from error


def _delay_before_retry(error: CredenceError, retries: int) -> float | None:
    """Seconds to wait before the next attempt; None when this error must not be retried."""
    backoff_s = min(MAX_DELAY_S, FIRST_DELAY_S * 2.0**retries) * random.uniform(0.75, 1.0)
    if isinstance(error, ConnectionFailedError):
        return backoff_s
    if not isinstance(error, StatusError) or error.status not in _RETRIED_STATUSES or error.retry_after_s is None:
        return None
    if error.retry_after_s > MAX_RETRY_AFTER_S:
        return None
    return max(error.retry_after_s, backoff_s)


def _checked_base_url(base_url: str) -> str:
    try:
        url = httpx.URL(base_url)
    except (httpx.InvalidURL, TypeError) as error:
        raise ValueError(f"base_url is {base_url!r}; give an address such as http://localhost:8000") from error
    if url.userinfo:
        raise ValueError("base_url carries a user name or password; give the key as api_key instead")
    if url.scheme not in {"http", "https"} or not url.host or url.query or url.fragment:
        raise ValueError(f"base_url is {base_url!r}; give an address such as http://localhost:8000")
    return str(url).rstrip("/").removesuffix("/v1").rstrip("/")


def _uncertainty_field(uncertainty: bool, options: dict[str, Any]) -> UncertaintyOptions | bool | None:
    if not isinstance(uncertainty, bool):
        raise ValueError(
            f"uncertainty is {uncertainty!r}; give True or False, and its options as arguments of their own"
        )
    if not uncertainty:
        if options:
            raise ValueError(f"{', '.join(options)} given without uncertainty=True; add it, or leave the options out")
        return None
    if not options:
        return True
    checked = _validated(UncertaintyOptions, options)
    if checked.n_samples is not None and checked.min_samples is not None and checked.min_samples > checked.n_samples:
        raise ValueError(f"min_samples is {checked.min_samples}, n_samples is {checked.n_samples}; ask for fewer")
    if (checked.mode == "choices") != (checked.choices is not None):
        raise ValueError("mode='choices' and a list of choices belong together; give both or neither")
    return checked


def _given(**arguments: Any) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else value


def _validated(model: type[_AnswerT], arguments: dict[str, Any]) -> _AnswerT:
    """Validate the caller's arguments; the error names each wrong one, and shows its value unless it is text."""
    try:
        return model.model_validate(arguments)
    except ValidationError as error:
        problems: dict[str, str] = {}
        for problem in error.errors(include_url=False):
            # Deeper parts of the place name union members and list positions, which mean nothing to the caller.
            name = str(problem["loc"][0])
            shown = name if name in _TEXT_FIELDS else f"{name} is {arguments.get(name)!r}"
            problems.setdefault(name, f"{shown}: {problem['msg'][:1].lower()}{problem['msg'][1:]}")
        raise ValueError("; ".join(problems.values())) from None


def _parsed(model: type[_AnswerT], response: httpx.Response, request_id: str) -> _AnswerT:
    try:
        return model.model_validate_json(response.content)
    except ValidationError as error:
        # Values are left out: they may be texts.
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'the body'}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"
            for problem in error.errors(include_url=False, include_input=False)
        )
        raise InvalidResponseError(
            f"the answer to {response.request.url.path} is not what this client expects ({problems}); "
            "check that base_url points at a Credence or vLLM server of a matching version",
            status=response.status_code,
            request_id=response.headers.get("x-request-id") or request_id,
        ) from None

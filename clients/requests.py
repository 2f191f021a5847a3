"""Questions to the server: the arguments a caller gives, and the bodies that are made of them.

A wrong argument is a ValueError (a misspelt one a TypeError) before anything is sent; the message names each wrong one and
shows its value, unless the value may hold text of the caller.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Required, TypedDict, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    JsonValue,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)

Mode = Literal["ensemble", "score", "choices", "generate"]
Granularity = Literal["sequence", "token"]
NumSamples = int | Literal["auto"]
Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, object]]

_TOKEN_IDS = "a list of token ids (whole numbers of 0 or more)"
# What may stand in the fields whose values are never shown, or whose alternatives pydantic would list one by one.
_ALLOWED = {
    "prompt": f"give a text, {_TOKEN_IDS}, or a list of texts or of such lists; nothing in it may be empty",
    "completion": f"give a text or {_TOKEN_IDS}, not empty",
    "messages": "give a list of messages such as {'role': 'user', 'content': 'hello'}, at least one",
    "stop": "give a text or a list of texts",
    "choices": "give a list of at least two labels, none of them empty",
    "extra_body": "give a dictionary of JSON values",
    "n_samples": "give a whole number of 1 or more, or 'auto'",
}
_SHOWN = frozenset({"n_samples"})
# Fields whose argument has another name here, because `seed` is the posterior's.
_ARGUMENT_OF_FIELD = {"seed": "sampling_seed"}
_NOT_EXTRA = {"stream": "stream_complete or stream_chat", "stream_options": "stream_complete or stream_chat"}

_RequestT = TypeVar("_RequestT", bound="_Request")


class ScoringOptions(TypedDict, total=False):
    """Options of `score`; what is left out or None is the server's default. See `UncertaintyOptions`."""

    n_samples: NumSamples | None
    tau: float | None
    seed: int | None
    granularity: Granularity | None
    return_samples: bool | None
    min_samples: int | None
    threshold: float | None
    calibrated: bool | None
    stop_confidence: float | None


class GenerationOptions(ScoringOptions, total=False):
    """Options that `complete`, `chat` and their streams share; what is left out or None is the server's default.

    Those from `n_samples` to `stop_confidence`, `mode`, `choices` and `length_normalized` need `uncertainty=True` and are described
    at `UncertaintyOptions`. The others are OpenAI's and vLLM's, except `sampling_seed` (their `seed`, of the choice of tokens) and
    `extra_body`: further fields of the request's body, for what has no argument of its own.
    """

    mode: Mode | None
    choices: Sequence[str] | None
    length_normalized: bool | None
    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    n: int | None
    sampling_seed: int | None
    extra_body: Mapping[str, object] | None


class CompletionArguments(GenerationOptions, total=False):
    """Arguments of `complete` and `stream_complete` beside the prompt.

    Attributes:
        model: Name of an adapter (or of the base model, without uncertainty).
        uncertainty: Ask for the uncertainty of every choice.
        logprobs: Number of most likely tokens to report at each position.
        deadline_s: Seconds for the whole call: all attempts, the waits between them, and reading the answer. None is no limit.
    """

    model: Required[str]
    uncertainty: bool
    logprobs: int | None
    deadline_s: float | None


class ChatArguments(GenerationOptions, total=False):
    """Arguments of `chat` and `stream_chat` beside the messages; see `CompletionArguments`.

    Attributes:
        logprobs: Report the log-probabilities of the answer's tokens.
        top_logprobs: Number of most likely tokens to report at each position.
    """

    model: Required[str]
    uncertainty: bool
    logprobs: bool | None
    top_logprobs: int | None
    deadline_s: float | None


class ScoreArguments(ScoringOptions, total=False):
    """Arguments of `score`: `prompt` and `completion`, or `messages`.

    Attributes:
        model: Name of an adapter.
        prompt: Text, or token ids.
        completion: Text, or token ids, that continues the prompt.
        messages: A conversation whose last message, the assistant's, is scored.
        deadline_s: Seconds for the whole call; see `CompletionArguments`.
    """

    model: Required[str]
    prompt: Prompt | None
    completion: Prompt | None
    messages: Messages | None
    deadline_s: float | None


class MapOptions(TypedDict, total=False):
    """How a `map` goes about its questions.

    Attributes:
        concurrency: Questions under way at once (8).
        progress: Show a progress bar on standard error; None, the default, does so on a terminal and in a notebook.
    """

    concurrency: int
    progress: bool | None


class MapArguments(MapOptions, GenerationOptions, total=False):
    """`MapOptions`, and the arguments of the method that all questions of a `map` share."""

    model: str
    uncertainty: bool
    logprobs: bool | int | None
    top_logprobs: int | None
    deadline_s: float | None


def _check_roles(messages: list[dict[str, JsonValue]]) -> list[dict[str, JsonValue]]:
    if not all(isinstance(message.get("role"), str) and message["role"] for message in messages):
        raise ValueError("every message needs a role")
    return messages


_NonEmpty = Annotated[str, StringConstraints(min_length=1)]
_TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
_Messages = Annotated[list[dict[str, JsonValue]], Field(min_length=1), AfterValidator(_check_roles)]
_Penalty = Annotated[FiniteFloat, Field(ge=-2.0, le=2.0)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class UncertaintyOptions(_Request):
    """How uncertainty is to be computed; what is None is left to the server's default.

    Attributes:
        n_samples: K, the number of posterior samples; `auto` takes as few as settle the decision (not with mode `ensemble`).
        mode: `ensemble` draws every token from the average of the K predictive distributions; `score` takes the mean
            adapter's text and scores it with K teacher-forced passes; `choices` is the posterior predictive over given
            labels; `generate` compares K independent completions.
        tau: Posterior temperature, a factor on the variance; 0 is the mean adapter.
        seed: Posterior seed; omitted, the adapter's fixed sample set answers.
        choices: Labels, with mode `choices`, as they continue the prompt.
        length_normalized: With mode `choices`, divide a label's log-probability by its number of tokens.
        granularity: `token` adds scores per token.
        return_samples: Also return what each sample said (the server may ask for a permission).
        min_samples: Accept an answer from as few samples as this when some fail.
        threshold: The server's `flag` compares the confidence with this probability.
        calibrated: Use the calibration stored with the adapter.
        stop_confidence: With `n_samples="auto"`, the probability with which the decision must be the one of all samples.
    """

    n_samples: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    mode: Mode | None = None
    tau: FiniteFloat | None = Field(default=None, ge=0.0)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    choices: list[_NonEmpty] | None = Field(default=None, min_length=2)
    length_normalized: bool | None = None
    granularity: Granularity | None = None
    return_samples: bool | None = None
    min_samples: int | None = Field(default=None, ge=1)
    threshold: FiniteFloat | None = Field(default=None, ge=0.0, le=1.0)
    calibrated: bool | None = None
    stop_confidence: FiniteFloat | None = Field(default=None, gt=0.5, lt=1.0)


class StreamOptions(_Request):
    """Whether the stream ends with a chunk that carries the usage."""

    include_usage: bool


class _GenerationRequest(_Request):
    model: _NonEmpty
    max_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int | None = Field(default=None, ge=0)
    temperature: FiniteFloat | None = Field(default=None, ge=0.0)
    top_p: FiniteFloat | None = Field(default=None, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: FiniteFloat | None = Field(default=None, ge=0.0, le=1.0)
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: FiniteFloat | None = Field(default=None, gt=0.0)
    logit_bias: dict[Annotated[int, Field(ge=0)], FiniteFloat] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = None
    n: int | None = Field(default=None, ge=1)
    seed: int | None = None
    stream: Literal[True] | None = None
    stream_options: StreamOptions | None = None
    uncertainty: Literal[True] | UncertaintyOptions | None = None


class CompletionRequest(_GenerationRequest):
    """Body of POST /v1/completions, as far as this client sends it (fields and names of OpenAI and vLLM)."""

    prompt: _NonEmpty | _TokenIds | Annotated[list[_NonEmpty] | list[_TokenIds], Field(min_length=1)]
    logprobs: int | None = Field(default=None, ge=0)


class ChatRequest(_GenerationRequest):
    """Body of POST /v1/chat/completions, as far as this client sends it."""

    messages: _Messages
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0)


class ScoreRequest(_Request):
    """Body of POST /v1/uncertainty/score: a prompt and its completion, or a conversation that ends with the answer."""

    model: _NonEmpty
    prompt: _NonEmpty | _TokenIds | None = None
    completion: _NonEmpty | _TokenIds | None = None
    messages: _Messages | None = None
    uncertainty: UncertaintyOptions | None = None


def generation_body(
    request: type[CompletionRequest] | type[ChatRequest],
    arguments: Mapping[str, Any],
    *,
    stream: bool,
    **subject: object,
) -> dict[str, Any]:
    """Build the body of a completion or chat request.

    Args:
        request: What the body is checked against.
        arguments: The caller's, not checked yet.
        stream: Ask for a stream that ends with the usage.
        subject: The prompt or the messages.

    Returns:
        The body, with only what was given.

    Raises:
        ValueError: An argument is wrong.
        TypeError: An argument is unknown or missing.
    """
    given = _known(arguments, CompletionArguments if request is CompletionRequest else ChatArguments)
    uncertainty = given.pop("uncertainty", False)
    if not isinstance(uncertainty, bool):
        raise ValueError(
            f"uncertainty is {uncertainty!r}; give True or False, and its options as arguments of their own"
        )
    asked = {name: given.pop(name) for name in UncertaintyOptions.model_fields if name in given}
    if asked and not uncertainty:
        raise ValueError(f"{', '.join(asked)} given without uncertainty=True; add it, or leave the options out")
    extra = given.pop("extra_body", {})
    if "sampling_seed" in given:
        given["seed"] = given.pop("sampling_seed")
    if uncertainty:
        given["uncertainty"] = _uncertainty_options(asked) if asked else True
    if stream:
        given |= {"stream": True, "stream_options": StreamOptions(include_usage=True)}
    body = _validated(request, given | {name: _plain(value) for name, value in subject.items()})
    return body.model_dump(mode="json", exclude_none=True) | _extra_fields(extra, request)


def score_body(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Build the body of a scoring request.

    Raises:
        ValueError: An argument is wrong, or it is not exactly one of (prompt and completion) and messages.
        TypeError: An argument is unknown or missing.
    """
    given = _known(arguments, ScoreArguments)
    if ("prompt" in given) != ("completion" in given) or ("prompt" in given) == ("messages" in given):
        raise ValueError("score needs either prompt and completion, or messages that end with the assistant's")
    asked = {name: given.pop(name) for name in UncertaintyOptions.model_fields if name in given}
    if asked:
        given["uncertainty"] = _uncertainty_options(asked)
    request = _validated(ScoreRequest, given)
    if request.messages is not None and request.messages[-1]["role"] != "assistant":
        raise ValueError(
            f"the last of messages is from {request.messages[-1]['role']!r}; "
            "the answer to be scored comes last, with the role 'assistant'"
        )
    return request.model_dump(mode="json", exclude_none=True)


def _uncertainty_options(asked: dict[str, Any]) -> UncertaintyOptions:
    checked = _validated(UncertaintyOptions, asked)
    if (checked.mode == "choices") != (checked.choices is not None):
        raise ValueError("mode='choices' and a list of choices belong together; give both or neither")
    if checked.choices is not None and len(set(checked.choices)) < len(checked.choices):
        raise ValueError("choices names a label twice; give each label once")
    if checked.length_normalized is not None and checked.mode != "choices":
        raise ValueError("length_normalized is for mode='choices'; leave it out")
    if checked.n_samples != "auto":
        if checked.stop_confidence is not None:
            raise ValueError("stop_confidence is for n_samples='auto'; leave it out")
        most = checked.n_samples
        if most is not None and checked.min_samples is not None and checked.min_samples > most:
            raise ValueError(f"min_samples is {checked.min_samples}, n_samples is {most}; ask for fewer")
    elif checked.mode == "ensemble":
        raise ValueError(
            "n_samples='auto' is for the modes score, choices and generate; give a number to mode ensemble"
        )
    elif checked.min_samples is not None:
        raise ValueError("min_samples does not go with n_samples='auto'; leave one of them out")
    return checked


def _known(arguments: Mapping[str, Any], allowed: type) -> dict[str, Any]:
    """Return the arguments of the body that are not None, with sequences as lists; refuses names that are not arguments."""
    names = allowed.__annotations__.keys()
    for name in arguments:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(names))}"
            raise TypeError(f"there is no argument {name!r}; {hint}")
    if "model" not in arguments:
        raise TypeError("the argument 'model' is missing; give the name of an adapter")
    given = {name: _plain(value) for name, value in arguments.items() if value is not None}
    given.pop("deadline_s", None)  # the client's own
    return given


def _plain(value: Any) -> Any:
    """Mappings as dictionaries and sequences as lists, at every depth: what the request types take."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
        return [_plain(item) for item in value]
    return value


def _extra_fields(extra: Any, request: type[_Request]) -> dict[str, JsonValue]:
    try:
        fields = TypeAdapter(dict[str, JsonValue]).validate_python(extra, strict=True)
    except ValidationError:
        raise ValueError(f"extra_body: {_ALLOWED['extra_body']}") from None
    own = sorted(set(fields) & set(request.model_fields))
    if own:
        named = _ARGUMENT_OF_FIELD | _NOT_EXTRA
        listed = ", ".join(f"{name} (use {named.get(name, name)})" for name in own)
        raise ValueError(f"extra_body holds what has an argument of its own: {listed}")
    return fields


def _validated(request: type[_RequestT], arguments: dict[str, Any]) -> _RequestT:
    try:
        return request.model_validate(arguments)
    except ValidationError as error:
        problems: dict[str, str] = {}
        for problem in error.errors(include_url=False):
            # Deeper parts of the place name union members and list positions, which mean nothing to the caller.
            field = str(problem["loc"][0])
            name = _ARGUMENT_OF_FIELD.get(field, field) if request is not UncertaintyOptions else field
            shown = name if field in _ALLOWED.keys() - _SHOWN else f"{name} is {arguments.get(field)!r}"
            reason = _ALLOWED.get(field) or problem["msg"][:1].lower() + problem["msg"][1:]
            problems.setdefault(field, f"{shown}: {reason}")
        raise ValueError("; ".join(problems.values())) from None

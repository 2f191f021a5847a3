"""Bodies of uncertainty requests: vLLM's own rules, and what an ensemble does not carry."""

import json
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from credence.serve.errors import BadRequest, ServeError
from credence.serve.schemas import UncertaintyOptions
from credence.serve.vllm_plugin.modes import LABELS_AT_ONCE

RequestT = TypeVar("RequestT", bound=BaseModel)


# Fields that would change what the average means or that an ensemble cannot carry, with their harmless values.
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "prompt_logprobs": (None,),
    "logprob_token_ids": (None, []),
    "use_beam_search": (False,),
    "prompt_embeds": (None,),
    "kv_transfer_params": (None,),
    "ec_transfer_params": (None,),
    "vllm_xargs": (None, {}),
    "repetition_detection": (None,),
    "watermarking": (None, False),
    "thinking_token_budget": (None,),
}


NUMBERS = {"repetition_penalty": (1e-3, 1e3), "temperature": (0.0, 1e6)}
"""Numbers that the worker computes with in float32: one outside its range would end the engine for everybody."""


class ScoreRequest(BaseModel):
    """Body of /v1/uncertainty/score: a prompt and its completion, or a conversation whose last message is the assistant's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    prompt: str | list[Annotated[int, Field(ge=0)]] | None = None
    completion: str | list[Annotated[int, Field(ge=0)]] | None = None
    messages: list[dict[str, Any]] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=128)] | None = None

    @model_validator(mode="after")
    def _one_text(self) -> "ScoreRequest":
        pair = self.prompt is not None and self.completion is not None
        if pair == (self.messages is not None) or (self.messages is not None and (self.prompt or self.completion)):
            raise ValueError("give either prompt and completion, or messages")
        if self.messages is not None:
            last = self.messages[-1] if len(self.messages) > 1 else {}
            if last.get("role") != "assistant" or not isinstance(last.get("content"), str):
                raise ValueError(
                    "messages must be a conversation of at least two, the last one from the assistant with a text as content"
                )
        return self


def parse(kind: type[RequestT], body: dict[str, Any]) -> RequestT:
    """Validates a body by vLLM's own rules (or ours) and refuses what an ensemble does not carry; raises BadRequest."""
    try:
        request = kind.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"]) or None
        raise BadRequest(f"{param or 'request'}: {first['msg']}", param=param) from None
    except (AttributeError, TypeError, KeyError) as error:  # vLLM's validators take the form of some values for granted
        raise BadRequest("a field of the request has a value of the wrong type", param=None) from error
    for field, harmless in UNSUPPORTED.items():
        value = getattr(request, field, harmless[0])
        if value not in harmless:
            raise BadRequest(
                f"{field} = {json.dumps(value, default=str)[:80]} cannot be combined with uncertainty; leave it out",
                param=field,
            )
    for field, (least, most) in NUMBERS.items():
        value = getattr(request, field, None)
        if value is not None and not least <= value <= most:
            raise BadRequest(f"{field} must be {least:g} to {most:g} with uncertainty, got {value:g}", param=field)
    if getattr(request, "echo", False) and getattr(request, "logprobs", None) is not None:
        raise BadRequest("echo with logprobs cannot be combined with uncertainty; leave one out", param="echo")
    for field in ("max_tokens", "max_completion_tokens"):
        value = getattr(request, field, None)
        if value is not None and value < 1:
            raise BadRequest(f"{field} must be 1 or more with uncertainty, got {value}", param=field)
    return request


def num_sequences(request: Any, options: UncertaintyOptions) -> int:
    """How many gangs of all samples a request may run at once."""
    if options.mode == "choices":
        return min(len(options.choices or ()), LABELS_AT_ONCE)
    prompt = getattr(request, "prompt", None)
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return len(prompt) * (request.n or 1)
    return request.n or 1


def from_envelope(response: ErrorResponse) -> ServeError:
    error = ServeError(response.error.message, param=response.error.param)
    error.status, error.kind = int(response.error.code), response.error.type
    if error.status < 500:
        error.reason = "bad_request"
    return error

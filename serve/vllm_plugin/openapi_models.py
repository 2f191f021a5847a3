"""The bodies of requests and answers as the OpenAPI document shows them: vLLM's models with our fields, and our own."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatCompletionResponseChoice,
    ChatCompletionResponseStreamChoice,
    ChatCompletionStreamResponse,
)
from vllm.entrypoints.openai.completion.protocol import (
    CompletionRequest,
    CompletionResponse,
    CompletionResponseChoice,
    CompletionResponseStreamChoice,
    CompletionStreamResponse,
)
from vllm.entrypoints.serve.engine.protocol import ModelCard, UsageInfo

from credence.serve.schemas import Uncertainty, UncertaintyOptions
from credence.serve.vllm_plugin.bodies import ScoreRequest

Asked = Annotated[
    bool | UncertaintyOptions | None,
    Field(
        description="Ask for the uncertainty of every choice: true, or an object of options. Also as the query parameter."
    ),
]


class UncertaintyDetails(BaseModel):
    """Work done under posterior samples, which ``completion_tokens`` does not count."""

    n_samples: int
    sample_prompt_tokens: int
    sample_completion_tokens: int


class Usage(UsageInfo):
    """Token counts; the details only of an answer with uncertainty."""

    uncertainty_details: UncertaintyDetails | None = None


class CompletionBody(CompletionRequest):
    """vLLM's completion request and ``uncertainty``."""

    uncertainty: Asked = None


class ChatCompletionBody(ChatCompletionRequest):
    """vLLM's chat request and ``uncertainty``."""

    uncertainty: Asked = None


class ScoreBody(ScoreRequest):
    """A prompt and its completion, or a conversation whose last message is the assistant's; mode is ``score``."""

    uncertainty: Asked = None


class CompletionChoice(CompletionResponseChoice):
    """A choice; ``uncertainty`` if it was asked for."""

    uncertainty: Uncertainty | None = None


class Completion(CompletionResponse):
    """Answer of /v1/completions."""

    choices: list[CompletionChoice]  # type: ignore[assignment]
    usage: Usage


class ChatChoice(ChatCompletionResponseChoice):
    """A choice; ``uncertainty`` if it was asked for."""

    uncertainty: Uncertainty | None = None


class ChatCompletion(ChatCompletionResponse):
    """Answer of /v1/chat/completions."""

    choices: list[ChatChoice]
    usage: Usage


class CompletionChunkChoice(CompletionResponseStreamChoice):
    """``uncertainty``: the scores of the new tokens (granularity token), and the whole object once per choice."""

    uncertainty: dict[str, Any] | Uncertainty | None = None


class CompletionChunk(CompletionStreamResponse):
    """One event of a streamed completion."""

    choices: list[CompletionChunkChoice]
    usage: Usage | None = None


class ChatChunkChoice(ChatCompletionResponseStreamChoice):
    """``uncertainty``: the scores of the new tokens (granularity token), and the whole object once per choice."""

    uncertainty: dict[str, Any] | Uncertainty | None = None


class ChatCompletionChunk(ChatCompletionStreamResponse):
    """One event of a streamed chat completion."""

    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class Score(BaseModel):
    """Answer of /v1/uncertainty/score."""

    id: str
    object: Literal["uncertainty.score"]
    created: int
    model: str
    usage: Usage
    uncertainty: Uncertainty


class Posterior(BaseModel):
    """The posterior of a served adapter."""

    kind: str
    method: str
    digest: str
    tau: float
    default_n_samples: int
    max_n_samples: int


class Model(ModelCard):
    """A served model; ``posterior`` if it has one."""

    posterior: Posterior | None = None


class Models(BaseModel):
    """Answer of /v1/models."""

    object: Literal["list"]
    data: list[Model]


class Status(BaseModel):
    """A probe's answer: ``alive`` or ``ready``, or the reason why not."""

    status: str


class Version(BaseModel):
    """vLLM's version."""

    version: str


class Adapter(BaseModel):
    """An adapter as its administrator sees it."""

    model_config = ConfigDict(extra="allow")

    name: str
    state: Literal["loading", "ready", "draining", "failed", "removed"]
    reason: str | None = None
    digest: str | None = None
    method: str | None = None
    kind: str | None = None
    alias_of: str | None = None
    requests_in_flight: int = 0
    tau: float | None = None
    default_n_samples: int | None = None
    max_n_samples: int | None = None
    loaded_at: float | None = None


class Adapters(BaseModel):
    """Answer of GET /admin/v1/adapters."""

    object: Literal["list"]
    data: list[Adapter]


class LoadAdapter(BaseModel):
    """An artifact folder of the server, and the name to serve it under; ``replace`` moves a name that is served already."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(max_length=64)]
    path: Annotated[str, Field(min_length=1, max_length=4096)]
    replace: bool = False


class PromoteAdapter(BaseModel):
    """The adapter that answers for the alias from now on."""

    model_config = ConfigDict(extra="forbid")

    target: Annotated[str, Field(max_length=64)]

"""Answers of the server: what is unknown in them is kept.

Answers may gain fields in a newer server; an unknown field is kept and readable as an attribute, never an error. All scores are
in the unit named by `Uncertainty.unit` (nats per token; nats with mode `choices`), and a higher score means more uncertain.
"""

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, model_validator

from credence.clients.scored import Scored


class _Answer(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class SequenceUncertainty(_Answer):
    """Scores of the whole text.

    Attributes:
        mean_logprob: Length-normalised log-probability under the average of the samples, nats per token.
        logprob_std: Standard deviation over the samples of their mean log-probability, nats per token.
        variation_ratio: Share of samples whose most likely token is not the average's, averaged over tokens, in [0, 1].
        max_total: Largest total of a token, nats.
        max_epistemic: Largest epistemic score of a token, nats.
    """

    mean_logprob: FiniteFloat | None = None
    logprob_std: FiniteFloat | None = None
    variation_ratio: FiniteFloat | None = None
    max_total: FiniteFloat | None = None
    max_epistemic: FiniteFloat | None = None


class MemberToken(_Answer):
    """The most likely next token of one sample, and its log-probability there, in nats."""

    token: str
    logprob: FiniteFloat


class TokenUncertainty(_Answer):
    """Scores of one token, in nats; present with granularity `token`.

    Attributes:
        logprob: Log-probability of the token under the average of the samples.
        top_logprob: That of the average's most likely token, in a text that was read (not with mode `ensemble`); equal to
            `logprob` where greedy decoding of the average would say this token.
        member_tops: What each sample would most likely have said in its place, with `return_samples`.
        member_logprobs: The token's log-probability under each sample, with `return_samples`; None where a sample gives it
            probability 0.
    """

    token: str
    logprob: FiniteFloat
    top_logprob: FiniteFloat | None = None
    total: FiniteFloat
    epistemic: FiniteFloat
    aleatoric: FiniteFloat | None = None
    variation_ratio: FiniteFloat | None = None
    member_logprobs: tuple[FiniteFloat | None, ...] | None = None
    member_tops: tuple[MemberToken, ...] | None = None


class ChoiceProbability(_Answer):
    """Posterior predictive probability of one label, and its standard deviation over the samples."""

    label: str
    prob: FiniteFloat
    std: FiniteFloat | None = None


class AnswerShare(_Answer):
    """One distinct answer of mode `generate`, normalised, with the number and the share of the samples that gave it."""

    answer: str
    count: int
    share: FiniteFloat


class SampleAnswer(_Answer):
    """What one posterior sample said, with `return_samples`.

    Attributes:
        index: Number of the sample in its set.
        text: Its own completion (mode `generate`).
        mean_logprob: Its mean log-probability of the text, nats per token.
        probs: Its probability of each label (mode `choices`).
    """

    index: int
    text: str | None = None
    mean_logprob: FiniteFloat | None = None
    probs: dict[str, FiniteFloat] | None = None


class AutoSamples(_Answer):
    """How `n_samples="auto"` went: the numbers of samples tried, and whether the decision was settled before the limit."""

    stages: tuple[int, ...]
    settled: bool


class AdapterReference(_Answer):
    """Which artifact answered: the adapter's name and the digest of its content."""

    name: str
    digest: str


class Uncertainty(_Answer, Scored):
    """Uncertainty of one choice.

    Attributes:
        mode: The mode that was used.
        n_samples: K that was asked for; with `auto`, the most that could have been taken.
        n_effective: Samples that contributed; less than n_samples only where min_samples or `auto` allowed it.
        tau: Posterior temperature that was used.
        seed: Posterior seed that was used.
        confidence: Probability that the answer is right, in [0, 1].
        calibrated: Whether `confidence` went through the adapter's stored calibration.
        flag: The server's verdict, `ok` unless something is to be looked at.
        total: Entropy of the averaged prediction; aleatoric + epistemic. The three are None where no token was generated.
        aleatoric: Mean entropy of the samples' predictions: what no further training data would remove.
        epistemic: Mutual information of prediction and posterior sample: the samples' disagreement.
        unit: Unit of the three scores.
        sequence: Scores of the whole text.
        tokens: Scores of each token, with granularity `token`.
        choices: Probabilities of the labels, with mode `choices`.
        choices_mass: Probability that the model gives to all the labels together, with mode `choices`.
        agreement: With mode `generate`, the share of samples whose normalised answer is the returned one, in (0, 1].
        answers: The distinct answers, with mode `generate`.
        samples: What each sample said, with `return_samples`.
        auto: How many samples were tried, with `n_samples="auto"`.
        adapter: The artifact that answered.
    """

    mode: str
    n_samples: int
    n_effective: int
    tau: FiniteFloat
    total: FiniteFloat | None
    aleatoric: FiniteFloat | None
    epistemic: FiniteFloat | None
    unit: str = "nats/token"
    seed: int | None = None
    confidence: FiniteFloat | None = None
    calibrated: bool | None = None
    flag: str | None = None
    sequence: SequenceUncertainty | None = None
    tokens: tuple[TokenUncertainty, ...] | None = None
    choices: tuple[ChoiceProbability, ...] | None = None
    choices_mass: FiniteFloat | None = None
    agreement: FiniteFloat | None = None
    answers: tuple[AnswerShare, ...] | None = None
    samples: tuple[SampleAnswer, ...] | None = None
    auto: AutoSamples | None = None
    adapter: AdapterReference | None = None

    def _parts(self) -> "Sequence[tuple[str | None, Uncertainty | None]]":
        return ((None, self),)


class Choice(_Answer, Scored):
    """One completion of the prompt; `logprobs` is OpenAI's object, as the server sent it.

    Attributes:
        token_ids: The completion's tokens, where `extra_body={"return_token_ids": True}` asked for them.
    """

    index: int
    text: str
    finish_reason: str | None = None
    token_ids: tuple[int, ...] | None = None
    logprobs: dict[str, JsonValue] | None = None
    uncertainty: Uncertainty | None = None

    def _parts(self) -> Sequence[tuple[str | None, Uncertainty | None]]:
        return ((self.text, self.uncertainty),)


class ChatMessage(_Answer):
    """The assistant's message; further fields of the server (tool calls, reasoning) are kept as attributes."""

    role: str
    content: str | None = None


class ChatChoice(_Answer, Scored):
    """One answer to the conversation; `logprobs` is OpenAI's object, as the server sent it."""

    index: int
    message: ChatMessage
    finish_reason: str | None = None
    logprobs: dict[str, JsonValue] | None = None
    uncertainty: Uncertainty | None = None

    @property
    def text(self) -> str:
        """Content of the message; empty where it has none."""
        return self.message.content or ""

    def _parts(self) -> Sequence[tuple[str | None, Uncertainty | None]]:
        return ((self.text, self.uncertainty),)


class Usage(_Answer):
    """Token counts; work on posterior samples is in `uncertainty_details`, never in `completion_tokens`."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int | None = None
    uncertainty_details: dict[str, JsonValue] | None = None


_ChoiceT = TypeVar("_ChoiceT", Choice, ChatChoice)


class _Generation(_Answer, Scored, Generic[_ChoiceT]):
    id: str
    model: str
    choices: tuple[_ChoiceT, ...] = Field(min_length=1)
    created: int | None = None
    usage: Usage | None = None
    request_id: str | None = None

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text

    @property
    def uncertainty(self) -> Uncertainty | None:
        """Uncertainty of the first choice; None when it was not asked for."""
        return self.choices[0].uncertainty

    def _parts(self) -> Sequence[tuple[str | None, Uncertainty | None]]:
        return tuple((choice.text, choice.uncertainty) for choice in self.choices)


class Completion(_Generation[Choice]):
    """Answer of POST /v1/completions.

    Attributes:
        choices: With a list of P prompts and n completions each, choice p * n + i is the i-th completion of prompt p.
        request_id: Id of the request in the server's log.
    """


class ChatCompletion(_Generation[ChatChoice]):
    """Answer of POST /v1/chat/completions.

    Attributes:
        request_id: Id of the request in the server's log.
    """


class Score(_Answer, Scored):
    """Answer of POST /v1/uncertainty/score: the uncertainty of a completion that the caller gave.

    Attributes:
        request_id: Id of the request in the server's log.
    """

    id: str
    model: str
    uncertainty: Uncertainty
    created: int | None = None
    usage: Usage | None = None
    request_id: str | None = None

    def _parts(self) -> Sequence[tuple[str | None, Uncertainty | None]]:
        return ((None, self.uncertainty),)


class Increment(_Answer):
    """What a choice gained with one chunk of a stream.

    On the wire `uncertainty` is `{"tokens": [...]}` in the chunks before a choice's last, and the whole object in one
    chunk; here the former go to `tokens`, and `uncertainty` is the whole object or None.
    """

    index: int
    finish_reason: str | None = None
    logprobs: dict[str, JsonValue] | None = None
    tokens: tuple[TokenUncertainty, ...] = ()
    uncertainty: Uncertainty | None = None

    @model_validator(mode="before")
    @classmethod
    def _separate_tokens(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("uncertainty"), dict) and "mode" not in data["uncertainty"]:
            return data | {"uncertainty": None, "tokens": data["uncertainty"].get("tokens") or ()}
        return data


class ChoiceIncrement(Increment):
    """What one completion gained with a chunk.

    Attributes:
        text: New text; may be empty.
        tokens: Scores of the tokens that are new (mode `ensemble` with granularity `token`).
        uncertainty: The whole object, in one chunk of each choice.
    """

    text: str = ""


class ChatDelta(_Answer):
    """New parts of the assistant's message."""

    role: str | None = None
    content: str | None = None


class ChatChoiceIncrement(Increment):
    """What one answer gained with a chunk; the fields are those of `ChoiceIncrement`, with `delta` for the text."""

    delta: ChatDelta = ChatDelta()

    @property
    def text(self) -> str:
        """New text; may be empty."""
        return self.delta.content or ""


_IncrementT = TypeVar("_IncrementT", ChoiceIncrement, ChatChoiceIncrement)


class Chunk(_Answer, Generic[_IncrementT]):
    """One piece of a streamed answer."""

    id: str
    model: str
    choices: tuple[_IncrementT, ...]
    created: int | None = None
    usage: Usage | None = None

    @property
    def text(self) -> str:
        """New text of the first choice, empty when this chunk has nothing for it."""
        return "".join(choice.text for choice in self.choices if choice.index == 0)


class CompletionChunk(Chunk[ChoiceIncrement]):
    """One chunk of a streamed completion; `choices` is empty in the one that carries `usage`."""


class ChatCompletionChunk(Chunk[ChatChoiceIncrement]):
    """One chunk of a streamed chat completion; `choices` is empty in the one that carries `usage`."""


class PosteriorInfo(_Answer):
    """The posterior of a served adapter: its kind, the method that trained it, and the server's limits for it."""

    kind: str
    method: str
    digest: str
    tau: FiniteFloat | None = None
    default_n_samples: int | None = None
    max_n_samples: int | None = None


class Model(_Answer):
    """One entry of /v1/models; `posterior` is None for the base model and for adapters without a posterior."""

    id: str
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None
    posterior: PosteriorInfo | None = None


class ModelList(_Answer):
    """Answer of GET /v1/models."""

    data: tuple[Model, ...]


class Adapter(_Answer):
    """An adapter as its administrator sees it.

    Attributes:
        state: `loading`, `ready`, `draining`, `failed` or `removed`.
        reason: Why it failed.
        digest: Digest of the artifact's content.
        alias_of: The adapter that answers for it, where this is an alias.
        requests_in_flight: Requests that it is answering.
        loaded_at: When it became ready, seconds since 1970.
    """

    name: str
    state: str
    reason: str | None = None
    digest: str | None = None
    method: str | None = None
    kind: str | None = None
    alias_of: str | None = None
    requests_in_flight: int = 0
    tau: FiniteFloat | None = None
    default_n_samples: int | None = None
    max_n_samples: int | None = None
    loaded_at: FiniteFloat | None = None


class AdapterList(_Answer):
    """Answer of GET /admin/v1/adapters."""

    data: tuple[Adapter, ...]

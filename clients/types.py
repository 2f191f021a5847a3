"""What goes over the wire: requests that refuse unknown fields, answers that keep them.

Answers may gain fields in a newer server; an unknown field is kept and readable as an attribute, never an error.
All scores are in the unit named by `Uncertainty.unit` (nats per token), and a higher score means more uncertain.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, StringConstraints

Mode = Literal["ensemble", "score", "choices", "generate"]
Granularity = Literal["sequence", "token"]
_NonEmpty = Annotated[str, StringConstraints(min_length=1)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Answer(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class UncertaintyOptions(_Request):
    """How uncertainty is to be computed; what is None is left to the server's default.

    Attributes:
        n_samples: K, the number of posterior samples.
        mode: `ensemble` draws every token from the average of the K predictive distributions; `score` takes the mean
            adapter's text and scores it with K teacher-forced passes; `choices` is the posterior predictive over given
            labels; `generate` compares K independent completions. A server answers 400 to a mode it does not have.
        tau: Posterior temperature, a factor on the variance; 0 is the mean adapter.
        seed: Posterior seed; omitted, the adapter's fixed sample set answers.
        choices: Labels, with mode `choices`.
        granularity: `token` adds scores per token.
        return_samples: Also return what each sample said (the server may ask for a permission).
        min_samples: Accept an answer from as few samples as this when some fail.
        threshold: The server's `flag` compares the confidence with this probability.
        calibrated: Use the calibration stored with the adapter.
    """

    n_samples: int | None = Field(default=None, ge=1)
    mode: Mode | None = None
    tau: FiniteFloat | None = Field(default=None, ge=0.0)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    choices: list[_NonEmpty] | None = Field(default=None, min_length=2)
    granularity: Granularity | None = None
    return_samples: bool | None = None
    min_samples: int | None = Field(default=None, ge=1)
    threshold: FiniteFloat | None = Field(default=None, ge=0.0, le=1.0)
    calibrated: bool | None = None


class CompletionRequest(_Request):
    """Body of POST /v1/completions, as far as this client sends it (fields and names of OpenAI and vLLM)."""

    model: _NonEmpty
    prompt: _NonEmpty | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: FiniteFloat | None = Field(default=None, ge=0.0)
    top_p: FiniteFloat | None = Field(default=None, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: FiniteFloat | None = Field(default=None, ge=0.0, le=1.0)
    stop: str | list[str] | None = None
    logprobs: int | None = Field(default=None, ge=0)
    n: int | None = Field(default=None, ge=1)
    seed: int | None = None
    uncertainty: Literal[True] | UncertaintyOptions | None = None


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


class TokenUncertainty(_Answer):
    """Scores of one token, in nats; present with granularity `token`."""

    token: str
    logprob: FiniteFloat
    total: FiniteFloat
    epistemic: FiniteFloat
    aleatoric: FiniteFloat | None = None
    variation_ratio: FiniteFloat | None = None


class ChoiceProbability(_Answer):
    """Posterior predictive probability of one label, and its standard deviation over the samples."""

    label: str
    prob: FiniteFloat
    std: FiniteFloat | None = None


class AdapterReference(_Answer):
    """Which artifact answered: the adapter's name and the digest of its content."""

    name: str
    digest: str


class Uncertainty(_Answer):
    """Uncertainty of one choice.

    Attributes:
        mode: The mode that was used.
        n_samples: K that was asked for.
        n_effective: Samples that contributed; less than n_samples only where min_samples allowed it.
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
    adapter: AdapterReference | None = None


class Choice(_Answer):
    """One completion of the prompt; `logprobs` is OpenAI's object, as the server sent it."""

    index: int
    text: str
    finish_reason: str | None = None
    logprobs: dict[str, JsonValue] | None = None
    uncertainty: Uncertainty | None = None


class Usage(_Answer):
    """Token counts; work on posterior samples is in `uncertainty_details`, never in `completion_tokens`."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int | None = None
    uncertainty_details: dict[str, JsonValue] | None = None


class Completion(_Answer):
    """Answer of POST /v1/completions.

    Attributes:
        request_id: Id of the request in the server's log.
    """

    id: str
    model: str
    choices: tuple[Choice, ...] = Field(min_length=1)
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

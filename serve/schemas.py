"""The request option ``uncertainty`` and the response object of the same name."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from credence.serve.errors import BadRequest

Mode = Literal["ensemble", "score", "choices", "generate"]
MAX_CHOICES = 256


class UncertaintyOptions(BaseModel):
    """What a request may ask for. Unknown keys are an error that names them.

    Attributes:
        n_samples: K; the server's default if omitted. ``auto`` (not with mode ``ensemble``): as few as settle the decision, at most the
            server's maximum.
        mode: ``ensemble``: every token is drawn from the average of the K predictive distributions. ``score``: the mean adapter's text,
            scored under K samples. ``choices``: the posterior predictive over given labels. ``generate``: K independent completions and
            how far they agree.
        tau: posterior temperature on the variance, 0 = mean; the artifact's fitted value if omitted.
        seed: posterior seed; the adapter's resident sample set if omitted.
        choices: the labels of mode ``choices``, as they continue the prompt (or the label names a classification adapter was trained on).
        length_normalized: with mode ``choices``, divide a label's log-probability by its number of tokens.
        granularity: ``token`` adds the scores of every token.
        return_samples: add what each sample said.
        min_samples: answer with at least this many samples if some cannot be loaded; K if omitted.
        threshold: confidence below which ``flag`` is ``low_confidence``.
        calibrated: apply the stored calibration (temperature or map) to ``confidence``.
        stop_confidence: with ``n_samples: "auto"``, the probability with which the decision must be the one of all samples.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    n_samples: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    mode: Mode = "ensemble"
    tau: float | None = Field(default=None, ge=0)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    choices: (
        Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=2, max_length=MAX_CHOICES)] | None
    ) = None
    length_normalized: bool = False
    granularity: Literal["sequence", "token"] = "sequence"
    return_samples: bool = False
    min_samples: int | None = Field(default=None, ge=1)
    threshold: float | None = Field(default=None, ge=0, le=1)
    calibrated: bool = True
    stop_confidence: float = Field(default=0.95, gt=0.5, lt=1)

    @classmethod
    def parse(cls, value: object) -> "UncertaintyOptions | None":
        """Reads the field's value: true, false, null or an object.

        Returns:
            The options, or None where no uncertainty is asked for.

        Raises:
            BadRequest: names the offending ``uncertainty.<key>``.
        """
        if value is None or value is False:
            return None
        if value is True:
            return cls()
        if not isinstance(value, dict):
            raise BadRequest(
                f"uncertainty must be true, false or an object, got {type(value).__name__}", param="uncertainty"
            )
        try:
            options = cls.model_validate(value, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            # Deeper parts of the place name union members, which mean nothing to the caller.
            key = ".".join(["uncertainty", *(str(part) for part in first["loc"][:1])])
            if first["type"] == "extra_forbidden":
                message = f"unknown key {key}; allowed are {', '.join(sorted(cls.model_fields))}"
            else:
                message = f"{key}: {first['msg']} (got {first['input']!r:.80})"
            raise BadRequest(message, param=key) from None
        options.check()
        return options

    def check(self) -> None:
        """Checks what single fields cannot; raises BadRequest."""
        if (self.mode == "choices") != (self.choices is not None):
            raise BadRequest(
                "uncertainty.choices (a list of labels) and mode 'choices' belong together; give both or neither",
                param="uncertainty.choices",
            )
        if self.choices is not None and len(set(self.choices)) < len(self.choices):
            raise BadRequest("uncertainty.choices names a label twice", param="uncertainty.choices")
        if self.length_normalized and self.mode != "choices":
            raise BadRequest(
                "uncertainty.length_normalized is for mode 'choices'; leave it out",
                param="uncertainty.length_normalized",
            )
        if self.n_samples != "auto":
            return
        if self.mode == "ensemble":
            raise BadRequest(
                "uncertainty.n_samples 'auto' needs mode 'score', 'choices' or 'generate': in mode 'ensemble' every token takes all "
                "samples; give a number",
                param="uncertainty.n_samples",
            )
        if self.mode == "score" and self.threshold is None:
            raise BadRequest(
                "uncertainty.n_samples 'auto' with mode 'score' decides the flag; give a threshold",
                param="uncertainty.threshold",
            )
        if self.min_samples is not None:
            raise BadRequest(
                "uncertainty.min_samples does not go with n_samples 'auto'; leave one out",
                param="uncertainty.min_samples",
            )


class _Response(BaseModel):
    model_config = ConfigDict(frozen=True)


class SequenceUncertainty(_Response):
    """Sequence scores; nats/token, variation ratio without unit."""

    mean_logprob: float
    logprob_std: float | None
    variation_ratio: float
    max_total: float
    max_epistemic: float


class MemberToken(_Response):
    """The most likely next token of one sample, and its log-probability there, nats."""

    token: str
    logprob: float


class TokenUncertainty(_Response):
    """Scores of one token, nats; ``top_logprob``, of the average's most likely token, only of a text that was read.

    ``member_logprobs`` (``return_samples``): the token's log-probability under each sample; None where a sample gives it probability 0.
    ``member_tops`` (``return_samples``): what each sample would most likely have said in its place.
    """

    token: str
    logprob: float
    top_logprob: float | None = None
    total: float
    aleatoric: float
    epistemic: float
    variation_ratio: float
    member_logprobs: list[float | None] | None = None
    member_tops: list[MemberToken] | None = None


class ChoiceProbability(_Response):
    """Posterior predictive probability of one label, and its standard deviation over the samples."""

    label: str
    prob: float
    std: float


class Answer(_Response):
    """One distinct answer of mode ``generate``, normalised, and how many samples gave it."""

    answer: str
    count: int
    share: float


class Sample(_Response):
    """What one posterior sample said (``return_samples``); nats/token. ``text`` with mode generate, ``probs`` with mode choices."""

    index: int
    mean_logprob: float | None = None
    text: str | None = None
    probs: dict[str, float] | None = None


class AutoSamples(_Response):
    """How ``n_samples: "auto"`` went: the numbers of samples tried, and whether the rule or the limit ended it."""

    stages: list[int]
    settled: bool


class AdapterIdentity(_Response):
    """Which bytes answered."""

    name: str
    digest: str


OPTIONAL = ("tokens", "choices", "choices_mass", "agreement", "answers", "samples", "auto")


class Uncertainty(_Response):
    """The ``uncertainty`` object of a choice; total = aleatoric + epistemic, means over the tokens (with mode choices: of the label)."""

    mode: str
    n_samples: int
    n_effective: int
    tau: float
    seed: int
    confidence: float | None
    calibrated: bool
    flag: Literal["ok", "low_confidence"]
    total: float | None
    aleatoric: float | None
    epistemic: float | None
    unit: str = "nats/token"
    sequence: SequenceUncertainty | None
    tokens: list[TokenUncertainty] | None = None
    choices: list[ChoiceProbability] | None = None
    choices_mass: float | None = None
    agreement: float | None = None
    answers: list[Answer] | None = None
    samples: list[Sample] | None = None
    auto: AutoSamples | None = None
    adapter: AdapterIdentity

    def to_json(self) -> dict[str, Any]:
        """The object as JSON; without the fields that its mode and options do not have."""
        document = self.model_dump(mode="json")
        for field in OPTIONAL:
            if document[field] is None:
                del document[field]
        for part in (*document.get("samples", ()), *document.get("tokens", ())):
            for field in [name for name, value in part.items() if value is None]:
                del part[field]
        return document

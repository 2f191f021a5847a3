"""The request option ``uncertainty`` and the response object of the same name."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from credence.serve.errors import BadRequest


class UncertaintyOptions(BaseModel):
    """What a request may ask for. Unknown keys are an error that names them.

    Attributes:
        n_samples: K; the server's default if omitted.
        mode: ``ensemble``: every token is drawn from the average of the K predictive distributions.
        tau: posterior temperature on the variance, 0 = mean; the artifact's fitted value if omitted.
        seed: posterior seed; the adapter's resident sample set if omitted.
        granularity: ``token`` adds the scores of every token.
        min_samples: answer with at least this many samples if some cannot be loaded; K if omitted.
        threshold: confidence below which ``flag`` is ``low_confidence``.
        calibrated: apply the stored temperature to ``confidence``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    n_samples: int | None = Field(default=None, ge=1)
    mode: Literal["ensemble"] = "ensemble"
    tau: float | None = Field(default=None, ge=0)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    granularity: Literal["sequence", "token"] = "sequence"
    min_samples: int | None = Field(default=None, ge=1)
    threshold: float | None = Field(default=None, ge=0, le=1)
    calibrated: bool = True

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
            return cls.model_validate(value, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(["uncertainty", *(str(part) for part in first["loc"])])
            if first["type"] == "extra_forbidden":
                message = f"unknown key {key}; allowed are {', '.join(sorted(cls.model_fields))}"
            else:
                message = f"{key}: {first['msg']} (got {first['input']!r:.80})"
            raise BadRequest(message, param=key) from None


class _Response(BaseModel):
    model_config = ConfigDict(frozen=True)


class SequenceUncertainty(_Response):
    """Sequence scores; nats/token, variation ratio without unit."""

    mean_logprob: float
    logprob_std: float | None
    variation_ratio: float
    max_total: float
    max_epistemic: float


class TokenUncertainty(_Response):
    """Scores of one token, nats."""

    token: str
    logprob: float
    total: float
    aleatoric: float
    epistemic: float
    variation_ratio: float


class AdapterIdentity(_Response):
    """Which bytes answered."""

    name: str
    digest: str


class Uncertainty(_Response):
    """The ``uncertainty`` object of a choice; total = aleatoric + epistemic, means over the tokens."""

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
    adapter: AdapterIdentity

    def to_json(self) -> dict[str, Any]:
        """The object as JSON; ``tokens`` only where it was asked for."""
        document = self.model_dump(mode="json")
        if document["tokens"] is None:
            del document["tokens"]
        return document

"""The JSON documents of an artifact: posterior.json, calibration.json and manifest.json (format version 1)."""

from collections.abc import Callable, Collection, Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_serializer, model_validator


class Document(BaseModel):
    """A frozen JSON document that refuses unknown keys and non-finite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CurvePoint(Document):
    """Held-out negative log-likelihood (nats per row) at one value of the fitted quantity."""

    value: float = Field(ge=0)
    nll: float


class Fit(Document):
    """A quantity fitted on held-out data, with the curve it was chosen from."""

    value: float = Field(ge=0)
    nll: float
    curve: tuple[CurvePoint, ...] = ()


class BaseModelRef(Document):
    """The base model the adapter belongs to."""

    name: str
    revision: str | None = None


Kind = Literal["point", "diag", "row", "core", "lowrank", "mask", "ensemble"]


class MemberPosterior(Document):
    """Kind and scalars of the posterior that each member of an ensemble has."""

    kind: Kind
    settings: dict[str, float] = Field(default_factory=dict)


class PosteriorConfig(Document):
    """posterior.json.

    Attributes:
        rank, lora_alpha: of the mean adapter; samples have the same lora_alpha / rank, and of ensembles another rank.
        member: of kind ensemble, the members' own posterior; None where they are points.
        mean: of kind ensemble, what the mean adapter is: the exact mean of the members' products, or the first member.
        settings: the kind's scalars (kind row: epsilon, dof, floor).
        generator: the noise convention, see credence.adapters.sampling.
        default_seed: posterior seed of the resident sample set.
        tau: fitted posterior temperature by number of samples K.
        training: the trainer's own record (settings, labels, data digests, versions).
    """

    format_version: Literal[1] = 1
    kind: Kind
    method: str
    credence_version: str
    base_model: BaseModelRef
    rank: int = Field(ge=1)
    lora_alpha: float = Field(gt=0)
    target_modules: tuple[str, ...]
    settings: dict[str, float] = Field(default_factory=dict)
    member: MemberPosterior | None = None
    mean: Literal["exact", "first member"] = "exact"
    generator: Literal["philox4x64-sha256-numpy-v1"] = "philox4x64-sha256-numpy-v1"
    default_seed: int = Field(default=0, ge=0)
    tau: dict[Annotated[int, Field(ge=1)], Fit] = Field(default_factory=dict)
    training: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _only_ensembles_have_members(self) -> "PosteriorConfig":
        if self.member is not None and self.kind != "ensemble":
            raise ValueError(f"member describes the members of an ensemble, the kind is {self.kind}")
        return self

    def fitted_tau(self, k: int) -> float:
        """The fitted tau of the nearest K (in ratio; the smaller on a tie); 1.0 if none was fitted."""
        return nearest_fit(self.tau, k, default=1.0)


class BeforeAfter(Document):
    """A score of held-out rows (lower is better): of the confidence without the map, and of maps fitted on other rows than they score."""

    before: float = Field(ge=0)
    after: float = Field(ge=0)


class FittedMap(Document):
    """What every map from the score of a generated text to the probability that it is correct has (credence.adapters.calibration).

    Attributes:
        score: mean log-probability of the text's tokens under the average of the K samples, nats.
        temperature: at which the score is taken.
        rows: held-out rows it was fitted on; ``correct`` of them were answered correctly.
        nll: of ``correct`` under the confidence, nats a row.
        brier: mean squared difference between the confidence and ``correct``, in [0, 1].
    """

    score: Literal["mean_logprob"] = "mean_logprob"
    temperature: float = Field(default=1.0, ge=1, le=1)
    rows: int = Field(ge=1)
    correct: int = Field(ge=0)
    nll: BeforeAfter
    brier: BeforeAfter


class PlattMap(FittedMap):
    """P(correct) = 1 / (1 + exp(-(slope score + intercept))); a likelier text is never less likely to be correct."""

    kind: Literal["platt"] = "platt"
    slope: float = Field(ge=0)
    intercept: float


class IsotonicMap(FittedMap):
    """P(correct) is linear between the knots (score, probability) and constant beyond the first and the last."""

    kind: Literal["isotonic"] = "isotonic"
    knots: tuple[tuple[float, Annotated[float, Field(ge=0, le=1)]], ...] = Field(min_length=1)

    @field_validator("knots")
    @classmethod
    def _monotone(cls, knots: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        for (score, probability), (next_score, next_probability) in pairwise(knots):
            if next_score <= score or next_probability < probability:
                raise ValueError(
                    f"the knots must have rising scores and probabilities that never fall, got ({score}, {probability}) before "
                    f"({next_score}, {next_probability})"
                )
        return knots


ConfidenceMap = Annotated[PlattMap | IsotonicMap, Field(discriminator="kind")]


class Calibration(Document):
    """calibration.json, each by number of samples K (K = 0 is the mean adapter).

    Attributes:
        temperature: on the averaged probabilities, above 0.
        maps: of free text, from the score of a generated text to the probability that it is correct; empty for other data.
    """

    temperature: dict[Annotated[int, Field(ge=0)], Fit] = Field(default_factory=dict)
    maps: dict[Annotated[int, Field(ge=0)], ConfidenceMap] = Field(default_factory=dict)

    @field_validator("temperature")
    @classmethod
    def _above_zero(cls, temperature: dict[int, Fit]) -> dict[int, Fit]:
        for k, fit in temperature.items():
            if fit.value == 0:
                raise ValueError(f"the temperature of K = {k} is 0, and logits are divided by it")
        return temperature

    def fitted_temperature(self, k: int) -> float:
        """The fitted temperature: K = 0 has its own, other K use the nearest in ratio; 1.0 if none was fitted."""
        if k == 0:
            return self.temperature[0].value if 0 in self.temperature else 1.0
        return nearest_fit({key: fit for key, fit in self.temperature.items() if key > 0}, k, default=1.0)

    def fitted_map(self, k: int) -> PlattMap | IsotonicMap | None:
        """The map: K = 0 has its own, other K use the nearest in ratio; None if none was fitted."""
        if k == 0:
            return self.maps.get(0)
        fitted = [key for key in self.maps if key > 0]
        return self.maps[nearest_k(fitted, k)] if fitted else None

    @model_serializer(mode="wrap")
    def _without_empty_maps(self, serialise: Callable[["Calibration"], dict[str, Any]]) -> dict[str, Any]:
        # Earlier releases refuse a key they do not know; an artifact without maps stays readable by them.
        document = serialise(self)
        return document if self.maps else {key: value for key, value in document.items() if key != "maps"}


def nearest_fit(fits: Mapping[int, Fit], k: int, default: float) -> float:
    """Value of the fit whose K has the smallest ratio to ``k`` (the smaller K on a tie), or ``default`` without fits."""
    return fits[nearest_k(fits, k)].value if fits else default


def nearest_k(fitted: Collection[int], k: int) -> int:
    """The number of ``fitted`` (one or more) that has the smallest ratio to ``k``; the smaller on a tie."""
    k = max(k, 1)
    return min(sorted(fitted), key=lambda other: max(other, k) / max(min(other, k), 1))


class FileEntry(Document):
    """Size in bytes and SHA-256 of one file; dtype and shape of its tensors."""

    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    tensors: dict[str, tuple[str, tuple[int, ...]]] = Field(default_factory=dict)


class Manifest(Document):
    """manifest.json."""

    format_version: Literal[1] = 1
    files: dict[str, FileEntry]

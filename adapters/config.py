"""The JSON documents of an artifact: posterior.json, calibration.json and manifest.json (format version 1)."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


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
    tau: dict[int, Fit] = Field(default_factory=dict)
    training: dict[str, Any] = Field(default_factory=dict)

    def fitted_tau(self, k: int) -> float:
        """The fitted tau of the nearest K (in ratio; the smaller on a tie); 1.0 if none was fitted."""
        return nearest_fit(self.tau, k, default=1.0)


class Calibration(Document):
    """calibration.json: temperature on the averaged probabilities by number of samples K (K = 0 is the mean adapter)."""

    temperature: dict[int, Fit] = Field(default_factory=dict)

    def fitted_temperature(self, k: int) -> float:
        """The fitted temperature: K = 0 has its own, other K use the nearest in ratio; 1.0 if none was fitted."""
        if k == 0:
            return self.temperature[0].value if 0 in self.temperature else 1.0
        return nearest_fit({key: fit for key, fit in self.temperature.items() if key > 0}, k, default=1.0)


def nearest_fit(fits: Mapping[int, Fit], k: int, default: float) -> float:
    """Value of the fit whose K has the smallest ratio to ``k`` (the smaller K on a tie), or ``default`` without fits."""
    if not fits:
        return default
    k = max(k, 1)
    return fits[min(sorted(fits), key=lambda other: max(other, k) / max(min(other, k), 1))].value


class FileEntry(Document):
    """Size in bytes and SHA-256 of one file; dtype and shape of its tensors."""

    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    tensors: dict[str, tuple[str, tuple[int, ...]]] = Field(default_factory=dict)


class Manifest(Document):
    """manifest.json."""

    format_version: Literal[1] = 1
    files: dict[str, FileEntry]

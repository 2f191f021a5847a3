"""Bayesian adapters: posteriors over LoRA weights, their artifacts, samples and uncertainty scores."""

from credence.adapters.artifact import Artifact, load_artifact, write_artifact, write_sample
from credence.adapters.config import BaseModelRef, Calibration, CurvePoint, Fit, PosteriorConfig
from credence.adapters.errors import AdapterError, ArtifactError, PosteriorError
from credence.adapters.kinds import KINDS, DiagPosterior, PointPosterior, RowPosterior
from credence.adapters.posterior import LoraFactors, Posterior, draw
from credence.adapters.sampling import NoiseSource
from credence.adapters.uncertainty import SequenceScores, TokenScores, sequence_scores, token_scores

__all__ = [
    "KINDS",
    "AdapterError",
    "Artifact",
    "ArtifactError",
    "BaseModelRef",
    "Calibration",
    "CurvePoint",
    "DiagPosterior",
    "Fit",
    "LoraFactors",
    "NoiseSource",
    "PointPosterior",
    "Posterior",
    "PosteriorConfig",
    "PosteriorError",
    "RowPosterior",
    "SequenceScores",
    "TokenScores",
    "draw",
    "load_artifact",
    "sequence_scores",
    "token_scores",
    "write_artifact",
    "write_sample",
]

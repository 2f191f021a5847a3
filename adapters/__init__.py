"""Bayesian adapters: posteriors over LoRA weights, their artifacts, samples and uncertainty scores."""

from credence.adapters.adaptive import settled_choice, settled_flag, settled_threshold, stages
from credence.adapters.agreement import Agreement, AnswerCount, agreement, normalise_answer
from credence.adapters.artifact import Artifact, config_of_rank, load_artifact, write_artifact, write_sample
from credence.adapters.calibration import lowest_score, probability_correct
from credence.adapters.choices import ChoiceScores, choice_scores
from credence.adapters.config import (
    BaseModelRef,
    BeforeAfter,
    Calibration,
    CurvePoint,
    Fit,
    IsotonicMap,
    MemberPosterior,
    PlattMap,
    PosteriorConfig,
)
from credence.adapters.errors import REASONS, AdapterError, ArtifactError, KeyFileError, PosteriorError
from credence.adapters.kinds import (
    KINDS,
    CorePosterior,
    DiagPosterior,
    EnsemblePosterior,
    FixedRowPosterior,
    KroneckerPosterior,
    LowRankPosterior,
    MaskPosterior,
    PointPosterior,
    RowPosterior,
)
from credence.adapters.merged import MergedModel, delta, is_merged, load_merged, merge, write_delta
from credence.adapters.posterior import LoraFactors, Posterior, draw
from credence.adapters.sampling import NoiseSource
from credence.adapters.signature import TrustRoot, generate_key, load_key, save_key, sign, verify_signature
from credence.adapters.uncertainty import SequenceScores, TokenScores, sequence_scores, token_scores

__all__ = [
    "KINDS",
    "REASONS",
    "AdapterError",
    "Agreement",
    "AnswerCount",
    "Artifact",
    "ArtifactError",
    "BaseModelRef",
    "BeforeAfter",
    "Calibration",
    "ChoiceScores",
    "CorePosterior",
    "CurvePoint",
    "DiagPosterior",
    "EnsemblePosterior",
    "Fit",
    "FixedRowPosterior",
    "IsotonicMap",
    "KeyFileError",
    "KroneckerPosterior",
    "LoraFactors",
    "LowRankPosterior",
    "MaskPosterior",
    "MemberPosterior",
    "MergedModel",
    "NoiseSource",
    "PlattMap",
    "PointPosterior",
    "Posterior",
    "PosteriorConfig",
    "PosteriorError",
    "RowPosterior",
    "SequenceScores",
    "TrustRoot",
    "TokenScores",
    "agreement",
    "choice_scores",
    "config_of_rank",
    "delta",
    "draw",
    "generate_key",
    "is_merged",
    "load_artifact",
    "load_key",
    "load_merged",
    "lowest_score",
    "merge",
    "normalise_answer",
    "probability_correct",
    "save_key",
    "sequence_scores",
    "settled_choice",
    "settled_flag",
    "settled_threshold",
    "sign",
    "stages",
    "token_scores",
    "verify_signature",
    "write_artifact",
    "write_delta",
    "write_sample",
]

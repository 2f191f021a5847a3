"""The kinds of posterior an artifact can hold. A new kind is one file here and one line in ``KINDS``.

Kind ``ensemble`` is not among them: it is made of members of one of these kinds.
"""

from credence.adapters.kinds.core import CorePosterior
from credence.adapters.kinds.diag import DiagPosterior
from credence.adapters.kinds.ensemble import EnsemblePosterior, Member, exact_mean
from credence.adapters.kinds.lowrank import KroneckerCurvature, KroneckerPosterior, LowRankPosterior
from credence.adapters.kinds.mask import MaskPosterior
from credence.adapters.kinds.point import PointPosterior
from credence.adapters.kinds.row import FixedRowPosterior, RowPosterior

KINDS: dict[
    str,
    type[CorePosterior]
    | type[DiagPosterior]
    | type[LowRankPosterior]
    | type[MaskPosterior]
    | type[PointPosterior]
    | type[RowPosterior],
] = {
    cls.kind: cls
    for cls in (CorePosterior, DiagPosterior, LowRankPosterior, MaskPosterior, PointPosterior, RowPosterior)
}

__all__ = [
    "KINDS",
    "CorePosterior",
    "DiagPosterior",
    "FixedRowPosterior",
    "EnsemblePosterior",
    "KroneckerCurvature",
    "KroneckerPosterior",
    "LowRankPosterior",
    "MaskPosterior",
    "Member",
    "PointPosterior",
    "RowPosterior",
    "exact_mean",
]

"""The kinds of posterior an artifact can hold. A new kind is one file here and one line in ``KINDS``."""

from credence.adapters.kinds.diag import DiagPosterior
from credence.adapters.kinds.point import PointPosterior
from credence.adapters.kinds.row import RowPosterior

KINDS: dict[str, type[DiagPosterior] | type[PointPosterior] | type[RowPosterior]] = {
    cls.kind: cls for cls in (DiagPosterior, PointPosterior, RowPosterior)
}

__all__ = ["KINDS", "DiagPosterior", "PointPosterior", "RowPosterior"]

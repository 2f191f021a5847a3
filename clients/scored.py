"""What answers, their choices and uncertainties have in common: whether they are sure enough to be used, and how a notebook shows them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from credence.clients.display import html
from credence.clients.errors import Abstained

if TYPE_CHECKING:
    from credence.clients.types import Uncertainty


class Scored:
    """What has a confidence, or several: an answer, its choices, their uncertainty.

    An answer is trusted where **every** choice has a confidence of at least the threshold. No confidence (uncertainty was not asked
    for, or no token was generated) is never trusted. A confidence that is not calibrated counts as it stands, because what it means
    (docs/serving.md) is known to whoever sets the threshold; mode `generate`, whose confidence is the agreement, never has another.
    `require_calibrated` refuses it.
    """

    def trust(self, threshold: float, *, require_calibrated: bool = False) -> bool:
        """Whether every confidence is at least the threshold.

        Args:
            threshold: Smallest confidence to accept, in [0, 1].
            require_calibrated: Accept only a confidence that went through the adapter's stored calibration.

        Raises:
            ValueError: The threshold is no probability.
        """
        return not self._distrusted(threshold, require_calibrated)

    def require_trust(self, threshold: float, *, require_calibrated: bool = False) -> Self:
        """Return the answer itself where `trust` holds.

        Raises:
            Abstained: It does not hold.
            ValueError: The threshold is no probability.
        """
        distrusted = self._distrusted(threshold, require_calibrated)
        if distrusted:
            confidences = [scores.confidence if scores else None for _, scores in self._parts()]
            known = [confidence for confidence in confidences if confidence is not None]
            raise Abstained(
                f"the answer is not to be trusted at {threshold:g}: "
                + "; ".join(f"choice {index} {why}" for index, why in distrusted.items()),
                answer=self,
                confidence=min(known) if len(known) == len(confidences) else None,
                threshold=threshold,
                choice_indices=tuple(distrusted),
            )
        return self

    def _repr_html_(self) -> str:
        """What IPython shows."""
        return "".join(html(text, scores) for text, scores in self._parts())

    def _parts(self) -> "Sequence[tuple[str | None, Uncertainty | None]]":
        """Text (None: not known) and uncertainty of every choice, in their order."""
        raise NotImplementedError

    def _distrusted(self, threshold: float, require_calibrated: bool) -> dict[int, str]:
        """Why each choice that is not to be trusted is not."""
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold is {threshold!r}; give a probability between 0 and 1")
        found = {}
        for index, (_, scores) in enumerate(self._parts()):
            if scores is None:
                found[index] = "has no uncertainty: ask with uncertainty=True"
            elif scores.confidence is None:
                found[index] = "has no confidence"
            elif scores.confidence < threshold:
                found[index] = f"has confidence {scores.confidence:.3g}"
            elif require_calibrated and scores.calibrated is not True:
                found[index] = f"has confidence {scores.confidence:.3g}, which is not calibrated"
        return found

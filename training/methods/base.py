"""What a training method is: settings, an optimiser, the noise of a step, a complexity term, and the posterior it leaves behind."""

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from credence.adapters.posterior import Posterior
from credence.adapters.sampling import NoiseSource
from credence.training.config import Section
from credence.training.modeling import LoraSite


class MethodDefaults(Section):
    """The values ``train.*`` takes where the configuration leaves them out."""

    learning_rate: float
    weight_decay: float
    max_grad_norm: float


class Method(Protocol):
    """One way to train an adapter. The trainer calls, in this order: ``optimizer`` once; per optimiser step ``begin_step``, then the
    forward and backward passes of all micro-batches, then ``optimizer.step``; ``posteriors`` at the end.

    Attributes:
        name: what ``--method`` calls it.
        kind: posterior kind it leaves in the artifact.
        settings_class: the keys of the configuration's ``method`` section.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    settings_class: ClassVar[type[Section]]
    defaults: ClassVar[MethodDefaults]

    def __init__(self, settings: Any, sites: Sequence[LoraSite]) -> None: ...

    def optimizer(self, *, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        """Builds the optimiser of everything trainable."""
        ...

    def begin_step(self, source: NoiseSource) -> None:
        """Draws the noise of one optimiser step; it holds for all of its forward passes."""
        ...

    def regulariser(self) -> Tensor | None:
        """The term added to the negative log-likelihood (nats per row or token) under the current noise, or None."""
        ...

    def posteriors(self) -> dict[str, Posterior]:
        """The trained posterior of every module."""
        ...

    def posterior_settings(self) -> dict[str, float]:
        """The scalars of the posterior's kind that the artifact stores."""
        ...


def factor_parameters(sites: Sequence[LoraSite]) -> list[nn.Parameter]:
    """All A and B, in the order of the sites."""
    return [parameter for site in sites for parameter in (site.mean.A, site.mean.B)]  # type: ignore[misc]

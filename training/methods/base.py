"""What a training method is: settings, an optimiser, the noise of a step, a complexity term, and the posterior it leaves behind."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from credence.adapters.posterior import LoraFactors, Posterior
from credence.adapters.sampling import NoiseSource
from credence.training.classifier import NO_HEAD, Head
from credence.training.config import Section
from credence.training.modeling import LoraSite, get_factors
from credence.training.predict import Predictor
from credence.training.prompts import Example, collate


class MethodDefaults(Section):
    """The values ``train.*`` takes where the configuration leaves them out."""

    learning_rate: float = 2e-4
    head_learning_rate: float | None = None
    """Of an encoder's classification head; None is ``learning_rate``, which AdamW has for both."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lr_scheduler: str = "linear"


class NoSettings(Section):
    """For methods without settings of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The size of a run.

    Attributes:
        num_steps: optimiser steps.
        steps_per_epoch: optimiser steps that see every row once (the last one may see fewer).
        num_rows: training rows.
        seed: of the run.
        max_grad_norm: for methods that clip gradients themselves; 0 does not clip.
        from_init: whether training starts from a given adapter.
    """

    num_steps: int
    steps_per_epoch: int
    num_rows: int
    seed: int = 0
    max_grad_norm: float = 0.0
    from_init: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRows:
    """The training rows and the trained model, for methods that fit their posterior after the last step.

    Attributes:
        model: the PEFT model; in evaluation mode its forward passes use the mean's A and B.
        sites: its LoRA modules.
        seed: of the run.
        batch_size: rows per forward pass.
    """

    model: Any
    sites: Sequence[LoraSite]
    examples: Sequence[Example]
    pad_token: int
    batch_size: int
    seed: int

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """``input_ids``, ``attention_mask`` and ``labels`` of all rows in the order of the file, on the model's device."""
        for start in range(0, len(self.examples), self.batch_size):
            batch = collate(self.examples[start : start + self.batch_size], self.pad_token)
            yield {name: tensor.to(self.model.device) for name, tensor in batch.items()}

    @property
    def by_head(self) -> bool:
        """Whether a classification head answers the rows."""
        return self.examples[0].by_head

    def predictor(self) -> Predictor:
        """Predictions of the rows under given factors. It overwrites A and B: restore them with ``set_factors``."""
        return Predictor(self.model, list(self.sites), self.pad_token, self.batch_size)


class Method(ABC):
    """One way to train an adapter. The trainer calls, in this order: ``optimizer`` and ``begin_training`` once; for each optimiser
    step ``begin_step``, the forward and backward passes of all micro-batches with ``regulariser``, ``optimizer.step``, ``end_step``;
    at the end ``fit_posterior``, ``mean`` and ``posteriors``.

    Attributes:
        name: what ``--method`` calls it.
        settings_class: the keys of the configuration's ``method`` section.
        defaults: of ``train.*``.
        needs_steps: False for methods that can make a posterior of a given adapter without training (``train.max_steps=0``).
        can_be_member: whether it can train the members of an ensemble, whose modules are factors alone.
        head: of an encoder, the classification head that is trained beside the adapter, with AdamW and without noise; the trainer sets it.
    """

    name: ClassVar[str]
    settings_class: ClassVar[type[Section]] = NoSettings
    defaults: ClassVar[MethodDefaults] = MethodDefaults()
    needs_steps: ClassVar[bool] = True
    can_be_member: ClassVar[bool] = True

    def __init__(self, settings: Any, sites: Sequence[LoraSite]) -> None:
        self.settings = settings
        self.sites = list(sites)
        self.head: Head = NO_HEAD

    @property
    @abstractmethod
    def kind(self) -> str:
        """Posterior kind it leaves in the artifact; a class attribute where it does not depend on the settings."""

    @property
    def trains_head(self) -> bool:
        """Whether steps change the classification head, where there is one."""
        return True

    @property
    def num_members(self) -> int:
        """Adapters trained side by side, each on rows of its own order; 1 but for ensembles."""
        return 1

    def optimizer(self, *, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        """Builds the optimiser of everything trainable; AdamW over A and B unless a method says otherwise."""
        return torch.optim.AdamW(factor_parameters(self.sites), lr=learning_rate, weight_decay=weight_decay)

    def begin_training(self, plan: Plan) -> None:
        """Tells the size of the run, also when it is resumed."""
        return None

    def begin_step(self, source: NoiseSource) -> None:
        """Draws the noise of one optimiser step; it holds for all of its forward passes."""
        return None

    def regulariser(self) -> Tensor | None:
        """The term added to the negative log-likelihood (nats per row or token) under the current noise, or None.

        A scalar, or one number for each member, [M].
        """
        return None

    def end_step(self, step: int) -> None:
        """Called after optimiser step ``step`` (1, 2, ...) has changed the parameters."""
        return None

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside the trainable parameters and the optimiser's state."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores what :meth:`state` returned."""
        return None

    def fit_posterior(self, rows: TrainingRows) -> None:
        """Fits what is not trained by steps, after the last one."""
        return None

    def mean(self) -> dict[str, LoraFactors]:
        """Copies of the mean adapter's factors by module, float32 on the CPU."""
        return get_factors(self.sites)

    def final_head(self) -> dict[str, Tensor]:
        """The classification head that belongs to :meth:`mean`: as it is now, unless a method averages; empty without one."""
        return self.head.tensors()

    @abstractmethod
    def posteriors(self) -> dict[str, Posterior]:
        """The trained posterior of every module, around :meth:`mean`."""

    def current(self, *, posterior: bool) -> tuple[dict[str, LoraFactors], dict[str, Posterior] | None]:
        """What would be left behind if training ended now, for evaluations during the run.

        Of methods that fit their posterior after the last step, and of those that have nothing to average yet, the mean is the model's
        own A and B.

        Args:
            posterior: whether it is asked for.

        Returns:
            The mean, and the posterior, or None if there is none yet or it was not asked for.
        """
        if type(self).fit_posterior is not Method.fit_posterior:
            return get_factors(self.sites), None
        return self.mean(), self.posteriors() if posterior else None

    def posterior_settings(self) -> dict[str, float]:
        """The scalars of the posterior's kind that the artifact stores."""
        return {}

    def posterior_fields(self) -> dict[str, Any]:
        """What posterior.json says of the posterior."""
        return {"kind": self.kind, "settings": self.posterior_settings()}

    @classmethod
    def defaults_for(cls, settings: Section) -> MethodDefaults:
        """``defaults``, where they depend on the settings."""
        return cls.defaults


def factor_parameters(sites: Sequence[LoraSite]) -> list[nn.Parameter]:
    """All A and B, in the order of the sites."""
    return [parameter for site in sites for parameter in (site.mean.A, site.mean.B)]  # type: ignore[misc]

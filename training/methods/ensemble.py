"""Ensembles: M adapters as one posterior (Lakshminarayanan et al., NeurIPS 2017; checkpoints: Huang et al., ICLR 2017).

``deep``: M members of any method, trained side by side over one frozen base. A batch holds the rows of all members, one after the other,
and every LoRA layer multiplies each member's rows by its own factors, so that the base model runs once for all. Member m starts from
seed + m, reads the rows in the order of that seed, draws the noise of that seed and clips its own gradient: it is the adapter that a
run of its method alone with that seed gives, up to rounding, as matrix products of other sizes add up in another order.

``checkpoints``: one run of MAP, whose adapter is kept at evenly spaced steps of the last part of training, the last stage first.

The mean adapter is the first member. The exact mean of the products is no function that was trained: of five members on clinc_domains
it had an accuracy of 0.28, one member 0.48 (stories260K, 4 seeds).

Where we leave the literature: members are LoRA factors over a shared base, and a member may have a posterior of its own (a mixture).
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from credence.adapters.config import MemberPosterior
from credence.adapters.kinds import EnsemblePosterior, Member, PointPosterior, exact_mean
from credence.adapters.posterior import LoraFactors, Posterior
from credence.adapters.sampling import NoiseSource
from credence.training.config import Section
from credence.training.errors import ConfigError
from credence.training.methods.base import Method, MethodDefaults, Plan
from credence.training.modeling import LoraSite, MemberSite, get_factors, initialise


class EnsembleSettings(Section):
    """Settings of ensembles.

    Attributes:
        members: M.
        source: ``deep`` trains M members, ``checkpoints`` keeps M stages of one run of MAP.
        member: method of the members of a deep ensemble.
        settings: the member's own ``method`` section.
        start: of checkpoints, share of the steps before the first one is kept.
        mean: the mean adapter: the first member (of checkpoints the last stage), or the exact mean of the products (rank M r).
    """

    members: int = Field(default=5, ge=2, le=64)
    source: Literal["deep", "checkpoints"] = "deep"
    member: str = "map"
    settings: dict[str, Any] = Field(default_factory=dict)
    start: float = Field(default=0.5, ge=0, lt=1)
    mean: Literal["exact", "first member"] = "first member"

    @field_validator("member")
    @classmethod
    def _can_be_a_member(cls, value: str) -> str:
        from credence.training.methods import METHODS

        able = [name for name, method in METHODS.items() if method.can_be_member]
        if value not in able:
            raise ValueError(f"members of an ensemble can be of the methods {', '.join(able)}")
        return value


class JointOptimizer(torch.optim.Optimizer):
    """The members' optimisers as one; clips the gradient of each member by itself.

    ``param_groups`` are the members' own groups, so a learning-rate scheduler reaches them all.

    Args:
        parameters: of each member.
        max_grad_norm: of each member's gradient; 0 does not clip.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        parameters: Sequence[Sequence[nn.Parameter]],
        *,
        max_grad_norm: float,
    ) -> None:
        super().__init__([{"params": list(itertools.chain(*parameters))}], {})
        self.optimizers = list(optimizers)
        self.parameters = [list(member) for member in parameters]
        self.max_grad_norm = max_grad_norm
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of every member."""
        for optimizer, parameters in zip(self.optimizers, self.parameters, strict=True):
            if self.max_grad_norm > 0:
                nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of every member."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The members' states, in order."""
        return {"members": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        for optimizer, state in zip(self.optimizers, state_dict["members"], strict=True):
            optimizer.load_state_dict(state)
        # Loading replaces the groups.
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


class Ensemble(Method):
    """Trains the members and leaves them as one posterior."""

    name: ClassVar[str] = "ensemble"
    kind: ClassVar[str] = "ensemble"
    settings_class: ClassVar[type[Section]] = EnsembleSettings
    can_be_member: ClassVar[bool] = False

    def __init__(self, settings: EnsembleSettings, sites: Sequence[LoraSite]) -> None:
        from credence.training.methods import method_class, method_settings

        super().__init__(settings, sites)
        self.is_deep = settings.source == "deep"
        if not self.is_deep and (settings.member != "map" or settings.settings):
            raise ConfigError(
                f"method.member is {settings.member!r} and method.settings {settings.settings}; checkpoints are those of map",
                key="method.member",
            )
        member_class = method_class(settings.member)
        member_settings = method_settings(settings.member, settings.settings)
        self.members: list[Method] = []
        self.checkpoints: dict[int, dict[str, LoraFactors]] = {}
        self._kept_after: list[int] = []
        self._max_grad_norm = 0.0
        if not self.is_deep:
            return
        by_member: list[list[LoraSite]] = [[] for _ in range(settings.members)]
        for site in self.sites:
            mean = site.mean
            site.members = [MemberSite(site.name, mean) for _ in range(settings.members)]
            # Registered on PEFT's layer, so that they move and checkpoint with the model.
            site.layer.credence_members = nn.ModuleList([member.layer for member in site.members])
            for factor in (mean.A, mean.B):
                factor.requires_grad_(False)
            for own, member in zip(by_member, site.members, strict=True):
                own.append(member)
        self.members = [member_class(member_settings, own) for own in by_member]

    @classmethod
    def defaults_for(cls, settings: Section) -> MethodDefaults:
        """Those of the members' method."""
        from credence.training.methods import method_class

        assert isinstance(settings, EnsembleSettings)
        return method_class(settings.member).defaults_for(method_settings_of(settings))

    @property
    def num_members(self) -> int:
        """M of a deep ensemble."""
        return max(len(self.members), 1)

    def optimizer(self, *, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        """The members' optimisers."""
        if not self.is_deep:
            return super().optimizer(learning_rate=learning_rate, weight_decay=weight_decay)
        optimizers = [m.optimizer(learning_rate=learning_rate, weight_decay=weight_decay) for m in self.members]
        parameters = [
            [parameter for group in optimizer.param_groups for parameter in group["params"]] for optimizer in optimizers
        ]
        return JointOptimizer(optimizers, parameters, max_grad_norm=self._max_grad_norm)

    def begin_training(self, plan: Plan) -> None:
        """Sets every member to the start of its own seed, unless all start from a given adapter."""
        self._max_grad_norm = plan.max_grad_norm
        for index, member in enumerate(self.members):
            if not plan.from_init:
                initialise(member.sites, plan.seed + index)
            member.begin_training(_of_member(plan, index))
        count, first = self.settings.members, int(self.settings.start * plan.num_steps)
        if not self.is_deep and plan.num_steps - first < count:
            raise ConfigError(
                f"method.members is {count}, and {plan.num_steps - first} of {plan.num_steps} steps lie after method.start; "
                "train more steps or keep fewer checkpoints",
                key="method.members",
            )
        self._kept_after = [first + (index + 1) * (plan.num_steps - first) // count for index in range(count)]

    def begin_step(self, source: NoiseSource) -> None:
        """Draws every member's noise, each with its own seed."""
        for index, member in enumerate(self.members):
            member.begin_step(NoiseSource(source.seed + index, source.index, source.purpose))

    def regulariser(self) -> Tensor | None:
        """The members' terms, [M], or None."""
        terms = [member.regulariser() for member in self.members]
        return torch.stack([term for term in terms if term is not None]) if terms and terms[0] is not None else None

    def end_step(self, step: int) -> None:
        """Keeps a checkpoint if it is time for one."""
        for member in self.members:
            member.end_step(step)
        if not self.is_deep and step in self._kept_after:
            self.checkpoints[step] = get_factors(self.sites)

    def state(self) -> dict[str, Tensor]:
        """The members' states, and the checkpoints."""
        state = {
            f"{index}.{name}": t for index, member in enumerate(self.members) for name, t in member.state().items()
        }
        for step, factors in self.checkpoints.items():
            for module, pair in factors.items():
                state[f"{step}.{module}.A"], state[f"{step}.{module}.B"] = pair.A, pair.B
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores what :meth:`state` returned."""
        for index, member in enumerate(self.members):
            member.load_state({key.partition(".")[2]: t for key, t in state.items() if key.startswith(f"{index}.")})
        if not self.is_deep:
            steps = sorted({int(key.partition(".")[0]) for key in state})
            self.checkpoints = {
                step: {
                    site.name: LoraFactors(A=state[f"{step}.{site.name}.A"], B=state[f"{step}.{site.name}.B"])
                    for site in self.sites
                }
                for step in steps
            }

    def mean(self) -> dict[str, LoraFactors]:
        """The exact mean of the products, or the first member."""
        return self._mean_of(self._pairs())

    def posteriors(self) -> dict[str, Posterior]:
        """The members with their own posteriors."""
        return _posteriors(self._pairs())

    def current(self, *, posterior: bool) -> tuple[dict[str, LoraFactors], dict[str, Posterior] | None]:
        """The members as they are now; of checkpoints those kept so far, before the first one A and B themselves."""
        if not self.is_deep:
            if not self.checkpoints:
                return get_factors(self.sites), None
            return self.mean(), self.posteriors() if posterior else None
        parts = [member.current(posterior=posterior) for member in self.members]
        members = {
            site.name: tuple(
                Member(mean=mean[site.name], posterior=own[site.name] if own else PointPosterior())
                for mean, own in parts
            )
            for site in self.sites
        }
        return self._mean_of(members), _posteriors(members) if posterior else None

    def posterior_fields(self) -> dict[str, Any]:
        """What the members are, and which mean is stored."""
        member = None
        if self.members and self.members[0].kind != "point":
            first = self.members[0].posterior_fields()
            member = MemberPosterior(kind=first["kind"], settings=first["settings"])
        return {"kind": "ensemble", "settings": {}, "member": member, "mean": self.settings.mean}

    def _pairs(self) -> dict[str, tuple[Member, ...]]:
        if not self.is_deep:
            kept: Iterable[tuple[dict[str, LoraFactors], dict[str, Posterior]]] = (
                (factors, {name: PointPosterior() for name in factors})
                for _, factors in sorted(self.checkpoints.items(), reverse=True)
            )
        else:
            kept = ((member.mean(), member.posteriors()) for member in self.members)
        members = list(kept)
        return {
            site.name: tuple(Member(mean=mean[site.name], posterior=own[site.name]) for mean, own in members)
            for site in self.sites
        }

    def _mean_of(self, members: Mapping[str, tuple[Member, ...]]) -> dict[str, LoraFactors]:
        if self.settings.mean == "exact":
            return {name: exact_mean([member.mean for member in group]) for name, group in members.items()}
        return {name: group[0].mean for name, group in members.items()}


def _posteriors(members: Mapping[str, tuple[Member, ...]]) -> dict[str, Posterior]:
    return {name: EnsemblePosterior(members=group) for name, group in members.items()}


def method_settings_of(settings: EnsembleSettings) -> Section:
    """The members' own settings, validated."""
    from credence.training.methods import method_settings

    return method_settings(settings.member, settings.settings)


def _of_member(plan: Plan, index: int) -> Plan:
    return Plan(
        num_steps=plan.num_steps,
        steps_per_epoch=plan.steps_per_epoch,
        num_rows=plan.num_rows,
        seed=plan.seed + index,
        max_grad_norm=0.0,
        from_init=plan.from_init,
    )

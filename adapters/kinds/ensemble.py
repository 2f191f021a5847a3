"""Kind ``ensemble``: M adapters, each of which may carry a posterior of its own (docs/equations.md, section 3.8; any set of LoRAs).

    sample s = member s mod M, or, where members have a posterior, a draw from that of member s mod M

so that K = M samples hold every member once, and K = j M a mixture of M posteriors with equal weights. tau scales the variance of the
members' own posteriors; which member a sample belongs to does not depend on it. tau = 0 is the mean adapter, as of every kind.

The mean of an ensemble is the mean of its products, (1/M) sum_m B_m A_m, which is not the product of the mean factors. It is one LoRA of
rank M r, the factors side by side with B divided by M (:func:`exact_mean`); where that rank is too large the mean adapter is member 0.

Tensors per module: ``A`` [M, r, n_in], ``B`` [M, n_out, r], and the members' own parameters stacked, ``member_<name>`` [M, ...].
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from credence.adapters.errors import PosteriorError
from credence.adapters.kinds.point import PointPosterior
from credence.adapters.posterior import LoraFactors, Noise, Posterior
from credence.adapters.sampling import NoiseSource

PREFIX = "member_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One adapter of an ensemble, in one module.

    Attributes:
        mean: its factors; r may differ from the rank of the ensemble's mean.
        posterior: its own posterior, or a point.
    """

    mean: LoraFactors
    posterior: Posterior


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsemblePosterior:
    """The members of one module, two or more."""

    kind: ClassVar[str] = "ensemble"
    members: tuple[Member, ...]

    @classmethod
    def from_members(
        cls, tensors: Mapping[str, Tensor], build: Callable[[dict[str, Tensor]], Posterior] | None
    ) -> "EnsemblePosterior":
        """Builds the ensemble from its stored tensors.

        Args:
            build: makes a member's posterior of its tensors; None for members that are points.

        Raises:
            PosteriorError: tensors are missing, or not stacked over the same number of members.
        """
        own = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
        if set(tensors) - {PREFIX + name for name in own} != {"A", "B"} or (build is None and own):
            raise PosteriorError(
                f"kind ensemble needs the tensors A and B, and {PREFIX}... where its members have posteriors; got {sorted(tensors)}"
            )
        counts = {name: tensor.shape[0] if tensor.ndim else 0 for name, tensor in tensors.items()}
        if len(set(counts.values())) != 1 or min(counts.values()) < 2:
            raise PosteriorError(
                f"the tensors of kind ensemble are stacked over its members, 2 or more; got {counts}",
                reason="wrong_shape",
            )
        members = []
        for index in range(tensors["A"].shape[0]):
            parameters = {name: tensor[index] for name, tensor in own.items()}
            posterior = build(parameters) if build is not None else PointPosterior()
            members.append(Member(mean=LoraFactors(A=tensors["A"][index], B=tensors["B"][index]), posterior=posterior))
        return cls(members=tuple(members))

    @property
    def has_posteriors(self) -> bool:
        """Whether the members are more than points."""
        return any(member.posterior.kind != "point" for member in self.members)

    def noise(self, source: NoiseSource, module: str, mean: LoraFactors) -> Noise:
        """``member``, the index of the sample's member, and the noise of that member's posterior."""
        index = source.index % len(self.members)
        member = self.members[index]
        return {"member": torch.tensor(index), **member.posterior.noise(source, module, member.mean)}

    def sample(self, mean: LoraFactors, noise: Noise, tau: float = 1.0) -> LoraFactors:
        """The member's factors, or a draw from its posterior: copies, of the members' rank."""
        if tau == 0:
            return mean
        member = self.members[int(noise["member"])]
        drawn = member.posterior.sample(member.mean, noise, tau)
        return LoraFactors(A=drawn.A.clone(), B=drawn.B.clone())

    def tensors(self) -> dict[str, Tensor]:
        """The stacked tensors."""
        stacked = {
            "A": torch.stack([member.mean.A for member in self.members]),
            "B": torch.stack([member.mean.B for member in self.members]),
        }
        own = [member.posterior.tensors() for member in self.members]
        stacked.update({PREFIX + name: torch.stack([tensors[name] for tensors in own]) for name in own[0]})
        return stacked

    def check(self, module: str, mean: LoraFactors) -> None:
        """Raises PosteriorError unless the members fit the module, have one rank, and their own posteriors fit them."""
        n_in, n_out = mean.A.shape[1], mean.B.shape[0]
        rank = self.members[0].mean.rank
        for index, member in enumerate(self.members):
            shapes = tuple(member.mean.A.shape), tuple(member.mean.B.shape)
            if shapes != ((rank, n_in), (n_out, rank)):
                raise PosteriorError(
                    f"member {index} of {module} has factors of shapes {shapes[0]} and {shapes[1]}; the module needs "
                    f"({rank}, {n_in}) and ({n_out}, {rank})",
                    reason="wrong_shape",
                )
            member.posterior.check(f"{module}, member {index}", member.mean)


def exact_mean(members: Sequence[LoraFactors]) -> LoraFactors:
    """The mean of the products, (1/M) sum_m B_m A_m, as one LoRA: A [M r, n_in], B [n_out, M r]."""
    return LoraFactors(
        A=torch.cat([member.A for member in members], dim=0),
        B=torch.cat([member.B for member in members], dim=1) / len(members),
    )

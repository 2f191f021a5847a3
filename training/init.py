"""The adapter a run starts from (``lora.init``): the mean of an artifact, or a PEFT LoRA folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from credence.adapters.artifact import load_artifact
from credence.adapters.files import MANIFEST, MEAN_CONFIG, MEAN_TENSORS, POSTERIOR_CONFIG
from credence.adapters.peft_folder import check_peft_config, factors_of, read_peft_folder
from credence.adapters.posterior import LoraFactors
from credence.training.classifier import Head
from credence.training.config import LoraSettings
from credence.training.errors import ConfigError, ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class StartingAdapter:
    """A plain LoRA to start from.

    Attributes:
        name: of its folder, without the path.
        digest: of the artifact, or of the PEFT folder's two files; ``sha256:<64 hex>``.
        rank, alpha: its r and lora_alpha.
        factors: by module.
        labels, head: of an encoder's artifact, its labels and its classification head; empty for others.
    """

    name: str
    digest: str
    rank: int
    alpha: int | float
    factors: Mapping[str, LoraFactors]
    labels: tuple[str, ...] = ()
    head: Mapping[str, Tensor] = field(default_factory=dict)

    def record(self) -> dict[str, str]:
        """What a checkpoint and the artifact say about it."""
        return {"folder": self.name, "digest": self.digest}

    def load_head(self, head: Head, labels: Sequence[str], *, trains: bool) -> None:
        """Puts this adapter's classification head into ``head``. A LoRA without one leaves the head to training.

        Args:
            labels: of the run.
            trains: whether steps that change it follow.

        Raises:
            ModelError: the heads do not fit, the labels differ, or there is no head and none will be trained.
        """
        if self.head:
            if head.parameters and self.labels != tuple(labels):
                raise ModelError(
                    f"the adapter {self.name} classifies {', '.join(self.labels)}, the data have {', '.join(labels)}; a run that starts "
                    "from its head needs the same labels"
                )
            head.load(self.head)
        elif head.parameters and not trains:
            raise ModelError(
                f"the adapter {self.name} has no classification head and this run trains none; give an artifact that was trained on an "
                "encoder"
            )

    def settings(self, given: LoraSettings, model: Any) -> LoraSettings:
        """The run's LoRA settings: this adapter's r, alpha and modules, and its name in place of the path.

        Short module names are used where they mean exactly this adapter's modules in ``model``, full names otherwise.

        Raises:
            ConfigError: ``given`` sets one of them to something else.
            ModelError: the base model lacks one of the modules.
        """
        names = {name for name, _ in model.named_modules()}
        missing = sorted(set(self.factors) - names)
        if missing:
            raise ModelError(
                f"the adapter {self.name} adapts {len(missing)} modules that the base model does not have, e.g. {missing[0]}: this is "
                "not its base model"
            )
        short = tuple(sorted({name.rpartition(".")[2] for name in self.factors}))
        full = tuple(sorted(self.factors))
        reached = {name for name in names if name.rpartition(".")[2] in short}
        targets = given.target_modules
        fits = {
            "r": given.r == self.rank,
            "alpha": given.alpha == self.alpha,
            "target_modules": not isinstance(targets, str) and set(targets) in (set(short), set(full)),
        }
        own = {"r": self.rank, "alpha": self.alpha, "target_modules": list(short)}
        for key, same in fits.items():
            if key in given.model_fields_set and not same:
                raise ConfigError(
                    f"lora.{key} is {getattr(given, key)!r}; the adapter that lora.init names has {own[key]!r}, and a run that starts "
                    f"from it keeps that: leave lora.{key} out",
                    key=f"lora.{key}",
                )
        return LoraSettings(
            r=self.rank,
            alpha=self.alpha,
            dropout=given.dropout,
            target_modules=short if reached == set(self.factors) else full,
            init=self.name,
        )


def read_start(path: str | Path) -> StartingAdapter:
    """Reads an artifact (verified against its manifest) or a PEFT LoRA folder.

    Raises:
        ArtifactError: the folder is refused; ``reason`` says why.
    """
    folder = Path(path)
    head: Mapping[str, Tensor] = {}
    labels: tuple[str, ...] = ()
    if (folder / MANIFEST).exists() or (folder / POSTERIOR_CONFIG).exists():
        artifact = load_artifact(folder)
        digest, rank, alpha, factors = (
            artifact.digest, artifact.config.rank, artifact.config.lora_alpha, artifact.mean,
        )  # fmt: skip
        if artifact.head:
            head, labels = artifact.head, tuple(artifact.config.training.get("labels", ()))
    else:
        content = read_peft_folder(folder)
        check_peft_config(content.config, folder / MEAN_CONFIG)
        digest, rank, alpha = content.digest, content.config["r"], float(content.config["lora_alpha"])
        factors = factors_of(content.tensors, rank, folder / MEAN_TENSORS)
    return StartingAdapter(
        name=folder.resolve().name,
        digest=digest,
        rank=rank,
        alpha=int(alpha) if float(alpha).is_integer() else alpha,
        factors=factors,
        labels=labels,
        head=head,
    )

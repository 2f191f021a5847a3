"""The base model with its LoRA: loading, the modules that carry an adapter, and logits at chosen positions."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from credence.adapters.artifact import PEFT_PREFIX
from credence.adapters.config import BaseModelRef
from credence.adapters.posterior import LoraFactors, Noise, Posterior
from credence.training.config import LoraSettings
from credence.training.errors import ModelError

ADAPTER = "default"


def load_tokenizer(base: str | Path) -> Any:
    """Loads the base model's tokenizer; never runs code from the model's folder."""
    try:
        return AutoTokenizer.from_pretrained(str(base), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"the tokenizer of {base} cannot be loaded: {_first_line(error)}") from None


def load_base(base: str | Path, dtype: str) -> Any:
    """Loads a causal language model in ``dtype`` (float32 or bfloat16); never runs code from the model's folder."""
    shows_bar = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(str(base), dtype=getattr(torch, dtype), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the base model {base} cannot be loaded as a causal language model: {_first_line(error)}"
        ) from None
    finally:
        if shows_bar:
            hf_logging.enable_progress_bar()
    if getattr(model, "is_quantized", False):
        raise ModelError(f"{base} is a quantised checkpoint; adapters are trained on float32 or bfloat16 base models")
    return model


def base_reference(base: str | Path, model: Any) -> BaseModelRef:
    """Name of the base model (a folder's last part, or the hub id) and the commit it was loaded from, if known."""
    path = Path(base)
    name = path.resolve().name if path.is_dir() else str(base)
    return BaseModelRef(name=name, revision=getattr(model.config, "_commit_hash", None))


def context_length(model: Any) -> int:
    """Longest sequence the model takes, in tokens."""
    return int(getattr(model.config, "max_position_embeddings", None) or 2048)


@dataclass(slots=True)
class LoraSite:
    """One adapted module, its factors as leaf parameters, and the posterior sample that its forward passes use.

    Attributes:
        name: module name without PEFT's prefix, ``model.layers.0.self_attn.q_proj``.
        layer: PEFT's LoRA layer.
        posterior: distribution to sample from in training mode; None uses the mean.
        noise: standard noise of the current optimiser step.
    """

    name: str
    layer: Any
    posterior: Posterior | None = None
    noise: Noise | None = None
    _sampled_B: Tensor | None = None

    @property
    def mean(self) -> LoraFactors:
        """The factors' parameters themselves (leaves, float32)."""
        return LoraFactors(A=self.layer.lora_A[ADAPTER].weight, B=self.layer.lora_B[ADAPTER].weight)

    def sample(self) -> Tensor:
        """Samples both factors with the current noise, keeps B for the product that follows, and returns A.

        The gradient of the loss at the sample reaches the mean and the posterior's own parameters. A recomputed forward pass
        (gradient checkpointing) samples with the same noise.
        """
        if self.posterior is None or self.noise is None:
            raise RuntimeError(f"{self.name} has no noise; the method must draw it before the forward pass")
        factors = self.posterior.sample(self.mean, self.noise)
        self._sampled_B = factors.B
        return factors.A

    def take_B(self) -> Tensor:
        """The B of the sample whose A was used last."""
        assert self._sampled_B is not None, "lora_B ran before lora_A"
        factor, self._sampled_B = self._sampled_B, None
        return factor


class _SampledLinear(nn.Linear):
    """A LoRA factor whose weight in training mode is the site's sample; outside training it is the mean."""

    def __init__(self, site: LoraSite, factor: str, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.site = site
        self.factor = factor
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """x A^T or x B^T."""
        if not self.training or self.site.posterior is None:
            return F.linear(input, self.weight)
        return F.linear(input, self.site.sample() if self.factor == "A" else self.site.take_B())


def add_lora(model: Any, settings: LoraSettings) -> tuple[Any, list[LoraSite]]:
    """Adds a PEFT LoRA (float32) whose factors are sampled in training mode once a site has a posterior.

    Returns:
        The PEFT model and its sites, sorted by name.

    Raises:
        ModelError: no module of the model matches, or one is not a plain linear layer.
    """
    targets = settings.target_modules
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        peft_model = get_peft_model(model, config)
    except ValueError as error:
        names = sorted(
            {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        )
        raise ModelError(
            f"lora.target_modules {targets!r} does not fit the model: {_first_line(error)} Its linear layers are called "
            f"{', '.join(names)}"
        ) from None
    return peft_model, lora_sites(peft_model)


def lora_sites(peft_model: Any) -> list[LoraSite]:
    """Replaces every factor by one that can be sampled and returns the sites, sorted by name."""
    sites = []
    for name, layer in list(peft_model.named_modules()):
        if not hasattr(layer, "lora_A"):
            continue
        if not isinstance(layer, LoraLinear) or layer.lora_variant:
            raise ModelError(f"{name} is a {type(layer).__name__}; adapters of plain linear layers are supported")
        site = LoraSite(name.removeprefix(PEFT_PREFIX), layer)
        for factor, container in (("A", layer.lora_A), ("B", layer.lora_B)):
            container[ADAPTER] = _SampledLinear(site, factor, container[ADAPTER])
        sites.append(site)
    return sorted(sites, key=lambda site: site.name)


def set_factors(sites: list[LoraSite], factors: Mapping[str, LoraFactors]) -> None:
    """Copies factors into the model, for evaluation.

    Raises:
        ModelError: the modules or their shapes are not those of the model.
    """
    names = {site.name for site in sites}
    if names != set(factors):
        difference = sorted(names ^ set(factors))
        raise ModelError(f"the adapter and the base model differ in {len(difference)} modules, e.g. {difference[0]}")
    with torch.no_grad():
        for site in sites:
            for target, source in ((site.mean.A, factors[site.name].A), (site.mean.B, factors[site.name].B)):
                if target.shape != source.shape:
                    raise ModelError(
                        f"{site.name} has a factor of shape {tuple(source.shape)} and the base model needs "
                        f"{tuple(target.shape)}: this is not the adapter's base model"
                    )
                target.copy_(source)


def get_factors(sites: list[LoraSite]) -> dict[str, LoraFactors]:
    """Copies of the mean factors, float32 on the CPU, by module."""
    return {
        site.name: LoraFactors(A=site.mean.A.detach().cpu().clone(), B=site.mean.B.detach().cpu().clone())
        for site in sites
    }


def logits_at(model: Any, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
    """Next-token logits at ``positions`` [P] of every row, [B, P, V].

    The output layer runs at these positions only, where the model offers it: it costs more than the rest of a small model.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    kwargs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        logits: Tensor = model(**kwargs, logits_to_keep=positions).logits
        return logits
    chosen: Tensor = model(**kwargs).logits[:, positions]
    return chosen


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]

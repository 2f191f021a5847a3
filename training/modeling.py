"""The base model with its LoRA: loading, the modules that carry an adapter, and logits at chosen positions."""

import importlib.util
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import logging as hf_logging

from credence.adapters.config import BaseModelRef
from credence.adapters.peft_folder import PEFT_PREFIX
from credence.adapters.posterior import LoraFactors, Noise, Posterior
from credence.adapters.sampling import NoiseSource
from credence.training.config import LoraSettings
from credence.training.errors import ConfigError, ModelError

ADAPTER = "default"
QUANTISED_LAYERS = ("Linear8bitLt", "Linear4bit")
"""PEFT's LoRA layers over bitsandbytes, which is not always installed."""
CAUSAL_MODELS = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
CLASSIFIERS = frozenset(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values())


def load_tokenizer(base: str | Path) -> Any:
    """Loads the base model's tokenizer; never runs code from the model's folder."""
    try:
        return AutoTokenizer.from_pretrained(str(base), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"the tokenizer of {base} cannot be loaded: {first_line(error)}") from None


def load_base(base: str | Path, dtype: str, quantization: str | None = None) -> Any:
    """Loads a causal language model in ``dtype`` (float32 or bfloat16); never runs code from the model's folder.

    Args:
        quantization: ``8bit`` (Dettmers et al., NeurIPS 2022) or ``4bit`` (NF4 with double quantisation; Dettmers et al., NeurIPS 2023)
            quantises the linear layers while loading, with bitsandbytes; the model is then already on its device. Products are computed
            in ``dtype`` (4 bit) or float16 (8 bit).

    Raises:
        ModelError: the model cannot be loaded, or is a quantised checkpoint.
        ConfigError: ``quantization`` is given and bitsandbytes is not installed.
    """
    arguments = {} if quantization is None else _quantised(quantization, dtype)
    with quiet_loading(base, "a causal language model"):
        config = AutoConfig.from_pretrained(str(base), trust_remote_code=False)
        if getattr(config, "quantization_config", None):
            raise ModelError(
                f"{base} is a quantised checkpoint; give the float32 or bfloat16 model it was made of (train.quantization quantises it "
                "while loading)"
            )
        if (config.architectures or [""])[0] in CLASSIFIERS:
            raise ModelError(
                f"{base} is a {config.architectures[0]}, which has a classification head instead of next-token logits; give the causal "
                "language model it was made of, or an encoder"
            )
        return AutoModelForCausalLM.from_pretrained(
            str(base), dtype=getattr(torch, dtype), trust_remote_code=False, **arguments
        )


@contextmanager
def quiet_loading(base: str | Path, what: str) -> Iterator[None]:
    """Lets the block load a model without transformers' progress bar; what transformers refuses becomes a ModelError.

    Args:
        what: the base model is loaded as, for the message.
    """
    shows_bar = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError) as error:
        raise ModelError(f"the base model {base} cannot be loaded as {what}: {first_line(error)}") from None
    finally:
        if shows_bar:
            hf_logging.enable_progress_bar()


def is_encoder(base: str | Path) -> bool:
    """Whether the folder or hub id holds an encoder: a masked language model or a classifier made of one, such as RoBERTa or BERT.

    A model that is stored as a causal language model is none, whatever its family.
    """
    try:
        config = AutoConfig.from_pretrained(str(base), trust_remote_code=False)
    except (OSError, ValueError):
        return False  # load_base says what is wrong
    return (
        config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and config.model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        and not config.is_encoder_decoder
        and not any(name in CAUSAL_MODELS for name in config.architectures or ())
    )


def _quantised(quantization: str, dtype: str) -> dict[str, Any]:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"train.quantization is {quantization} and bitsandbytes is not installed; install it (pip install bitsandbytes), or leave "
            "train.quantization out: train.dtype=bfloat16 halves the base model's memory",
            key="train.quantization",
        )
    if quantization == "8bit":
        settings = BitsAndBytesConfig(load_in_8bit=True)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": settings, "device_map": {"": device}}


def base_reference(base: str | Path, model: Any) -> BaseModelRef:
    """Name of the base model (a folder's last part, or the hub id) and the commit it was loaded from, if known."""
    path = Path(base)
    name = path.resolve().name if path.is_dir() else str(base)
    return BaseModelRef(name=name, revision=getattr(model.config, "_commit_hash", None))


def context_length(model: Any) -> int:
    """Longest sequence the model takes, in tokens."""
    longest = int(getattr(model.config, "max_position_embeddings", None) or 2048)
    for name, module in model.named_modules():
        # RoBERTa and its relatives count positions from behind that of the padding token: 514 of them are 512 tokens.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return longest - int(module.padding_idx) - 1
    return longest


@dataclass(slots=True)
class LoraSite:
    """One adapted module, its factors as leaf parameters, and the posterior sample that its forward passes use.

    Attributes:
        name: module name without PEFT's prefix, ``model.layers.0.self_attn.q_proj``.
        layer: PEFT's LoRA layer.
        posterior: distribution to sample from in training mode; None uses the mean.
        noise: standard noise of the current optimiser step.
        members: the factors of ensemble members that are trained side by side, instead of one pair.
        row_signs: for a number of rows the signs [rows, n_in] and [rows, r] of each row's deviation of A (flipout); None without.
    """

    name: str
    layer: Any
    posterior: Posterior | None = None
    noise: Noise | None = None
    members: "list[MemberSite]" = field(default_factory=list)
    row_signs: Callable[[int], tuple[Tensor, Tensor]] | None = None
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
        factors = self.factors()
        self._sampled_B = factors.B
        return factors.A

    def factors(self) -> LoraFactors:
        """The factors of a training step: the sample where there is a posterior; of members stacked, [M, r, n_in] and [M, n_out, r].

        Raises:
            RuntimeError: there is a posterior and no noise.
        """
        if self.members:
            pairs = [member.factors() for member in self.members]
            return LoraFactors(A=torch.stack([pair.A for pair in pairs]), B=torch.stack([pair.B for pair in pairs]))
        if self.posterior is None:
            return self.mean
        if self.noise is None:
            raise RuntimeError(f"{self.name} has no noise; the method must draw it before the forward pass")
        return self.posterior.sample(self.mean, self.noise)

    def signs(self, rows: int) -> tuple[Tensor, Tensor] | None:
        """The signs of a batch of ``rows`` rows, of members one after the other; None without."""
        if not self.members:
            return None if self.row_signs is None else self.row_signs(rows)
        parts = [member.signs(rows // len(self.members)) for member in self.members]
        drawn = [part for part in parts if part is not None]
        if len(drawn) < len(parts):
            return None
        return torch.cat([inputs for inputs, _ in drawn]), torch.cat([outputs for _, outputs in drawn])

    def take_B(self) -> Tensor:
        """The B of the sample whose A was used last."""
        assert self._sampled_B is not None, "lora_B ran before lora_A"
        factor, self._sampled_B = self._sampled_B, None
        return factor


class MemberSite(LoraSite):
    """One member's factors of a module; ``layer`` is a module of its own that holds them and whatever its method registers."""

    def __init__(self, name: str, mean: LoraFactors) -> None:
        layer = nn.Module()
        layer.register_parameter("A", nn.Parameter(mean.A.detach().clone()))
        layer.register_parameter("B", nn.Parameter(mean.B.detach().clone()))
        super().__init__(name, layer)

    @property
    def mean(self) -> LoraFactors:
        """The member's parameters themselves."""
        return LoraFactors(A=self.layer.A, B=self.layer.B)


class _SampledLinear(nn.Linear):
    """A LoRA factor whose weight in training mode is the site's sample; outside training it is the mean.

    Of a site with M members the rows of a batch are the members' rows one after the other, as many for each.
    """

    def __init__(self, site: LoraSite, factor: str, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.site = site
        self.factor = factor
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """x A^T or x B^T; with signs s and t of the batch's rows x A^T + t * ((s * x) (A_s - A)^T)."""
        if not self.training or (self.site.posterior is None and not self.site.members):
            return F.linear(input, self.weight)
        if self.factor == "B":
            return _product(input, self.site.take_B())
        A_s, signs = self.site.sample(), self.site.signs(input.shape[0])
        if signs is None:
            return _product(input, A_s)
        s, t = (side.view(input.shape[0], *[1] * (input.ndim - 2), -1) for side in signs)
        A = torch.stack([member.mean.A for member in self.site.members]) if self.site.members else self.site.mean.A
        return _product(input, A) + t * _product(s * input, A_s - A)


def _product(input: Tensor, weight: Tensor) -> Tensor:
    """x W^T of a weight [out, in], or of the weights [M, out, in] of M members, whose rows come one after the other."""
    if weight.ndim == 2:
        return F.linear(input, weight)
    rows = input.reshape(weight.shape[0], -1, input.shape[-1])
    return torch.bmm(rows, weight.transpose(1, 2)).reshape(*input.shape[:-1], weight.shape[1])


def add_lora(model: Any, settings: LoraSettings, head: Collection[str] = ()) -> tuple[Any, list[LoraSite]]:
    """Adds a PEFT LoRA (float32) whose factors are sampled in training mode once a site has a posterior.

    Args:
        head: names of the modules of an encoder's classification head, which get no LoRA: they are trained themselves.

    Returns:
        The PEFT model and its sites, sorted by name.

    Raises:
        ModelError: no module of the model matches, or one is not a plain linear layer, or is part of the head.
    """
    targets = settings.target_modules
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        bias="none",
        # PEFT's own class for SEQ_CLS would copy the head into the adapter; the artifact has it in a file of its own.
        task_type=None if is_classifier(model) else "CAUSAL_LM",
        exclude_modules=sorted(head) if head and targets == "all-linear" else None,
    )
    try:
        peft_model = get_peft_model(model, config)
    except ValueError as error:
        names = sorted(
            {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        )
        raise ModelError(
            f"lora.target_modules {targets!r} does not fit the model: {first_line(error)} Its linear layers are called "
            f"{', '.join(names)}"
        ) from None
    sites = lora_sites(peft_model)
    within = [site.name for site in sites if site.name in head]
    if within:
        raise ModelError(
            f"lora.target_modules {targets!r} reaches {within[0]}, a part of the classification head, which is trained as a whole; name "
            "the encoder's layers by more of their names, such as attention.output.dense"
        )
    return peft_model, sites


def lora_sites(peft_model: Any) -> list[LoraSite]:
    """Replaces every factor by one that can be sampled and returns the sites, sorted by name."""
    sites = []
    for name, layer in list(peft_model.named_modules()):
        if not hasattr(layer, "lora_A"):
            continue
        quantised = isinstance(layer, LoraLayer) and type(layer).__name__ in QUANTISED_LAYERS
        if not (isinstance(layer, LoraLinear) or quantised) or layer.lora_variant:
            raise ModelError(f"{name} is a {type(layer).__name__}; adapters of plain linear layers are supported")
        site = LoraSite(name.removeprefix(PEFT_PREFIX), layer)
        for factor, container in (("A", layer.lora_A), ("B", layer.lora_B)):
            container[ADAPTER] = _SampledLinear(site, factor, container[ADAPTER])
        sites.append(site)
    return sorted(sites, key=lambda site: site.name)


def initialise(sites: Sequence[LoraSite], seed: int) -> None:
    """PEFT's start of a LoRA, A uniform on +-1 / sqrt(n_in) and B zero, as a pure function of (seed, module).

    PEFT draws from torch's global generator, so that a module's start depends on how many were made before it.
    """
    source = NoiseSource(seed, 0, "init")
    with torch.no_grad():
        for site in sites:
            A = site.mean.A
            A.copy_((2 * source.uniform(site.name, "A", tuple(A.shape)) - 1) / A.shape[1] ** 0.5)
            site.mean.B.zero_()


def set_factors(sites: Sequence[LoraSite], factors: Mapping[str, LoraFactors]) -> None:
    """Copies factors into the model, for evaluation. Their rank may be another one than the model's own: alpha / r stays.

    Raises:
        ModelError: the modules or their shapes are not those of the model.
    """
    names = {site.name for site in sites}
    if names != set(factors):
        difference = sorted(names ^ set(factors))
        raise ModelError(f"the adapter and the base model differ in {len(difference)} modules, e.g. {difference[0]}")
    with torch.no_grad():
        for site in sites:
            mean, given = site.mean, factors[site.name]
            sizes, expected = (given.A.shape[1], given.B.shape[0]), (mean.A.shape[1], mean.B.shape[0])
            if sizes != expected or given.B.shape[1] != given.rank:
                raise ModelError(
                    f"{site.name} has factors of shapes {tuple(given.A.shape)} and {tuple(given.B.shape)} and the base model needs "
                    f"n_in = {expected[0]} and n_out = {expected[1]}: this is not the adapter's base model"
                )
            for target, source in ((mean.A, given.A), (mean.B, given.B)):
                if target.shape == source.shape:
                    target.copy_(source)
                else:
                    target.data = source.detach().to(device=target.device, dtype=target.dtype, copy=True)


def get_factors(sites: Sequence[LoraSite]) -> dict[str, LoraFactors]:
    """Copies of the mean factors, float32 on the CPU, by module."""
    return {
        site.name: LoraFactors(A=site.mean.A.detach().cpu().clone(), B=site.mean.B.detach().cpu().clone())
        for site in sites
    }


def is_classifier(model: Any) -> bool:
    """Whether a model (without PEFT) has a classification head instead of next-token logits."""
    return type(model).__name__ in CLASSIFIERS


def logits_at(
    model: Any, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, token_type_ids: Tensor | None = None
) -> Tensor:
    """Next-token logits at ``positions`` [P] of every row, [B, P, V]; of a classifier the row's class logits at each of them.

    The output layer runs at these positions only, where the model offers it: it costs more than the rest of a small model.

    Args:
        token_type_ids: of an encoder, which of two texts a token belongs to; models that do not tell them apart do not get it.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if is_classifier(inner):
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        if (getattr(inner.config, "type_vocab_size", None) or 0) < 2:
            types = {}
        classes: Tensor = model(input_ids=input_ids, attention_mask=attention_mask, **types).logits
        return classes[:, None].expand(-1, len(positions), -1)
    kwargs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        logits: Tensor = model(**kwargs, logits_to_keep=positions).logits
        return logits
    chosen: Tensor = model(**kwargs).logits[:, positions]
    return chosen


def next_logits(model: Any, input_ids: Tensor, attention_mask: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """Logits of the token after each row, [B, V], and the model's cache of keys and values, which then holds ``input_ids`` too.

    The cache is of the kind the model makes for itself. Padding at a row's left end has no position and is not attended to.

    Args:
        input_ids: [B, T], the tokens that the cache does not hold.
        attention_mask: [B, cached + T], 0 for padding.
        cache: what an earlier call returned, of the same rows; None for none.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = inspect.signature(inner.forward).parameters
    kwargs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": True}
    if "position_ids" in known:
        positions = (attention_mask.cumsum(-1) - 1).clamp_min(0)
        kwargs["position_ids"] = positions[:, -input_ids.shape[1] :]
    if "logits_to_keep" in known:
        kwargs["logits_to_keep"] = 1
    output = model(**kwargs, past_key_values=cache)
    return output.logits[:, -1], output.past_key_values


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().partition("\n")[0]

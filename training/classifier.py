"""Encoders with a classification head: loading, and the head, which is trained beside the adapter and has no posterior.

The head is what transformers' sequence classifier has outside the encoder, and a pooling layer that the base folder lacks. It is float32
in any case. To the rest of the code a classifier is a model with C logits (credence.training.modeling.logits_at).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging as hf_logging

from credence.adapters.sampling import NoiseSource
from credence.training.errors import ConfigError, ModelError
from credence.training.modeling import is_encoder, load_base, quiet_loading

SEVERAL_TEXTS = '{"text", "label"} or {"text", "text_b", "label"}'


@dataclass(frozen=True, slots=True)
class Head:
    """The parameters of a classification head; without any where the model is no classifier.

    Attributes:
        parameters: by their names in the model without PEFT, ``classifier.out_proj.weight``.
        fresh: names of those that the base folder does not hold, or holds for another number of classes.
        initial_sd: standard deviation that the fresh weights start with.
    """

    parameters: Mapping[str, nn.Parameter] = field(default_factory=dict)
    fresh: frozenset[str] = frozenset()
    initial_sd: float = 0.02

    @property
    def modules(self) -> set[str]:
        """Names of the modules that hold the parameters."""
        return {name.rpartition(".")[0] for name in self.parameters}

    def start(self, seed: int, *, trains: bool = True) -> None:
        """Fresh weights start as normals, biases at 0, scales at 1: a pure function of (seed, name).

        Args:
            trains: whether the parameters are to be trained.
        """
        source = NoiseSource(seed, 0, "init")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.requires_grad_(trains)
                if name not in self.fresh:
                    continue
                if parameter.ndim > 1:
                    parameter.copy_(self.initial_sd * source.normal(name, "head", tuple(parameter.shape)))
                else:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)

    def tensors(self) -> dict[str, Tensor]:
        """Copies, float32 on the CPU."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrites the parameters.

        Raises:
            ModelError: names or shapes are others.
        """
        own = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if own != given:
            odd = min(name for name in {*own, *given} if own.get(name) != given.get(name))
            raise ModelError(
                f"the adapter's classification head and that of the base model differ in {odd}: {given.get(odd, 'none')} and "
                f"{own.get(odd, 'none')}; this is not the adapter's base model"
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])

    @contextmanager
    def holding(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Puts these tensors in for the block, and back what was there."""
        before = self.tensors()
        self.load(tensors)
        try:
            yield
        finally:
            self.load(before)


NO_HEAD = Head()


def load_model(
    base: str | Path, dtype: str, quantization: str | None = None, *, num_classes: int | None
) -> tuple[Any, Head]:
    """Loads a causal language model, or an encoder with a classification head, in ``dtype``.

    Args:
        num_classes: C; None where the rows are not classified. A causal language model does not need it.

    Raises:
        ModelError: the model cannot be loaded, or is an encoder and there are no classes.
        ConfigError: an encoder is to be quantised.
    """
    if not is_encoder(base):
        return load_base(base, dtype, quantization), NO_HEAD
    if num_classes is None:
        raise ModelError(
            f"{base} is an encoder, which classifies rows of the form {SEVERAL_TEXTS}; for other rows give a causal language model"
        )
    if quantization is not None:
        raise ConfigError(
            f"train.quantization is {quantization} and {base} is an encoder; causal language models are quantised, leave it out",
            key="train.quantization",
        )
    return load_classifier(base, dtype, num_classes)


def load_classifier(base: str | Path, dtype: str, num_classes: int) -> tuple[Any, Head]:
    """Loads an encoder; what its folder holds of a head of so many classes is taken over.

    Raises:
        ModelError: it cannot be loaded, or lacks weights of the encoder itself.
    """
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # transformers reports the missing head as a warning
    try:
        with quiet_loading(base, "a sequence classifier"):
            model, info = AutoModelForSequenceClassification.from_pretrained(
                str(base),
                dtype=getattr(torch, dtype),
                num_labels=num_classes,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                trust_remote_code=False,
            )
    finally:
        hf_logging.set_verbosity(verbosity)
    encoder = f"{model.base_model_prefix}."
    fresh = frozenset([*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])])
    lacking = sorted(name for name in fresh if name.startswith(encoder) and not name.startswith(f"{encoder}pooler"))
    if lacking:
        raise ModelError(f"{base} lacks {len(lacking)} weights of the encoder, e.g. {lacking[0]}; give the whole model")
    parameters = {
        name: parameter for name, parameter in model.named_parameters() if not name.startswith(encoder) or name in fresh
    }
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    head = Head(parameters, fresh, float(getattr(model.config, "initializer_range", None) or 0.02))
    for name in head.modules:
        model.get_submodule(name).register_forward_pre_hook(_in_float32)
    return model, head


def check_padding(model: Any, tokenizer: Any) -> None:
    """Raises ModelError unless the tokenizer pads with the token that the encoder takes for padding: it counts positions by it."""
    expected, found = getattr(model.config, "pad_token_id", None), tokenizer.pad_token_id
    if found is None or (expected is not None and found != expected):
        raise ModelError(
            f"the tokenizer pads with token {found}, the encoder's padding token is {expected}; give the one that belongs to the model"
        )


def _in_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a bfloat16 encoder hands to the head."""
    return tuple(part.float() if isinstance(part, Tensor) and part.is_floating_point() else part for part in inputs)

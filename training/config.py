"""Configuration of a training run: YAML, or ``key=value`` pairs; unknown keys are errors.

Sections ``lora``, ``train``, ``method``, ``data`` and ``release``. The keys of ``method`` belong to the training method
and are checked by its own settings class (credence.training.methods).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from credence.training.errors import ConfigError

DEFAULT_TEMPLATE = "Text: {text}\nLabel:"


class Section(BaseModel):
    """A frozen section that refuses unknown keys, infinities and NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LoraSettings(Section):
    """The mean adapter (PEFT LoRA).

    Attributes:
        target_modules: names of the adapted linear layers, or ``all-linear``.
        init: adapter to start from, an artifact (its mean) or a PEFT LoRA folder; r, alpha and target_modules are then that adapter's.
    """

    r: int = Field(default=8, ge=1)
    alpha: int | float = Field(default=16, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] | Literal["all-linear"] = ("q_proj", "v_proj")
    init: str | None = None

    @field_validator("target_modules", mode="before")
    @classmethod
    def _one_name_is_a_list(cls, value: object) -> object:
        if isinstance(value, str) and value != "all-linear":
            return tuple(name.strip() for name in value.split(","))
        return value


class TrainSettings(Section):
    """The optimisation.

    Attributes:
        max_steps: optimiser steps; excludes ``epochs``. Without either, 3 epochs. 0 makes a posterior of a given adapter
            without training, for the methods that can.
        batch_size: rows per forward pass and device; times ``gradient_accumulation`` per optimiser step.
        learning_rate, weight_decay, max_grad_norm, lr_scheduler: None takes the method's default.
        head_learning_rate: AdamW's rate for the classification head of an encoder; None takes the method's default, which is
            ``learning_rate`` for all but ivon.
        dtype: of the base model; the adapter is always float32.
        quantization: quantises the base model's linear layers while it is loaded (bitsandbytes).
        max_length: longest row in tokens; None takes the model's context length. Longer rows are errors, never cut.
        save_steps: optimiser steps between checkpoints, 0 for none.
        eval_steps: optimiser steps between evaluations on the validation rows, 0 for none.
        eval_samples: samples averaged in an evaluation beside the mean, 0 for the mean alone (and of ensembles, the members' average).
        eval_tau: posterior temperature of these samples.
        eval_rows: rows of an evaluation, drawn evenly from those of the release.
        early_stopping: evaluations without a new best NLL of the mean after which the run ends; the best step's adapter is kept. 0 for
            never, and the last step's.
        tensorboard: folder for TensorBoard's event files; it is no part of the run's description.
    """

    max_steps: int | None = Field(default=None, ge=0)
    epochs: float | None = Field(default=None, gt=0)
    batch_size: int = Field(default=8, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)
    head_learning_rate: float | None = Field(default=None, gt=0)
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] | None = None
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float | None = Field(default=None, ge=0)
    max_grad_norm: float | None = Field(default=None, ge=0)
    dtype: Literal["float32", "bfloat16"] = "float32"
    quantization: Literal["8bit", "4bit"] | None = None
    max_length: int | None = Field(default=None, ge=2)
    gradient_checkpointing: bool = False
    save_steps: int = Field(default=100, ge=0)
    logging_steps: int = Field(default=20, ge=1)
    eval_steps: int = Field(default=0, ge=0)
    eval_samples: int = Field(default=0, ge=0)
    eval_tau: float = Field(default=1.0, gt=0)
    eval_rows: int = Field(default=256, ge=1)
    early_stopping: int = Field(default=0, ge=0)
    tensorboard: str | None = None

    @model_validator(mode="after")
    def _one_length(self) -> "TrainSettings":
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError("train.max_steps and train.epochs exclude each other; give one of them")
        return self


class DataSettings(Section):
    """How rows become prompts.

    Attributes:
        template: prompt of a {"text", "label"} row; holds ``{text}`` once, and of pairs of texts ``{text_b}`` once. Encoders have none:
            they read the texts as they are.
    """

    template: str = DEFAULT_TEMPLATE

    @field_validator("template")
    @classmethod
    def _holds_text(cls, value: str) -> str:
        if value.count("{text}") != 1:
            raise ValueError(f"the template must hold {{text}} exactly once, got {value!r}")
        if value.count("{text_b}") > 1:
            raise ValueError(f"the template can hold {{text_b}} once, got {value!r}")
        return value


class ReleaseSettings(Section):
    """How tau and the temperature are fitted (design: tau first, at temperature 1, then the temperature).

    Attributes:
        ks: numbers of samples K to fit for; K = 0 (the mean) is always fitted.
        taus: coarse grid of tau; 0 is always in it. It is continued in steps of ten while the best value lies at an end, and each K's
            best value is refined by half a step.
        max_rows: held-out rows used, drawn evenly from the validation file.
        map_rows: of these, rows of free text that are answered to fit the map of the confidence (K = 0 and the largest K); 0 fits none.
        max_new_tokens: longest such answer; rows with a longer reference are left out.
    """

    ks: tuple[int, ...] = (8, 10, 32)
    taus: tuple[float, ...] = (0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)
    max_rows: int = Field(default=512, ge=8)
    map_rows: int = Field(default=200, ge=0)
    max_new_tokens: int = Field(default=64, ge=1)

    @field_validator("ks")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or min(value) < 1:
            raise ValueError(f"release.ks needs one or more numbers of samples of 1 or more, got {list(value)}")
        return tuple(sorted(set(value)))

    @field_validator("taus")
    @classmethod
    def _increasing(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        positive = tuple(sorted({tau for tau in value if tau != 0}))
        if not positive or positive[0] < 0:
            raise ValueError(f"release.taus needs one or more values above 0, got {list(value)}")
        return positive


class TrainConfig(Section):
    """Everything that defines a run beside its base model, its data, its method and its seed."""

    lora: LoraSettings = LoraSettings()
    train: TrainSettings = TrainSettings()
    method: dict[str, Any] = Field(default_factory=dict)
    data: DataSettings = DataSettings()
    release: ReleaseSettings = ReleaseSettings()


_S = TypeVar("_S", bound=BaseModel)


def parse_section(model: type[_S], document: Mapping[str, Any], prefix: str = "") -> _S:
    """Validates ``document`` against ``model``.

    Raises:
        ConfigError: names the first bad key (with ``prefix``), what was given and what is allowed.
    """
    try:
        return model.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"] if isinstance(part, str)]
        if first["type"] == "extra_forbidden":
            key = ".".join(filter(None, [prefix, *path]))
            section = ".".join(filter(None, [prefix, *path[:-1]]))
            allowed = ", ".join(_keys(model, path[:-1]))
            where = f" in {section}" if section else ""
            raise ConfigError(f"unknown configuration key {key}; allowed{where}: {allowed}", key=key) from None
        known = [part for index, part in enumerate(path) if part in _keys(model, path[:index])]
        key = ".".join(filter(None, [prefix, *known])) or "configuration"
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{key}: {message} (got {first['input']!r})", key=key) from None


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a YAML file and applies ``key=value`` overrides (values are YAML: ``lora.target_modules=[q_proj, v_proj]``).

    Raises:
        ConfigError: the file is not readable YAML with sections, or a key or value is not allowed.
    """
    document: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(Path(path).read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}", key="") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not YAML: {error}", key="") from None
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(
                f"{path} holds a {type(loaded).__name__}; sections are needed, e.g. 'lora: {{r: 8}}'", key=""
            )
        document = loaded or {}
    for override in overrides:
        _apply(document, override)
    return parse_section(TrainConfig, document)


def _apply(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names) or len(names) < 2:
        raise ConfigError(f"{override!r} is not section.key=value, e.g. train.max_steps=400", key=key)
    section = document
    for depth, name in enumerate(names[:-1]):
        inner = section.setdefault(name, {})
        if inner is None:
            inner = section[name] = {}
        if not isinstance(inner, dict):
            raise ConfigError(
                f"{'.'.join(names[: depth + 1])} is a value, not a section, so {key} cannot be set", key=key
            )
        section = inner
    try:
        section[names[-1]] = yaml.safe_load(text)
    except yaml.YAMLError:
        section[names[-1]] = text


def _keys(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    for name in path:
        field = model.model_fields.get(name)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        model = field.annotation
    return list(model.model_fields)

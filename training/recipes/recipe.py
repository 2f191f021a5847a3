"""A published table as a file: which adapters are trained on which tasks with which settings, which lines they print, and the
published numbers. The files are ``*.yaml`` beside this module; unknown keys are errors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from itertools import product
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from credence.training.config import Section, TrainConfig, parse_section
from credence.training.errors import ConfigError
from credence.training.methods import METHODS, method_settings
from credence.training.tasks import TASKS

AVERAGE = "average"
"""The task whose numbers are means over all of a recipe's tasks."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric of ``credence eval --json`` as the papers print it.

    Attributes:
        scale: factor from ours to the printed number; 100 for percent.
        digits: after the point.
    """

    title: str
    scale: float
    digits: int


METRIC = {
    "accuracy": Metric("accuracy, %", 100, 2),
    "nll": Metric("NLL, nats", 1, 2),
    "ece10": Metric("ECE of 10 bins, %", 100, 2),
    "ece15": Metric("ECE of 15 bins, %", 100, 2),
    "brier": Metric("Brier", 1, 3),
    "extrinsic": Metric("extrinsic robustness (median accuracy over the grid), %", 100, 2),
    "intrinsic": Metric("intrinsic robustness (1 / median NLL over the grid), 1 / nats", 1, 2),
}

ROBUSTNESS = ("extrinsic", "intrinsic")
"""Metrics of a whole grid (Seth et al., MonteCLoRA, TMLR 2025): of lines over its median."""

VERIFIER = {"gsm8k": "number", "humaneval": "python"}
"""Verifier of each task of free text (``training/verifiers.py``)."""


class Paper(Section):
    """Where the table was published.

    Attributes:
        table: its name there; None where only what it shows is known to us.
    """

    title: str
    authors: str
    venue: str
    arxiv: str | None = None
    table: str | None = None


class Adapter(Section):
    """One way to train an adapter.

    Attributes:
        method: of ``credence train``.
        settings: configuration sections, over the recipe's ``common``.
        tasks: more of them for single tasks.
        around: the adapter whose mean this one's posterior is put around, without training (``lora.init``, ``train.max_steps: 0``).
    """

    method: str
    settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    tasks: dict[str, dict[str, dict[str, Any]]] = Field(default_factory=dict)
    around: str | None = None


class Grid(Section):
    """Every adapter is trained at each learning rate with each batch size."""

    learning_rates: tuple[float, ...] = Field(min_length=1)
    batch_sizes: tuple[int, ...] = Field(min_length=1)

    @property
    def cells(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Configuration sections of each cell by its name."""
        return {
            f"-{rate:g}-{size}": {"train": {"learning_rate": rate, "batch_size": size}}
            for rate, size in product(self.learning_rates, self.batch_sizes)
        }


class Generate(Section):
    """Texts are generated and verified."""

    max_new_tokens: int = Field(ge=1)


class Line(Section):
    """A line of the printed table: how an adapter answers.

    Attributes:
        k: posterior samples averaged; 0 is the mean.
        tau: posterior temperature, or ``fitted``.
        tempered: whether the fitted temperature of the probabilities is used; the papers' lines do not.
        over: which of a grid's values of every metric is printed.
        published: by task, or ``average``, and metric, in the printed unit.
        note: what is particular about the line.
    """

    label: str
    adapter: str
    k: int = Field(default=0, ge=0)
    tau: Literal["fitted"] | float = 1.0
    tempered: bool = False
    over: Literal["median", "best", "worst"] | None = None
    published: dict[str, dict[str, float]] = Field(default_factory=dict)
    note: str = ""


class Recipe(Section):
    """A table.

    Attributes:
        base: the paper's base model.
        tasks: columns of the table: a task is trained and evaluated by itself.
        train_on: the one task that is trained, where the columns are only evaluated.
        seeds: seeds 0, 1, ... of every run.
        common: configuration sections of all adapters.
        grid: the cells of a table of robustness.
        generate: how texts are made where the tasks are free text.
        encoder: whether the base is an encoder with a classification head.
        scaling: what the full run takes, and what to expect of less.
        notes: where the recipe leaves the paper, and what of the paper it does not have.
    """

    title: str
    paper: Paper
    base: str
    tasks: tuple[str, ...] = Field(min_length=1)
    train_on: str | None = None
    metrics: tuple[str, ...] = Field(min_length=1)
    seeds: int = Field(ge=1)
    common: dict[str, dict[str, Any]] = Field(default_factory=dict)
    adapters: dict[str, Adapter] = Field(min_length=1)
    lines: tuple[Line, ...] = Field(min_length=1)
    grid: Grid | None = None
    generate: Generate | None = None
    encoder: bool = False
    scaling: str
    notes: tuple[str, ...] = ()

    @field_validator("tasks", "metrics")
    @classmethod
    def _known(cls, value: tuple[str, ...], info: Any) -> tuple[str, ...]:
        allowed = TASKS if info.field_name == "tasks" else METRIC
        for name in value:
            if name not in allowed:
                raise ValueError(f"{name!r} is not one of {', '.join(allowed)}")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        for task in self.tasks:
            if (task in VERIFIER) != (self.generate is not None):
                raise ValueError(f"{task}: tasks of free text ({', '.join(VERIFIER)}), and these only, need generate")
        if self.grid is None and set(self.metrics) & set(ROBUSTNESS):
            raise ValueError(f"{' and '.join(ROBUSTNESS)} need a grid")
        for trained in self.trained:
            if not TASKS[trained].train:
                raise ValueError(f"{trained} has no training rows")
        for name, adapter in self.adapters.items():
            if adapter.method not in METHODS:
                raise ValueError(f"adapter {name} has the unknown method {adapter.method!r}")
            if adapter.around is not None and adapter.around not in self.adapters:
                raise ValueError(f"adapter {name} is around {adapter.around!r}, which is no adapter of the recipe")
            for task in adapter.tasks:
                if task not in self.trained:
                    raise ValueError(f"adapter {name} has settings for {task!r}, which is not trained")
        if len({line.label for line in self.lines}) < len(self.lines):
            raise ValueError("two lines have the same label")
        for line in self.lines:
            if line.adapter not in self.adapters:
                raise ValueError(f"line {line.label} asks for {line.adapter!r}, which is no adapter of the recipe")
            if (line.over is None) != (self.grid is None):
                raise ValueError(f"line {line.label}: lines of a recipe with a grid, and these only, need over")
            if line.tempered and self.generate is not None:
                raise ValueError(f"line {line.label} is tempered; free text has no such temperature")
            for task, numbers in line.published.items():
                unknown = set(numbers) - set(self.metrics)
                if task not in (*self.tasks, AVERAGE) or unknown:
                    raise ValueError(f"line {line.label} has published numbers for {task}, {sorted(numbers)}")
        return self

    @property
    def trained(self) -> tuple[str, ...]:
        """The tasks that adapters are trained on."""
        return (self.train_on,) if self.train_on else self.tasks

    @property
    def cells(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Configuration sections of each cell of the grid by its name; one without a name where there is no grid."""
        return self.grid.cells if self.grid else {"": {}}

    def config(self, adapter: str, task: str, *overrides: Mapping[str, Mapping[str, Any]]) -> TrainConfig:
        """Configuration of the adapter's training on a task, the method's own settings checked too.

        Raises:
            ConfigError: a key or value is not allowed.
        """
        chosen = self.adapters[adapter]
        document: dict[str, Any] = {}
        for sections in (self.common, chosen.settings, chosen.tasks.get(task, {}), *overrides):
            for section, values in sections.items():
                document.setdefault(section, {}).update(values)
        config = parse_section(TrainConfig, document)
        method_settings(chosen.method, config.method)
        return config


def recipe_names() -> list[str]:
    """Names of the recipes that are installed."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder() if entry.name.endswith(".yaml"))


def load_recipe(name: str) -> Recipe:
    """Reads and checks a recipe, the settings of every adapter and task included.

    Raises:
        ConfigError: there is none of this name, or it is not valid.
    """
    if name not in recipe_names():
        raise ConfigError(f"unknown recipe {name!r}; allowed: {', '.join(recipe_names())}", key="recipe")
    return parse_recipe(recipe_text(name), name)


def recipe_text(name: str) -> str:
    """The recipe's file."""
    return files("credence.training.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def parse_recipe(text: str, name: str) -> Recipe:
    """:func:`load_recipe` of a text."""
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {name} is not YAML: {error}", key=name) from None
    recipe = parse_section(Recipe, document, prefix=name)
    for adapter in recipe.adapters:
        for task in recipe.trained:
            for cell in recipe.cells.values():
                recipe.config(adapter, task, cell)
    return recipe


def _folder() -> list[Any]:
    return list(files("credence.training.recipes").iterdir())

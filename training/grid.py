"""A grid of runs: learning rates x batch sizes x seeds for one or several methods, over one base model and one set of data."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from credence.training.config import TrainConfig, TrainSettings, load_config, parse_section
from credence.training.data import read_data
from credence.training.errors import ConfigError
from credence.training.methods import method_class, method_settings
from credence.training.modeling import load_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run.

    Attributes:
        rate_index: place of the learning rate in its method's list; methods are compared at equal places.
    """

    method: str
    rate_index: int
    learning_rate: float
    batch_size: int
    seed: int

    def __str__(self) -> str:
        return f"{self.method}, learning rate {self.learning_rate:g}, batch size {self.batch_size}, seed {self.seed}"

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.method}-lr{self.learning_rate!r}-batch{self.batch_size}-seed{self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Which cells there are.

    Attributes:
        learning_rates: by method, as many for each; the first method is the one that the others are compared with.
    """

    learning_rates: Mapping[str, tuple[float, ...]]
    batch_sizes: tuple[int, ...]
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        rates = {f"learning rates of {name}": values for name, values in self.learning_rates.items()}
        axes: dict[str, Sequence[object]] = {"methods": self.methods, **rates}
        for axis, values in {**axes, "batch sizes": self.batch_sizes, "seeds": self.seeds}.items():
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"the {axis} are {list(values)}; give one or more, each once", key=axis)
        counts = {name: len(rates) for name, rates in self.learning_rates.items()}
        if len(set(counts.values())) > 1:
            raise ConfigError(
                f"the numbers of learning rates differ ({', '.join(f'{name}: {count}' for name, count in counts.items())}); methods are "
                "compared at equal places of their lists, so give as many for each",
                key="train.learning_rate",
            )

    @property
    def methods(self) -> tuple[str, ...]:
        """In the order given."""
        return tuple(self.learning_rates)

    def cells(self, method: str | None = None) -> list[Cell]:
        """All cells, or those of one method, in a fixed order."""
        return [
            Cell(method=name, rate_index=index, learning_rate=rate, batch_size=batch_size, seed=seed)
            for seed in self.seeds
            for batch_size in self.batch_sizes
            for name, rates in self.learning_rates.items()
            for index, rate in enumerate(rates)
            if method in (None, name)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A grid with all that its cells share. Built by :func:`plan`, which checks it.

    Attributes:
        configs: by method; learning rate and batch size are the cell's.
        ks: numbers of samples to evaluate; 0 is the mean.
        sources: digests of the base model and the data files.
    """

    grid: Grid
    base: str
    data: Path
    validation: Path
    test: Path
    configs: Mapping[str, TrainConfig]
    ks: tuple[int, ...]
    sources: Mapping[str, Any]

    def config(self, cell: Cell) -> TrainConfig:
        """The settings of a cell's run."""
        config = self.configs[cell.method]
        own = {"learning_rate": cell.learning_rate, "batch_size": cell.batch_size}
        settings = parse_section(TrainSettings, {**config.train.model_dump(exclude_unset=True), **own}, prefix="train")
        return config.model_copy(update={"train": settings})

    def made_from(self, cell: Cell) -> dict[str, Any]:
        """Everything that a cell's numbers depend on, versions and the machine aside."""
        config = self.config(cell)
        settings = {
            **config.model_dump(mode="json", exclude={"train": {"tensorboard"}}),
            "method": method_settings(cell.method, config.method).model_dump(mode="json"),
        }
        return {
            "method": cell.method,
            "seed": cell.seed,
            "settings": settings,
            "samples": list(self.ks),
            **self.sources,
        }


def plan(
    base: str | Path,
    data: Path,
    validation: Path,
    test: Path,
    grid: Grid,
    *,
    ks: Sequence[int] = (0, 10),
    settings: Sequence[str] = (),
    own_settings: Mapping[str, Sequence[str]] | None = None,
) -> Study:
    """Checks a grid and what its cells share before the first of them is trained.

    Args:
        settings: ``key=value`` of all methods; ``own_settings``: of one, after these. tau is fitted for the K that are evaluated, and
            there are no checkpoints, unless they say otherwise.

    Raises:
        TrainingError: a setting, a file or the base model is refused.
    """
    if not ks or min(ks) < 0 or len(set(ks)) < len(ks):
        raise ConfigError(
            f"the numbers of samples are {list(ks)}; give one or more, 0 (the mean) or above, each once", key="k"
        )
    own_settings = own_settings or {}
    for name in own_settings:
        if name not in grid.methods:
            raise ConfigError(
                f"there are settings for {name}, which is not among the methods: {', '.join(grid.methods)}",
                key="method",
            )
    samples = [k for k in ks if k > 0]
    defaults = ["train.save_steps=0", *([f"release.ks={samples}"] if samples else [])]
    configs = {}
    for name in grid.methods:
        method_class(name)
        config = load_config(None, [*defaults, *settings, *own_settings.get(name, ())])
        method_settings(name, config.method)
        for key in ("learning_rate", "batch_size"):
            if key in config.train.model_fields_set:
                raise ConfigError(
                    f"train.{key} is set, but it is an axis of the grid; give it there only", key=f"train.{key}"
                )
        configs[name] = config
    train_file = read_data(data)
    files = {
        "data": train_file,
        **{k: read_data(v, expected=train_file.format) for k, v in (("validation", validation), ("test", test))},
    }
    sources = {
        "base": _base_record(base),
        **{name: {"sha256": file.sha256, "rows": len(file.rows)} for name, file in files.items()},
    }
    study = Study(
        grid=grid,
        base=str(base),
        data=data,
        validation=validation,
        test=test,
        configs=configs,
        ks=tuple(ks),
        sources=sources,
    )
    for cell in grid.cells():
        study.config(cell)
    return study


def _base_record(base: str | Path) -> dict[str, Any]:
    """Digests of a folder's model and tokenizer, or the hub's commit."""
    load_tokenizer(base)  # a base that cannot be loaded is refused here, with a sentence
    folder = Path(base)
    if not folder.is_dir():
        return {
            "name": str(base),
            "revision": AutoConfig.from_pretrained(str(base), trust_remote_code=False)._commit_hash,
        }
    digests = {}
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        with file.open("rb") as stream:
            digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"name": folder.resolve().name, "sha256": digests}

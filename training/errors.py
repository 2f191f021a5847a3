"""Errors of credence.training.

TrainingError
├── ConfigError      a configuration key or value is not allowed (``key``)
├── DataError        a data file or one of its rows is not usable (``file``, ``line``)
├── ModelError       the base model, its tokenizer and the adapter do not fit together
├── CheckpointError  a run cannot start or resume from the checkpoints it found
└── MetricError      a metric is asked for numbers it is not defined on (also a ValueError)
"""


class TrainingError(Exception):
    """Base class: catch it to catch everything credence.training raises on purpose."""


class ConfigError(TrainingError):
    """A configuration key is unknown or its value is out of range.

    Attributes:
        key: dotted name of the key, ``train.learning_rate``.
    """

    def __init__(self, message: str, *, key: str) -> None:
        super().__init__(message)
        self.key = key


class DataError(TrainingError):
    """A data file or a row of it cannot be used.

    Attributes:
        file: the file as it was given.
        line: line number from 1, or None when the whole file is meant.
    """

    def __init__(self, message: str, *, file: object, line: int | None = None) -> None:
        where = f"{file}:{line}" if line is not None else f"{file}"
        super().__init__(f"{where}: {message}")
        self.file = str(file)
        self.line = line


class ModelError(TrainingError):
    """The base model or its tokenizer cannot be used for what was asked."""


class CheckpointError(TrainingError):
    """A run cannot start or resume: its output or its checkpoints do not allow it."""


class MetricError(TrainingError, ValueError):
    """A metric was given numbers it is not defined on."""

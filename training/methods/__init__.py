"""The training methods. A new method is one file here and one line in ``METHODS``."""

from collections.abc import Mapping
from typing import Any

from credence.training.config import Section, parse_section
from credence.training.errors import ConfigError
from credence.training.methods.base import Method, Plan, TrainingRows
from credence.training.methods.blob import Blob
from credence.training.methods.ensemble import Ensemble
from credence.training.methods.ivon import Ivon
from credence.training.methods.laplace import Laplace
from credence.training.methods.map import Map
from credence.training.methods.mcdropout import McDropout
from credence.training.methods.melora import MeLora
from credence.training.methods.monteclora import MonteCLora
from credence.training.methods.swag import Swa, Swag
from credence.training.methods.tfb import Tfb

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (Map, MonteCLora, Ivon, MeLora, Blob, Laplace, Swa, Swag, McDropout, Tfb, Ensemble)
}


def method_class(name: str) -> type[Method]:
    """The method called ``name``.

    Raises:
        ConfigError: there is none.
    """
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}; allowed: {', '.join(METHODS)}", key="method")
    return METHODS[name]


def method_settings(name: str, document: Mapping[str, Any]) -> Section:
    """Validates the configuration's ``method`` section for the method called ``name``."""
    return parse_section(method_class(name).settings_class, document, prefix="method")


__all__ = [
    "METHODS",
    "Blob",
    "Ensemble",
    "Ivon",
    "Laplace",
    "Map",
    "McDropout",
    "MeLora",
    "Method",
    "MonteCLora",
    "Plan",
    "Swa",
    "Swag",
    "Tfb",
    "TrainingRows",
    "method_class",
    "method_settings",
]

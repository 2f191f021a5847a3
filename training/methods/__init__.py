"""The training methods. A new method is one file here and one line in ``METHODS``."""

from collections.abc import Mapping
from typing import Any

from credence.training.config import Section, parse_section
from credence.training.errors import ConfigError
from credence.training.methods.base import Method
from credence.training.methods.ivon import Ivon
from credence.training.methods.map import Map
from credence.training.methods.monteclora import MonteCLora

METHODS: dict[str, type[Method]] = {method.name: method for method in (Map, MonteCLora, Ivon)}  # type: ignore[type-abstract]


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


__all__ = ["METHODS", "Ivon", "Map", "Method", "MonteCLora", "method_class", "method_settings"]

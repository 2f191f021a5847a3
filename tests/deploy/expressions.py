"""The queries of the rules and of the dashboard, and the metrics they name."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "rules" / "credence.yml"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "credence.json"
NAME = re.compile(r"(?<![\w:])(?:credence_\w+|vllm:\w+)")


def rules() -> list[dict[str, Any]]:
    """All recording and alert rules."""
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    """All panels of the dashboard."""
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def expressions() -> list[str]:
    """Every PromQL expression."""
    return [rule["expr"] for rule in rules()] + [target["expr"] for panel in panels() for target in panel["targets"]]


def scraped_names() -> set[str]:
    """Names of scraped series in the expressions; recorded series (``level:metric:operations``) are not scraped."""
    return {name for expression in expressions() for name in NAME.findall(expression)}


def recorded_names() -> set[str]:
    """Names of recorded series in the expressions."""
    return {name for expression in expressions() for name in re.findall(r"\b[a-z_]+:credence_\w+:\w+", expression)}

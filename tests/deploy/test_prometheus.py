"""The Prometheus files by promtool, and rules, dashboard and documentation against each other."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deploy.expressions import DASHBOARD, DEPLOY, panels, recorded_names, rules

DOCS = Path(__file__).parents[2] / "docs" / "observability.md"
PROMETHEUS = DEPLOY / "prometheus"

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool (Debian package prometheus) is not installed"
)


@needs_promtool
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "rules/credence.yml"),
        ("test", "rules", "tests/credence.yml"),
        ("test", "rules", "tests/drift.yml"),
    ],
)
def test_promtool(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_to_fire() -> None:
    texts = [path.read_text() for path in (PROMETHEUS / "tests").glob("*.yml")]
    tested = re.findall(r"alertname: (\w+)\n +exp_alerts", "\n".join(texts))
    assert sorted(set(tested)) == sorted(rule["alert"] for rule in rules() if "alert" in rule)


def test_every_alert_says_what_is_wrong_and_has_its_runbook() -> None:
    headings = {
        "#" + re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in DOCS.read_text().splitlines()
        if line.startswith("#")
    }
    for rule in rules():
        if "alert" in rule:
            assert set(rule["annotations"]) == {"summary", "description", "runbook"}
            assert rule["labels"]["severity"] in ("critical", "warning")
            page, _, anchor = rule["annotations"]["runbook"].partition("#")
            assert page == "docs/observability.md" and "#" + anchor in headings, rule["alert"]


def test_recorded_series_are_recorded_where_they_are_read() -> None:
    assert recorded_names() <= {rule["record"] for rule in rules() if "record" in rule}


def test_the_dashboard_is_whole() -> None:
    document = json.loads(DASHBOARD.read_text())
    (variable,) = document["templating"]["list"]
    assert variable["name"] == "adapter"
    places = [tuple(panel["gridPos"].values()) for panel in panels()]
    assert len(set(places)) == len(places) and all(
        place[2] + place[0] <= 24 or place[2] + place[1] <= 24 for place in places
    )
    assert [panel["id"] for panel in panels()] == list(range(1, len(places) + 1))
    for panel in panels():
        assert panel["title"] and panel["targets"]
        assert all(target["datasource"]["uid"] == "prometheus" for target in panel["targets"])

"""Rules and dashboards as tests read them: their expressions, and the series that those name."""

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES = PROMETHEUS / "rules.yml"
GRAFANA = ROOT / "deploy" / "grafana"

RATE_INTERVAL = "20s"
"""What Grafana's `$__rate_interval` is taken for: four scrapes, as Grafana takes it, of 5 s."""

_CLAUSE = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
_NOT_A_SERIES = r'"[^"]*"|\[[^\]]*\]|[a-zA-Z_:][\w:]*(?=\s*\()|\b(?:and|or|unless|bool|offset|[0-9]\w*)\b'
_SERIES = re.compile(_NOT_A_SERIES + r"|(?P<metric>[a-zA-Z_:][\w:]*)\s*(?:\{(?P<matchers>[^}]*)\})?")


@dataclass(frozen=True, slots=True)
class Series:
    metric: str
    labels: frozenset[str]
    """Those that its matchers name."""


def series(expression: str) -> set[Series]:
    """What a PromQL expression reads."""
    found = _SERIES.finditer(_CLAUSE.sub(" ", expression))
    return {
        Series(match["metric"], frozenset(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", match["matchers"] or "")))
        for match in found
        if match["metric"]
    }


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in rules() if "alert" in rule]


def dashboards() -> dict[str, dict[str, Any]]:
    """By file name."""
    return {path.name: json.loads(path.read_text()) for path in sorted(GRAFANA.glob("*.json"))}


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that show something."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def variables(dashboard: dict[str, Any]) -> dict[str, str]:
    """The query of each variable, by name."""
    return {variable["name"]: variable["query"] for variable in dashboard["templating"]["list"]}


def plain(expression: str) -> str:
    """A dashboard's expression as Prometheus gets it, with everything chosen."""
    expression = expression.replace("$__rate_interval", RATE_INTERVAL).replace("$__range", "1h")
    return re.sub(r"\$\w+", ".*", expression)


def targets() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each question of each dashboard, with where it stands."""
    for name, dashboard in dashboards().items():
        for panel in panels(dashboard):
            for target in panel["targets"]:
                yield f"{name}: {panel['title']} {target['refId']}", target


def expressions() -> list[tuple[str, str]]:
    return [(where, plain(target["expr"])) for where, target in targets()]


@functools.cache
def exported() -> dict[str, frozenset[str]]:
    """The service's metrics and their labels, by the README's table, which a test holds against a running stack."""
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| `(qwen3_\w+)` \| [^|]+ \| ([^|]*)\|", text, re.MULTILINE)
    return {name: frozenset(re.findall(r"\w+", labels)) for name, labels in rows}

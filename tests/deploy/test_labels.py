"""Labels that rules, dashboards and their variables name: each is one that its metric has, by the README's table.

tests/e2e/test_seeing.py asks a running stack; this tells what is misspelt without one.
"""

import re

import pytest

from tests.seeing import dashboards, exported, expressions, panels, rules, series, targets, variables

SCRAPED = frozenset({"job", "instance"})
"""Prometheus gives these to whatever it reads."""
VLLM = frozenset({"model_name", "engine", "finished_reason"})
UNITS = {"none", "short", "s", "bytes", "percentunit", "reqps", "cps", "bool_yes_no"}
"""Of Grafana's (packages/grafana-data/src/valueFormats), which shows another one as text behind the number."""
CLAUSES = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
NAMED = [*expressions(), *((str(rule.get("alert") or rule["record"]), rule["expr"]) for rule in rules())]


def labels_of(metric: str) -> frozenset[str] | None:
    """None where nobody here can know: another program's metric, or a recorded one."""
    if metric.startswith("vllm:"):
        return VLLM | SCRAPED
    if metric == "up" or metric.startswith("process_"):
        return SCRAPED
    known = exported()
    found = known.get(metric) or known.get(re.sub("_(bucket|sum|count)$", "", metric))
    return None if not metric.startswith("qwen3_") else (found or frozenset()) | SCRAPED


@pytest.mark.parametrize(("where", "expression"), NAMED, ids=[where for where, _ in NAMED])
def test_an_expression_names_labels_that_there_are(where: str, expression: str) -> None:
    read = {one: labels_of(one.metric) for one in series(expression)}
    for one, known in read.items():
        assert known is None or one.labels <= known, one.metric
    by = set(re.findall(r"\w+", " ".join(CLAUSES.findall(expression)))) - {"le"}
    if None not in read.values():
        assert by <= set().union(*(known or () for known in read.values()))


def test_what_a_legend_names_is_left_by_its_expression() -> None:
    for where, target in targets():
        summed = re.match(r"\w+\(?.*?\bby\s*\(([^)]*)\)|^(?:sum|max|min|avg|count)\(", target["expr"])
        if summed is not None and "or" not in target["expr"].split():
            left = set(re.findall(r"\w+", summed[1] or ""))
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= left, where


def test_a_variable_offers_the_values_of_a_label_that_there_is() -> None:
    asked = 0
    for name, board in dashboards().items():
        for variable, query in variables(board).items():
            if match := re.fullmatch(r"label_values\((.+), (\w+)\)", query):
                asked += 1
                (one,) = series(match[1])
                assert {match[2], *one.labels} <= (labels_of(one.metric) or frozenset()), f"{name}: {variable}"
    assert asked >= 5


def test_units_are_grafanas() -> None:
    for name, board in dashboards().items():
        for panel in panels(board):
            unit = panel["fieldConfig"]["defaults"].get("unit") or panel["options"]["yAxis"]["unit"]
            assert unit in UNITS, f"{name}: {panel['title']}"

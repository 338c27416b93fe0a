"""The whole page: head, summary, sections. It asks for nothing over the network, and its policy forbids it to."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pyft.report.export_sections import parity_section
from pyft.report.facts import RunFacts
from pyft.report.markup import Html, element, foreign, join
from pyft.report.run_sections import (
    cost_section,
    curves_section,
    notes_section,
    repeat_section,
    versions_section,
)
from pyft.report.sample_sections import explanations_section, worst_section
from pyft.report.score_sections import (
    calibration_section,
    classes_section,
    confusion_section,
    metrics_section,
    regression_section,
)
from pyft.report.section import Section, four, paragraph, seconds, spoken

HERE = Path(__file__).resolve().parent
HEADLINES = {
    "classification": ("accuracy", "macro_f1"),
    "multilabel": ("micro_f1", "exact_match"),
    "regression": ("rmse", "r2"),
}
KINDS = {"text": "Text", "image": "Image", "array": "Array"}


def render(facts: RunFacts, explanations: Sequence[Html] = (), explanation_notes: Sequence[str] = ()) -> str:
    """The page of a run.

    Args:
        facts: see `pyft.report.facts.read_run`.
        explanations: attributions of samples, as HTML.
        explanation_notes: why some are not there.
    """
    sections = [
        repeat_section(facts),
        curves_section(facts),
        metrics_section(facts),
        regression_section(facts),
        confusion_section(facts),
        classes_section(facts),
        calibration_section(facts),
        worst_section(facts),
        explanations_section(explanations, explanation_notes),
        notes_section(facts),
        parity_section(facts),
        cost_section(facts),
        versions_section(facts),
    ]
    shown = [section for section in sections if section is not None]
    body = element(
        "div",
        _summary(facts),
        element("div", _contents(shown), element("main", *(section.html() for section in shown)), class_="columns"),
        _footer(facts),
        class_="page",
    )
    return f"<!DOCTYPE html>\n{element('html', _head(facts), element('body', body, _script()), lang='en')}\n"


def _head(facts: RunFacts) -> Html:
    digest = base64.b64encode(hashlib.sha256(_source("page.js").encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", f"{facts.name}: {_title(facts)}"),
        element("style", Html(_source("page.css"))),
        element("link", rel="icon", href="data:,"),
    )


def _script() -> Html:
    return element("script", Html(_source("page.js")))


@cache
def _source(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _title(facts: RunFacts) -> str:
    kind = KINDS.get(str(facts.config.get("data", {}).get("kind")), "")
    problem = {"multilabel": "multilabel classification"}.get(facts.problem, facts.problem)
    count = f", {len(facts.classes):,} {'labels' if facts.problem == 'multilabel' else 'classes'}"
    return f"{kind} {problem}".strip() + (count if facts.classes else "")


def _summary(facts: RunFacts) -> Html:
    """What a reader wants to know first."""
    started = str(facts.environment.get("started", ""))[:16].replace("T", " ")
    line = join([foreign(facts.name), started or None, f"pyft {facts.config.get('pyft', '')}"], " \u00b7 ")
    tiles = [_tile(shown, name) for shown, name in _headlines(facts)]
    state = None
    if not facts.metrics:
        state = paragraph("The run is not finished: there are no metrics yet.", class_="bad")
    return element(
        "header", element("h1", _title(facts)), element("p", line, class_="quiet"), state,
        element("div", *tiles, class_="tiles"),
    )  # fmt: skip


def _headlines(facts: RunFacts) -> list[tuple[Any, str]]:
    values = facts.detail.get("values", {})
    found: list[tuple[Any, str]] = [
        (four(values[name])[0], f"{facts.role_name} {spoken(name)}")
        for name in HEADLINES.get(facts.problem, ())
        if values.get(name) is not None
    ]
    calibration = facts.held_out.get("calibration")
    if calibration:
        found.append((f"{calibration['ece']:.3f}", "calibration error"))
    trained = [(s["num_trainable"], s["num_total"]) for s in facts.cost.get("stages", []) if s.get("num_total")]
    if trained:
        share = max(part / whole for part, whole in trained)
        found.append((f"{share:.1%}" if share < 1 else "all", "of the parameters trained"))
    if facts.timings:
        found.append((seconds(sum(v for k, v in facts.timings.items() if k != "predicted")), "in all"))
    if facts.parity:
        passed = facts.parity.get("passed")
        mark = element("span", "equal" if passed else "differs", class_="good" if passed else "bad")
        found.append((mark, "ONNX file and model"))
    return found


def _tile(shown: Any, name: str) -> Html:
    return element("div", element("b", shown), element("span", name), class_="tile")


def _contents(sections: Sequence[Section]) -> Html:
    links = [element("li", element("a", section.title, href=f"#{section.name}")) for section in sections]
    return element("nav", element("ul", *links), aria_label="Contents")


def _footer(facts: RunFacts) -> Html:
    return element(
        "footer", f"Written by pyft {facts.config.get('pyft', '')}. This page needs no network and no other file."
    )

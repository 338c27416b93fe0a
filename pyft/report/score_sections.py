"""How good the model is: metrics, classes, confusion, calibration; for regression its errors."""

from __future__ import annotations

from typing import Any

from pyft.report.facts import RunFacts
from pyft.report.markup import Html, element, foreign, join
from pyft.report.section import Section, bar, details, figure, four, paragraph, spoken, table
from pyft.report.svg import heatmap, histogram, number, reliability, scatter

MOST_CONFUSED = 12
MAX_DRAWN = 200
"""Classes up to which the confusion matrix is drawn."""
ENTRIES = 60
"""Classes from which on the table of classes has a scroll box of its own."""


def metrics_section(facts: RunFacts) -> Section | None:
    """All metrics, one column per held-out set."""
    roles = [role for role in ("test", "val") if role in facts.metrics]
    if not roles:
        return None
    names = list(dict.fromkeys(name for role in roles for name in facts.metrics[role].get("values", {})))
    rows = [
        [spoken(name)] + [four(facts.metrics[role].get("values", {}).get(name)) for role in roles] for name in names
    ]
    words = {"test": "test", "val": "validation"}
    heads = ["metric", *(f"{words[role]} ({facts.metrics[role].get('num_samples', 0):,} samples)" for role in roles)]
    return Section("metrics", "Metrics", table(heads, rows))


# ---------------------------------------------------------------- classes


def confusion_section(facts: RunFacts) -> Section | None:
    """The matrix, and the pairs mistaken most often."""
    matrix = facts.detail.get("confusion")
    if facts.problem != "classification" or not matrix or not facts.classes:
        return None
    names = facts.classes
    parts: list[Any] = []
    notes: list[Any] = []
    if len(names) <= MAX_DRAWN:
        note = paragraph(
            "A row is a true class, a column what was predicted; the colour is the share of the row. "
            f"From {facts.detail.get('num_samples', 0):,} {facts.role_name} samples.",
            class_="quiet",
        )
        drawn = element("div", heatmap(matrix, names), class_="box matrix-box", tabindex="0", role="region",
                        aria_label="confusion matrix")  # fmt: skip
        parts.append(drawn)
        notes.append(note)
    pairs = sorted(
        ((count, true, predicted) for true, row in enumerate(matrix) for predicted, count in enumerate(row)
         if count and true != predicted),
        key=lambda pair: (-pair[0], pair[1], pair[2]),
    )[:MOST_CONFUSED]  # fmt: skip
    if pairs:
        rows = [
            (foreign(names[true]), foreign(names[predicted]), (f"{count:,}", count),
             (f"{count / sum(matrix[true]):.1%}", count / sum(matrix[true])))
            for count, true, predicted in pairs
        ]  # fmt: skip
        parts.append(table(("true", "predicted", "times", "of the true class"), rows, caption="Mistaken most often"))
    else:
        notes.insert(0, paragraph("No sample was mistaken."))
    return Section("confusion", "Confusion matrix", join([element("div", *parts, class_="flow"), *notes]))


def classes_section(facts: RunFacts) -> Section | None:
    """Precision, recall and F1 per class; for several labels per sample the calibration of each, too."""
    per_class = facts.detail.get("per_class") or []
    if not per_class:
        return None
    eces = facts.held_out.get("label_ece") if facts.held_out.get("role") == facts.role else None
    label = "label" if facts.problem == "multilabel" else "class"
    heads = [label, "precision", "recall", "F1", "", "samples"] + (["ECE"] if eces else [])
    rows = []
    for place, one in enumerate(per_class):
        row: list[Any] = [foreign(one.get("name", ""))]
        row += [(f"{one.get(key) or 0:.3f}", one.get(key) or 0) for key in ("precision", "recall", "f1")]
        row += [
            (bar(one.get("f1") or 0), one.get("f1") or 0, "left"),
            (f"{one.get('support', 0):,}", one.get("support", 0)),
        ]
        rows.append(row + ([four(eces[place])] if eces else []))
    note = paragraph(f"Press a heading to sort. From the {facts.role_name} samples.", class_="quiet screen")
    many = len(rows) > ENTRIES
    title = f"{len(rows):,} {'labels' if label == 'label' else 'classes'}"
    return Section("classes", title, join([note, table(heads, rows, sortable=True, tall=many)]))


# ---------------------------------------------------------------- calibration


def calibration_section(facts: RunFacts) -> Section | None:
    """The reliability diagram and the expected calibration error."""
    found = facts.held_out.get("calibration")
    if facts.problem == "regression" or not found:
        return None
    several = facts.problem == "multilabel"
    what = "share that came true" if several else "share that is correct"
    drawn = reliability(found["count"], found["confidence"], found["accuracy"], what)
    share = _bold(found["ece"])
    meaning = (
        "the mean distance of a label's probability from how often it holds"
        if several
        else "the mean distance of the predicted class's probability from how often it is right"
    )
    words = [
        paragraph(
            "Expected calibration error ", share, f": {meaning}, over {len(found['count'])} bins of equal width."
        ),
        paragraph(f"Largest error of a bin: {found['mce']:.4f}."),
        paragraph(_verdict(found, several)),
        paragraph(
            "On the dashed line probabilities mean what they say. Orange: surer than right; green: less sure than "
            "right. Definition: Guo et al., On Calibration of Modern Neural Networks, 2017.",
            class_="quiet",
        ),
    ]
    body = element("div", figure(drawn), element("div", *words), class_="beside")
    return Section("calibration", "Calibration", body)


def _bold(value: float) -> Html:
    return element("strong", f"{value:.4f}")


def _verdict(found: dict[str, Any], several: bool) -> str:
    total = sum(found["count"])
    said, true = (
        sum(count * (value or 0.0) for count, value in zip(found["count"], found[key], strict=True)) / total
        for key in ("confidence", "accuracy")
    )
    if several:
        return f"Over all labels the mean probability is {said:.3f}; {true:.1%} of them hold."
    if abs(said - true) < 0.01:
        return f"The mean probability of the predicted class, {said:.3f}, is within 0.01 of the accuracy, {true:.3f}."
    word = "surer than it is right" if said > true else "less sure than it is right"
    return f"On the whole the model is {word}: its mean probability is {said:.3f}, its accuracy {true:.3f}."


# ---------------------------------------------------------------- regression


def regression_section(facts: RunFacts) -> Section | None:
    """Predicted against true values, and the residuals."""
    points = facts.held_out.get("points")
    if not points:
        return None
    true, predicted = [pair[0] for pair in points], [pair[1] for pair in points]
    residuals = [b - a for a, b in points]
    total = facts.held_out.get("num_samples", len(points))
    shown = f"{len(points):,} of {total:,}" if total > len(points) else f"{total:,}"
    figures = element(
        "div",
        figure(scatter(true, predicted, "true", "predicted"), "On the dashed line predictions are exact."),
        figure(histogram(residuals, "predicted minus true"), "Errors, in the unit of the target."),
        class_="figures",
    )
    ordered = sorted(abs(value) for value in residuals)
    quantiles = [
        (f"{share:.0%} of the samples", four(ordered[min(int(share * len(ordered)), len(ordered) - 1)]))
        for share in (0.5, 0.9, 0.99)
    ]
    mean = sum(residuals) / len(residuals)
    parts = [
        figures,
        paragraph(f"Mean error {number(mean)} (0 is unbiased), from {shown} {facts.role_name} samples."),
        details("Absolute errors", table(("of", "at most"), quantiles)),
    ]
    return Section("errors", "Predicted and true values", join(parts))

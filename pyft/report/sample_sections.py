"""The samples that the model is worst on, shown; and what its predictions rest on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyft.report.facts import RunFacts
from pyft.report.markup import Html, element, foreign, join
from pyft.report.section import Section, details, four, paragraph, table
from pyft.report.svg import number, spark

MAX_LETTERS = 600
MAX_COLUMNS = 20
FIRST = 12
"""So many samples are shown at once, the others when asked for."""


def worst_section(facts: RunFacts) -> Section | None:
    """The held-out samples of highest loss, each as a card."""
    worst = facts.held_out.get("worst") or []
    if not worst:
        return None
    wrong = sum(bool(one.get("wrong")) for one in worst)
    what = "largest error" if facts.problem == "regression" else "highest loss"
    words = f"The {len(worst)} {facts.role_name} samples with the {what}, the worst first."
    if facts.problem != "regression":
        words += f" {'All' if wrong == len(worst) else wrong or 'None'} of them {'is' if wrong == 1 else 'are'} wrong."
        words += " A wrong label in the data often shows here."
    if all(_is_row(one) for one in worst):
        return Section("worst", "Worst samples", join([paragraph(words), rows_table(facts, worst)]))
    cards = [card(facts, one) for one in worst]
    parts: list[Any] = [paragraph(words), element("div", *cards[:FIRST], class_="cards")]
    if cards[FIRST:]:
        parts.append(details(f"{len(cards) - FIRST} more", element("div", *cards[FIRST:], class_="cards")))
    return Section("worst", "Worst samples", join(parts))


def _is_row(one: dict[str, Any]) -> bool:
    """Whether a sample is a row of features, which is read best below others."""
    return one.get("values") is not None and len(one.get("shape") or []) == 1 and not one.get("picture")


def rows_table(facts: RunFacts, worst: Sequence[dict[str, Any]]) -> Html:
    """Rows of features with what was said of them."""
    names = worst[0].get("columns") or [str(place) for place in range(len(worst[0]["values"]))]
    kept = names[:MAX_COLUMNS]
    regression = facts.problem == "regression"
    heads = ["sample", "true", "predicted", "error" if regression else "score", *map(foreign, kept)]
    rows = []
    for one in worst:
        values = [one.get("true"), one.get("predicted")]
        score = (values[1] or 0.0) - (values[0] or 0.0) if regression else one.get("score")
        row: list[Any] = [str(one.get("index"))]
        row += [four(value) if isinstance(value, float) else foreign(value) for value in values]
        row += [four(score), *map(_feature, one["values"][:MAX_COLUMNS])]
        rows.append(row)
    more = len(names) - len(kept)
    note = paragraph(f"The first {len(kept)} of {len(names)} features.", class_="quiet") if more > 0 else None
    return join([table(heads, rows, sortable=True), note])


def _feature(value: float | str | None) -> Any:
    return foreign(value) if isinstance(value, str) else (number(value), value or 0)


def card(facts: RunFacts, one: dict[str, Any]) -> Html:
    """One sample with its true and its predicted label."""
    regression = facts.problem == "regression"
    rows: list[tuple[str, Any]] = [("true", _value(one.get("true"))), ("predicted", _value(one.get("predicted")))]
    if regression:
        rows.append(("error", number((one.get("predicted") or 0.0) - (one.get("true") or 0.0))))
        if "output" in one:
            rows.append(("output", str(one["output"])))
    elif facts.problem == "multilabel":
        rows.append(("largest error", f"{one.get('score', 0.0):.3f}"))
    else:
        rows[0] = ("true", join([rows[0][1], _score(one.get("true_score"))]))
        rows[1] = ("predicted", join([rows[1][1], _score(one.get("score"))]))
    state = "" if regression else " wrong" if one.get("wrong") else " right"
    terms = [part for name, value in rows for part in (element("dt", name), element("dd", value))]
    return element(
        "article", sample(one), element("dl", *terms), element("p", _where(one), class_="where"), class_=f"card{state}"
    )


def _value(value: Any) -> Html:
    return foreign(number(value) if isinstance(value, float) else value)


def _score(value: float | None) -> Html | None:
    return None if value is None else element("span", f" {value:.3f}", class_="score")


def _where(one: dict[str, Any]) -> Html:
    path = one.get("path")
    name = None if not path else foreign(str(path).replace("\\", "/").rpartition("/")[2])
    return join([f"sample {one.get('index', 0):,}", name], ", ")


def sample(one: dict[str, Any]) -> Html:
    """The sample itself: text, picture, or numbers as a line."""
    if "text" in one:
        text = str(one["text"])
        cut = one.get("cut") or len(text) > MAX_LETTERS
        return element("blockquote", foreign(text[:MAX_LETTERS] + ("\u2026" if cut else "")))
    if one.get("picture"):
        return element("div", element("img", src=one["picture"], alt=f"sample {one.get('index')}"), class_="picture")
    values, shape = one.get("values"), one.get("shape") or []
    if values is None:
        return element("p", f"an array of shape {tuple(shape)}", class_="quiet")
    return _lines(values, shape)


def _lines(values: Sequence[float | None], shape: Sequence[int]) -> Html:
    """Numbers in order as a small line; of rows of features (T, F) the first few features, each over T."""
    if len(shape) == 2 and 1 < shape[1] <= 64:
        lines = [spark(values[place :: shape[1]]) for place in range(min(shape[1], 4))]
    else:
        lines = [spark(values)]
    return element("div", *lines, element("span", f"shape {tuple(shape)}", class_="quiet"), class_="lines")


def explanations_section(explanations: Sequence[Html], notes: Sequence[str]) -> Section | None:
    """Attributions of a few of the worst samples, as they were drawn elsewhere."""
    if not explanations and not notes:
        return None
    parts = [element("div", *explanations, class_="explanations"), *(paragraph(note, class_="quiet") for note in notes)]
    return Section("explanations", "What predictions rest on", join(parts))

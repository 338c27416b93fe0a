"""What sections of the page are made of: headings, tables, lists of facts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pyft.report.markup import Html, element

NARROW = 4
"""Columns up to which a table does not take the whole width."""
_WRITTEN = {"f1": "F1", "rmse": "RMSE", "mae": "MAE", "r2": "R\u00b2", "lr": "learning rate",
            "val": "validation", "train": "training"}  # fmt: skip


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        name: its anchor.
        title: its heading.
        body: HTML.
    """

    name: str
    title: str
    body: Html

    def html(self) -> Html:
        """The whole section."""
        return element("section", element("h2", self.title), self.body, id=self.name)


def table(
    heads: Sequence[Any],
    rows: Iterable[Sequence[Any]],
    *,
    sortable: bool = False,
    caption: str = "",
    tall: bool = False,
) -> Html:
    """A table that scrolls inside its own box. A cell (shown, number) is set to the right and sorted by the number;
    a cell (shown, number, "left") is sorted by it.

    Args:
        heads: one per column.
        rows: cells.
        sortable: a press on a head sorts.
        tall: the box has a height of its own, for very many rows.
    """
    rows = [list(row) for row in rows]
    top = [
        element("th", element("button", head, type="button") if sortable else head, scope="col",
                class_="num" if _is_number_column(rows, place) else None)
        for place, head in enumerate(heads)
    ]  # fmt: skip
    body = [element("tr", *(_cell(value, first=place == 0) for place, value in enumerate(row))) for row in rows]
    inner = element(
        "table",
        element("caption", caption) if caption else None,
        element("thead", element("tr", *top)),
        element("tbody", *body),
        class_="sortable" if sortable else None,
    )
    kind = "box" + " tall" * tall + " narrow" * (len(heads) <= NARROW)
    name = caption or " ".join(str(head) for head in heads if not isinstance(head, Html))
    return element("div", inner, class_=kind, tabindex="0", role="region", aria_label=name)


def _is_number_column(rows: Sequence[Sequence[Any]], place: int) -> bool:
    return bool(rows) and isinstance(rows[0][place], tuple) and len(rows[0][place]) == 2


def _cell(value: Any, *, first: bool) -> Html:
    if isinstance(value, tuple):
        shown, sorted_by = value[:2]
        return element("td", shown, class_="num" if len(value) == 2 else None, data_value=sorted_by)
    return element("th", value, scope="row") if first else element("td", value)


def facts_list(pairs: Iterable[tuple[str, Any]]) -> Html:
    """Names and values; a pair without a value is left out."""
    parts = [
        element("div", element("dt", name), element("dd", value)) for name, value in pairs if value not in (None, "")
    ]
    return element("dl", *parts, class_="facts")


def code(text: str, *, wrap: bool = False) -> Html:
    """Something to copy, as it stands; `wrap` breaks long lines."""
    pre = element("pre", element("code", text), class_="wrap" if wrap else None)
    return element("div", pre, class_="box", tabindex="0", role="region", aria_label="code")


def figure(picture: Html, caption: Any = None) -> Html:
    """A diagram and what it shows."""
    return element("figure", picture, element("figcaption", caption) if caption else None)


def bar(share: float, colour: str = "c0") -> Html:
    """A small bar, `share` of its full length."""
    width = f"{100 * min(max(share, 0.0), 1.0):.2f}%"
    return element("span", element("span", style=f"width:{width}", class_=f"part {colour}"), class_="bar")


def paragraph(*parts: Any, class_: str | None = None) -> Html:
    """A paragraph."""
    return element("p", *parts, class_=class_)


def details(summary: str, *parts: Any) -> Html:
    """What is shown when asked for."""
    return element("details", element("summary", summary), *parts)


def spoken(key: str) -> str:
    """The name of a metric as it is written.

    >>> spoken("val_macro_f1"), spoken("rmse")
    ('validation macro F1', 'RMSE')
    """
    return " ".join(_WRITTEN.get(word, word) for word in key.split("_"))


def four(value: float | None) -> tuple[str, float]:
    """A table cell with a number of four places."""
    if value is None:
        return "n/a", float("-inf")
    return (f"{value:.4f}" if abs(value) < 1e4 else f"{value:.4g}"), value


def seconds(value: float | None) -> str:
    """A time in words.

    >>> seconds(0.04), seconds(75.0), seconds(7300.0)
    ('0.04 s', '1 min 15 s', '2 h 1 min')
    """
    if value is None:
        return "n/a"
    if value < 59.95:
        return f"{value:.2f} s" if value < 1 else f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(nbytes: float | None) -> str:
    """Bytes in words.

    >>> size(999), size(2_500_000), size(None)
    ('999 B', '2.5 MB', 'n/a')
    """
    if nbytes is None:
        return "n/a"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes:.0f} B"

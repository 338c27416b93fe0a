"""Diagrams as inline SVG. Colours are the page's: text is currentColor, series and lines have classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyft.report.markup import Html, element, join

WIDTH, HEIGHT = 380, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 26, 34
MANY = 400
"""Points from which on they are drawn pale, so that their density shows."""
LEVELS = 8
"""Strengths of colour in a matrix whose cells are too many for one element each."""
NUMBERED = 22
"""Pixels a side from which on a cell of a matrix shows its number."""
LETTER = 6.2
"""About how wide a letter is at the size of the labels, pixels."""

Values = Sequence[float | None]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: for the legend.
        x, y: the points; None and numbers that are not finite leave a gap.
        colour: class of the page's style, "c0" to "c5".
    """

    name: str
    x: Values
    y: Values
    colour: str = "c0"


def number(value: float | None) -> str:
    """A number in few letters.

    >>> [number(v) for v in (0.25, 1234567.0, 3e-5, 12.0, None)]
    ['0.25', '1.23e+06', '3e-05', '12', 'n/a']
    """
    if value is None or not math.isfinite(value):
        return "n/a"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}"
    return f"{value:.4f}".rstrip("0").rstrip(".")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between `low` and `high`, about `count` of them.

    >>> ticks(0.0, 1.0), ticks(3.0, 3.0)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [3.0])
    """
    if not high > low:
        return [low]
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next((factor * unit for factor in (1, 2, 5) if factor * unit >= raw * 0.999), 10 * unit)
    first = math.ceil(low / step - 1e-9)
    return [round(place * step, 12) for place in range(first, math.floor(high / step + 1e-9) + 1)]


def finite(values: Values) -> list[float]:
    """The numbers among the values."""
    return [value for value in values if value is not None and math.isfinite(value)]


class Axes:
    """Places of numbers in a frame, and the frame with its ticks."""

    def __init__(
        self, x: tuple[float, float], y: tuple[float, float], *, width: int = WIDTH, height: int = HEIGHT
    ) -> None:
        self.x, self.y, self.width, self.height = _widened(*x), _widened(*y), width, height

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        inner, tall = self.width - LEFT - RIGHT, self.height - TOP - BOTTOM
        return round(LEFT + across * inner, 2), round(TOP + (1 - up) * tall, 2)

    def frame(
        self, x_label: str, y_label: str, x_ticks: Sequence[float] | None = None, y_ticks: Sequence[float] | None = None
    ) -> Html:
        """Grid lines, numbers and the names of the axes."""
        parts = []
        for value in ticks(*self.y, 4) if y_ticks is None else y_ticks:
            _, y = self.at(self.x[0], value)
            parts.append(element("line", class_="grid", x1=LEFT, x2=self.width - RIGHT, y1=y, y2=y))
            parts.append(label(number(value), LEFT - 6, y + 3.5, "end"))
        for value in ticks(*self.x) if x_ticks is None else x_ticks:
            x, _ = self.at(value, self.y[0])
            parts.append(label(number(value), x, self.height - BOTTOM + 14))
        bottom = self.height - BOTTOM
        parts.append(element("line", class_="axis", x1=LEFT, x2=self.width - RIGHT, y1=bottom, y2=bottom))
        parts.append(label(x_label, (LEFT + self.width - RIGHT) / 2, self.height - 5))
        if y_label:
            parts.append(label(y_label, 4, 12, "start"))
        return join(parts)


def _widened(low: float, high: float) -> tuple[float, float]:
    if high > low:
        return low, high
    room = abs(low) * 0.1 or 1.0
    return low - room, high + room


def label(text: str, x: float, y: float, anchor: str = "middle", class_: str = "label", **more: Any) -> Html:
    """A small text at a point."""
    return element("text", text, class_=class_, x=round(x, 2), y=round(y, 2), text_anchor=anchor, **more)


def drawing(parts: Sequence[Any], title: str, width: float = WIDTH, height: float = HEIGHT, class_: str = "") -> Html:
    """The <svg> element; `title` is what a screen reader says."""
    return element(
        "svg", *parts, class_=f"chart {class_}".strip(), viewBox=f"0 0 {width:g} {height:g}", role="img",
        aria_label=title, width=f"{width:g}", height=f"{height:g}",
    )  # fmt: skip


def line_chart(
    series: Sequence[Series], title: str, x_label: str = "epoch", breaks: Sequence[float] = (), from_zero: bool = False
) -> Html:
    """Lines with a mark at each point, and dotted lines at `breaks`."""
    xs = [value for one in series for value in finite(one.x)]
    ys = [value for one in series for value in finite(one.y)]
    if not xs or not ys:
        return element("p", f"{title}: nothing to draw.", class_="quiet")
    low, high = min(ys), max(ys)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    axes = Axes((min(xs), max(xs)), (0.0 if from_zero and low >= 0 else low - room, high + room))
    parts: list[Any] = [axes.frame(x_label, "", x_ticks=whole_ticks(min(xs), max(xs)))]
    for place in breaks:
        x, _ = axes.at(place, axes.y[0])
        parts.append(element("line", class_="break", x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM))
    for one in series:
        points = _points(one)
        parts.append(element("path", class_=f"line {one.colour}", d=_path(axes, points)))
        for point in filter(None, points):
            across, up = axes.at(*point)
            tip = element("title", f"{one.name}, {x_label} {number(point[0])}: {number(point[1])}")
            parts.append(element("circle", tip, class_=f"dot {one.colour}", cx=across, cy=up, r=2.6))
    parts.append(legend([(one.name, one.colour) for one in series]))
    return drawing(parts, title)


def whole_ticks(low: float, high: float) -> list[float]:
    """The first epoch, and whole numbers after it.

    >>> whole_ticks(1.0, 20.0), whole_ticks(1.0, 1.0)
    ([1.0, 5.0, 10.0, 15.0, 20.0], [1.0])
    """
    found = [value for value in ticks(low, high) if value == int(value)]
    step = found[1] - found[0] if len(found) > 1 else 1.0
    return [low, *(value for value in found if value - low >= step / 2)]


def _points(one: Series) -> list[tuple[float, float] | None]:
    """The points of a series, None for a gap."""
    pairs = zip(one.x, one.y, strict=True)
    return [(x, y) if x is not None and y is not None and math.isfinite(x + y) else None for x, y in pairs]


def _path(axes: Axes, points: Sequence[tuple[float, float] | None]) -> str:
    words, pen = [], "M"
    for point in points:
        if point is None:
            pen = "M"
            continue
        across, up = axes.at(*point)
        words.append(f"{pen}{across:g} {up:g}")
        pen = "L"
    return "".join(words)


def legend(names: Sequence[tuple[str, str]], x: float = LEFT, y: float = 12) -> Html:
    """Names of series side by side, each with a piece of its line."""
    parts = []
    for name, colour in names:
        parts.append(element("line", class_=f"line {colour}", x1=x, x2=x + 14, y1=y - 3.5, y2=y - 3.5))
        parts.append(label(name, x + 19, y, "start"))
        x += 19 + LETTER * len(name) + 14
    return join(parts)


def reliability(count: Sequence[int], confidence: Values, accuracy: Values, what: str) -> Html:
    """The reliability diagram: a bar per bin, the diagonal, and below how many there are in each bin."""
    size, deep = len(count), 54
    height = 300 + deep
    axes = Axes((0.0, 1.0), (0.0, 1.0), height=300)
    parts: list[Any] = [axes.frame("", what, x_ticks=[], y_ticks=[0, 0.25, 0.5, 0.75, 1])]
    for place in range(size):
        found, meant = accuracy[place], confidence[place]
        if found is None or meant is None:
            continue
        left, top = axes.at(place / size, found)
        right, bottom = axes.at((place + 1) / size, 0)
        _, wanted = axes.at(0, meant)
        tip = element(
            "title",
            f"probability {place / size:.2f} to {(place + 1) / size:.2f}: {count[place]:,} predictions, "
            f"mean {meant:.3f}, came true {found:.3f}",
        )
        wide = right - left - 1.5
        high, low = min(top, wanted), max(top, wanted)
        parts.append(
            element("rect", tip, class_="fill c0", x=left, y=low, width=round(wide, 2), height=round(bottom - low, 2))
        )
        parts.append(
            element(
                "rect",
                class_="gap" if meant > found else "gap less",
                x=left,
                y=high,
                width=round(wide, 2),
                height=round(max(low - high, 0.1), 2),
            )
        )
    (x1, y1), (x2, y2) = axes.at(0, 0), axes.at(1, 1)
    parts.append(element("line", class_="diagonal", x1=x1, y1=y1, x2=x2, y2=y2))
    base, most = height - BOTTOM, max(max(count), 1)
    for place in range(size):
        left, _ = axes.at(place / size, 0)
        right, _ = axes.at((place + 1) / size, 0)
        tall = round(count[place] / most * (deep - 8), 2)
        tip = element("title", f"{count[place]:,} predictions")
        parts.append(
            element("rect", tip, class_="fill quiet", x=left, y=base - tall, width=round(right - left - 1.5, 2),
                    height=tall)
        )  # fmt: skip
    parts.append(element("line", class_="axis", x1=x1, x2=x2, y1=base, y2=base))
    parts += [label(number(value), axes.at(value, 0)[0], base + 14) for value in (0, 0.25, 0.5, 0.75, 1)]
    parts += [label("probability", (x1 + x2) / 2, height - 5), label("count", LEFT - 6, base - deep / 2 + 8, "end")]
    return drawing(parts, "reliability diagram", height=height)


def scatter(x: Sequence[float], y: Sequence[float], x_label: str, y_label: str) -> Html:
    """Points against the diagonal, both axes of one scale."""
    low, high = min(*x, *y), max(*x, *y)
    axes = Axes((low, high), (low, high), height=330)
    parts: list[Any] = [axes.frame(x_label, y_label)]
    (x1, y1), (x2, y2) = axes.at(low, low), axes.at(high, high)
    parts.append(element("line", class_="diagonal", x1=x1, y1=y1, x2=x2, y2=y2))
    points = "".join("M{:g} {:g}h0".format(*axes.at(a, b)) for a, b in zip(x, y, strict=True))
    parts.append(element("path", class_="points c0 many" if len(x) > MANY else "points c0", d=points))
    return drawing(parts, f"{y_label} against {x_label}", height=330)


def histogram(values: Sequence[float], x_label: str, bins: int = 30) -> Html:
    """How many values lie where, with a line at 0."""
    low, high = _widened(min(values), max(values))
    counts = [0] * bins
    for value in values:
        counts[min(int((value - low) / (high - low) * bins), bins - 1)] += 1
    axes = Axes((low, high), (0, max(counts)), height=330)
    parts: list[Any] = [axes.frame(x_label, "how many")]
    for place, count in enumerate(counts):
        start, end = (low + (high - low) * (place + side) / bins for side in (0, 1))
        (left, top), (right, bottom) = axes.at(start, count), axes.at(end, 0)
        tip = element("title", f"{number(start)} to {number(end)}: {count:,}")
        parts.append(
            element("rect", tip, class_="fill c0", x=left, y=top, width=round(right - left - 1, 2),
                    height=round(bottom - top, 2))
        )  # fmt: skip
    if low < 0 < high:
        (x, top), (_, bottom) = axes.at(0, max(counts)), axes.at(0, 0)
        parts.append(element("line", class_="diagonal", x1=x, x2=x, y1=top, y2=bottom))
    return drawing(parts, f"histogram of {x_label}", height=330)


def spark(values: Values, width: int = 170, height: int = 48) -> Html:
    """A small line without axes."""
    numbers = finite(values)
    if not numbers:
        return Html("")
    low, high = _widened(min(numbers), max(numbers))
    step = (width - 4) / max(len(values) - 1, 1)
    path, pen = [], "M"
    for place, value in enumerate(values):
        if value is None or not math.isfinite(value):
            pen = "M"
            continue
        path.append(f"{pen}{2 + place * step:.4g} {height - 3 - (value - low) / (high - low) * (height - 6):.4g}")
        pen = "L"
    return drawing([element("path", class_="line c0", d="".join(path))], "the values in order", width, height, "spark")


def heatmap(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> Html:
    """A confusion matrix, rows true and columns predicted. The colour of a cell is its share of the row."""
    size = len(names)
    cell = 34 if size <= 12 else 22 if size <= 30 else 13 if size <= 55 else 9 if size <= 100 else 5
    letter = min(cell - 1.5, 11)
    shown = [short(name, 26) for name in names]
    side = 0.0 if cell < 8 else min(max(map(len, shown)) * letter * 0.58 + 8, 170)
    head, width = side + 16, side + size * cell + 18
    if cell >= 8:
        cells = [_names(shown, cell, letter, side, head), *_cells(matrix, names, cell, side, head)]
    else:
        cells = _many_cells(matrix, cell, side, head)
    box = element(
        "rect", class_="box", x=f"{side + 13.5:g}", y=f"{head - 0.5:g}", width=size * cell, height=size * cell
    )
    axes = [label("predicted", side + 14 + size * cell / 2, 11), _turned("true", 10, head + size * cell / 2)]
    return drawing([box, *axes, *cells], "confusion matrix", width, head + size * cell + 4, "matrix")


def _cells(matrix: Sequence[Sequence[int]], names: Sequence[str], cell: int, side: float, head: float) -> list[Html]:
    """A square with a tip for each cell that is not empty; large ones with their number."""
    cells = []
    for row, counts in enumerate(matrix):
        total = sum(counts) or 1
        for column, count in enumerate(counts):
            if not count:
                continue
            tip = element("title", f"true {names[row]}, predicted {names[column]}: {count:,} of {total:,}")
            # Numbers are printed on the colour, which stays pale enough for them.
            strength = (0.12 + 0.88 * count / total) * (0.5 if cell >= NUMBERED else 1.0)
            x, y = side + column * cell + 14, head + row * cell
            cells.append(
                element("rect", tip, class_="right" if row == column else "wrong", x=f"{x:g}", y=f"{y:g}",
                        width=cell - 1, height=cell - 1, fill_opacity=f"{strength:.3g}")
            )  # fmt: skip
            if cell >= NUMBERED:
                shown = f"{count}" if count < 10_000 else f"{count / 1000:.0f}k"
                cells.append(label(shown, x + (cell - 1) / 2, y + cell / 2 + 3.5, class_="count"))
    return cells


def _many_cells(matrix: Sequence[Sequence[int]], cell: int, side: float, head: float) -> list[Html]:
    """Cells of equal colour as one path: of hundreds of classes there are tens of thousands."""
    paths: dict[tuple[str, int], list[str]] = {}
    for row, counts in enumerate(matrix):
        total = sum(counts) or 1
        for column, count in enumerate(counts):
            if count:
                level = 2 + round(count / total * (LEVELS - 2))
                x, y = side + column * cell + 14, head + row * cell
                square = f"M{x:g} {y:g}h{cell - 1}v{cell - 1}h{1 - cell}z"
                paths.setdefault(("right" if row == column else "wrong", level), []).append(square)
    return [
        element("path", class_=kind, d="".join(squares), fill_opacity=f"{level / LEVELS:.3g}")
        for (kind, level), squares in paths.items()
    ]


def _names(shown: Sequence[str], cell: int, letter: float, side: float, head: float) -> Html:
    parts = []
    for place, name in enumerate(shown):
        middle = place * cell + cell / 2 + letter * 0.35
        style = f"font-size:{letter:g}px"
        parts.append(label(name, side + 10, head + middle, "end", style=style))
        x, y = side + 14 + middle, head - 5
        parts.append(label(name, x, y, "start", style=style, transform=f"rotate(-90 {x:g} {y:g})"))
    return join(parts)


def _turned(text: str, x: float, y: float) -> Html:
    return label(text, x, y, transform=f"rotate(-90 {x:g} {y:g})")


def short(text: str, letters: int) -> str:
    """The text on one line, cut to so many letters.

    >>> short("a long  name", 7)
    'a long\u2026'
    """
    line = " ".join(text.split())
    return line if len(line) <= letters else line[: letters - 1].rstrip() + "\u2026"

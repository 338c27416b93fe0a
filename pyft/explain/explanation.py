"""An explanation that can be read: printed, as HTML in a notebook or a report, or as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyft.core.pictures import data_uri
from pyft.errors import need
from pyft.report.markup import Html, element, escape, foreign, join
from pyft.report.svg import number

FOR, AGAINST = (58, 122, 222), (222, 106, 44)
"""Colours of what speaks for and against the target; pale enough for text on them, dark or light."""
STRONGEST = 0.45
SHOWN = 20
LISTED = 10
SIDE = 288


@dataclass(frozen=True, eq=False)
class Explanation:
    """What one prediction rests on. Printing it lists the strongest parts.

    Attributes:
        method: "integrated_gradients", "input_gradients" or "occlusion".
        kind: "tokens", "pixels" or "features".
        attributions: float64: (T,) for tokens; (C, H, W) for pixels; the shape of the sample for features. Above 0
            speaks for the target. In the unit of `output`; gradients in that unit per unit of the input.
        features: the T tokens, or the names of the features, flat; [] for pixels.
        target: the label (or the number of the output) that is explained.
        target_index: its number among the outputs.
        score: its probability; for regression the predicted value.
        output: what is explained: the logit of the target; for regression the predicted value.
        baseline_output: the same for the baseline; None for gradients.
        delta: by how much integrated gradients miss adding up to output - baseline_output; None for other methods.
        steps: of integrated gradients; None for other methods.
        values: of the features, flat; None for tokens and pixels.
        text: the text, and `spans`: (start, end) of each token in it, (0, 0) for one that is not; None for other kinds.
        picture: (H, W, 3) uint8, as the model sees it; None for other kinds.
    """

    method: str
    kind: str
    attributions: NDArray[np.float64]
    target: str
    target_index: int
    score: float
    output: float
    features: list[str] = field(default_factory=list)
    baseline_output: float | None = None
    delta: float | None = None
    steps: int | None = None
    values: list[float] | None = None
    text: str | None = None
    spans: list[tuple[int, int]] | None = None
    picture: NDArray[np.uint8] | None = None

    def top(self, count: int = LISTED) -> list[tuple[str, float]]:
        """The `count` strongest tokens or features with their attributions, by size; [] for pixels."""
        flat = self.attributions.reshape(-1)
        if not self.features:
            return []
        return [
            (self.features[place], float(flat[place])) for place in np.argsort(-np.abs(flat), kind="stable")[:count]
        ]

    def pixel_map(self) -> NDArray[np.float64]:
        """(H, W): attributions summed over the channels."""
        return self.attributions.sum(axis=0)

    def __str__(self) -> str:
        lines = [self.headline()]
        if self.kind == "pixels":
            across = self.pixel_map()
            row, column = np.unravel_index(int(np.abs(across).argmax()), across.shape)
            lines.append(f"{across.shape[1]} x {across.shape[0]} pixels, the strongest at column {column}, row {row}")
        lines += [f"{value:>+10.4f}  {name}" for name, value in self.top()]
        return "\n".join(lines)

    __repr__ = __str__

    def headline(self) -> str:
        """Target, score and method in a line."""
        words = f"{self.target}: {number(self.score)}, by {self.method.replace('_', ' ')}"
        if self.delta is None or self.baseline_output is None:
            return words
        difference = self.output - self.baseline_output
        return f"{words}; the parts add up to {number(difference + self.delta)} of {number(difference)}"

    def to_html(self) -> str:
        """A piece of HTML that needs no style sheet: tokens on their colours, the picture with an overlay, or bars.

        Raises:
            MissingExtraError: a picture, and Pillow is not installed.
        """
        draw = {"tokens": self._tokens, "pixels": self._pixels, "features": self._features}
        key = [_swatch(FOR), " for ", foreign(self.target), "\u2003", _swatch(AGAINST), " against"]
        head = element("p", element("strong", foreign(self.target)), f" {number(self.score)} ", style="margin:.3em 0")
        how = element("p", join(key), element("br"), self._how(), style="margin:.4em 0;font-size:.85em;opacity:.85")
        return element("div", head, draw[self.kind](), how, class_="explanation")

    _repr_html_ = to_html

    def _how(self) -> str:
        return self.headline().partition(", by ")[2]

    def _tokens(self) -> Html:
        scale = float(np.abs(self.attributions).max(initial=0.0)) or 1.0
        parts: list[Any] = []
        end = 0
        for place, token in enumerate(self.features):
            value = float(self.attributions[place])
            shown: Any = token
            if self.text is not None and self.spans is not None:
                start, stop = self.spans[place]
                if start == stop:
                    parts.append(" " if end else None)
                    shown = element("small", token, style="opacity:.75")
                else:
                    parts.append(self.text[end:start])
                    shown, end = self.text[start:stop], stop
            parts.append(element("span", shown, style=_colour(value / scale), title=f"{token}: {value:+.4f}"))
            if self.spans is None or self.spans[place][0] == self.spans[place][1]:
                parts.append(" ")
        if self.text is not None and self.spans is not None:
            parts.append(self.text[end:])
        return element("p", join(parts), dir="auto", style="line-height:1.9;white-space:pre-wrap;margin:.3em 0")

    def _features(self) -> Html:
        flat = self.attributions.reshape(-1)
        order = np.argsort(-np.abs(flat), kind="stable")[:SHOWN]
        scale = float(np.abs(flat).max(initial=0.0)) or 1.0
        rows = []
        for place in order:
            value = float(flat[place])
            width = f"width:{50 * abs(value) / scale:.1f}%;height:.7em;display:block;background:rgb{_shade(value)}"
            side = "margin-left:50%" if value >= 0 else f"margin-left:{50 - 50 * abs(value) / scale:.1f}%"
            known = "" if self.values is None else number(self.values[place])
            rows.append(element(
                "tr",
                element("td", foreign(self.features[place]), style="padding:.15em .6em;text-align:left"),
                element("td", known, style="padding:.15em .6em;text-align:right"),
                element("td", element("span", style=f"{width};{side}"), style="width:10em;padding:.15em .6em"),
                element("td", f"{value:+.4f}", style="padding:.15em .6em;text-align:right"),
            ))  # fmt: skip
        more = len(flat) - len(order)
        note = element("p", f"and {more} weaker ones", style="margin:.3em 0;font-size:.85em") if more > 0 else None
        table = element("table", element("tbody", *rows), style="border-collapse:collapse;font-size:.9em;width:auto")
        return element("div", table, note, style="overflow-x:auto;max-width:100%", tabindex="0")

    def _pixels(self) -> Html:
        module = need("PIL.Image", "image", "drawing an explanation")
        assert self.picture is not None
        both = [module.fromarray(self.picture), module.fromarray(overlay(self.picture, self.pixel_map()))]
        style = "width:11em;max-width:48%;height:auto;border-radius:.2em;vertical-align:top;margin-right:.4em"
        if max(self.picture.shape[:2]) <= 64:
            style += ";image-rendering:pixelated"
        images = [
            element("img", src=data_uri(image, SIDE), alt=alt, style=style)
            for image, alt in zip(both, ("as the model sees it", "with its attributions"), strict=True)
        ]
        return element("div", *images)


def overlay(picture: NDArray[np.uint8], across: NDArray[np.float64]) -> NDArray[np.uint8]:
    """(H, W, 3) uint8: the picture in pale grey, under what speaks for (blue) and against (orange) the target.

    Args:
        picture: (H, W, 3).
        across: (H, W) attributions. They are smoothed, since those of single pixels are noise to the eye.
    """
    smooth = _smoothed(across, max(min(across.shape) // 48, 0))
    scale = float(np.quantile(np.abs(smooth), 0.99)) or float(np.abs(smooth).max()) or 1.0
    strength = np.clip(np.abs(smooth) / scale, 0, 1)[..., None] * 0.85
    grey = picture.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    base = np.repeat((grey * 0.7 + 255 * 0.3)[..., None], 3, axis=2)
    colour = np.where((smooth >= 0)[..., None], np.array(FOR, float), np.array(AGAINST, float))
    return (base * (1 - strength) + colour * strength).round().astype(np.uint8)


def _smoothed(values: NDArray[np.float64], radius: int) -> NDArray[np.float64]:
    """A mean over 2 * radius + 1 pixels, twice along each side."""
    kernel = np.ones(2 * radius + 1) / (2 * radius + 1)
    for _ in range(2):
        for axis in (0, 1):
            padded = np.pad(values, [(radius, radius) if side == axis else (0, 0) for side in (0, 1)], mode="edge")
            values = np.apply_along_axis(lambda line: np.convolve(line, kernel, mode="valid"), axis, padded)
    return values


def _shade(value: float) -> tuple[int, int, int]:
    return FOR if value >= 0 else AGAINST


def _colour(share: float) -> str:
    red, green, blue = _shade(share)
    return f"background:rgba({red},{green},{blue},{STRONGEST * abs(share):.3f});border-radius:.2em;padding:.1em 0"


def _swatch(colour: tuple[int, int, int]) -> Html:
    return element(
        "span", style=f"display:inline-block;width:.8em;height:.8em;border-radius:.2em;background:rgb{colour}"
    )


def together(explanations: Sequence[tuple[Any, Explanation]]) -> list[Html]:
    """Explanations with a line of the caller's above each, as pieces of a page."""
    return [element("article", escape(head), Html(found.to_html()), class_="card") for head, found in explanations]

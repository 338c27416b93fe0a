"""HTML whose text is escaped unless it is HTML already: labels, texts and file names come from anywhere."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Any

# HTML allows no other control characters, and a lone surrogate cannot be written as UTF-8.
_UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_VOID = frozenset({"br", "col", "img", "input", "meta", "link", "hr"})


class Html(str):
    """Text that is HTML already, and is not escaped again."""

    __slots__ = ()


def escape(value: Any) -> Html:
    """`value` as HTML text; what is `Html` stays as it is.

    >>> escape("<b> & 'c'")
    '&lt;b&gt; &amp; &#x27;c&#x27;'
    """
    if isinstance(value, Html):
        return value
    return Html(_escaped(str(value)))


def join(parts: Iterable[Any], between: str = "") -> Html:
    """The parts, each escaped, one after the other. None is left out."""
    return Html(escape(between).join(escape(part) for part in parts if part is not None))


def element(name: str, /, *parts: Any, **attributes: Any) -> Html:
    """One element. Attributes: "_" stands for "-", a last "_" is dropped, True is a bare word, None and False nothing.

    >>> element("p", "a < b", class_="note", data_value=3)
    '<p class="note" data-value="3">a &lt; b</p>'
    """
    words = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        word = key.rstrip("_").replace("_", "-")
        words.append(f" {word}" if value is True else f' {word}="{escape(str(value))}"')
    head = f"<{name}{''.join(words)}>"
    return Html(head if name in _VOID else f"{head}{join(parts)}</{name}>")


def foreign(value: Any) -> Html:
    """A word of the data's, which may be written from right to left without turning what stands around it, and is
    broken after "_" and "/" where the line is short."""
    if isinstance(value, Html):
        return element("bdi", value)
    return element("bdi", Html(re.sub(r"([_/]+)(?=[^_/\\s])", r"\1<wbr>", _escaped(str(value)))))


def _escaped(text: str) -> str:
    return html.escape(_UNWRITABLE.sub("\ufffd", text))

"""What a source gives before labels are turned into class numbers."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyft.errors import DataError

if TYPE_CHECKING:
    from pyft.samples import Kind


@dataclass
class Raw:
    """N inputs with labels as they came.

    Attributes:
        kind: as in `Samples`.
        inputs: N texts, paths or pictures in a list, a float32 or int64 Tensor (N, ...), `TableRows`, or
            `LazyInputs`.
        labels: list of N str; list of N lists of str (multilabel); array (N,) or (N, K); None without labels.
        name: file or argument, for messages.
        lines: line number of each row of a file, for messages; None for in-memory data.
        class_names: the classes, where the source fixes them (folders, `Dataset.classes`).
        from_table: labels were read from a text file, where numbers are written as text.
        notes: lines worth telling the user.
        columns: names of the feature columns of a table, in the order of `inputs`.
    """

    kind: Kind
    inputs: Any
    labels: Any
    name: str
    lines: Sequence[int] | None = None
    class_names: list[str] | None = None
    from_table: bool = False
    notes: list[str] = field(default_factory=list)
    columns: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def where(self, row: int) -> str:
        """'line 17' of a file, or 'row 15' (counted from 0) of in-memory data."""
        return f"row {row}" if self.lines is None else f"line {self.lines[row]}"


def nearest(word: str, known: Sequence[str]) -> str:
    """'; nearest: ...' when some known word resembles `word`, else an empty text.

    >>> nearest("card_arival", ["card_arrival", "top_up"])
    "; nearest: 'card_arrival'"
    """
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; nearest: {found[0]!r}" if found else ""


def listed(words: Sequence[object], limit: int = 6) -> str:
    """The first `limit` words, quoted, and how many more there are.

    >>> listed(["a", "b", "c"], limit=2)
    "'a', 'b' and 1 more"
    """
    shown = ", ".join(repr(str(word)) for word in words[:limit])
    return shown if len(words) <= limit else f"{shown} and {len(words) - limit} more"


def counted(number: int, thing: str, things: str | None = None) -> str:
    """'1 text' or '3 texts'.

    >>> counted(1, "class", "classes"), counted(2, "class", "classes")
    ('1 class', '2 classes')
    """
    return f"{number} {thing if number == 1 else things or thing + 's'}"


def check_exists(path: Path, argument: str) -> None:
    """Raise `DataError` with the nearest name in the folder when `path` is not there."""
    if path.exists():
        return
    try:
        siblings = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        raise DataError(
            f"{argument}: the folder {str(path.parent)!r} does not exist (looked in {Path.cwd()})"
        ) from None
    raise DataError(
        f"{argument}: no such file or folder: {str(path)!r} (looked in {Path.cwd()}){nearest(path.name, siblings)}"
    )

"""The words for what a model does."""

from __future__ import annotations

from pyft.data.raw import nearest
from pyft.errors import ConfigError
from pyft.samples import Kind, Problem

KINDS: dict[str, Kind] = {"text": "text", "image": "image", "tabular": "array", "array": "array"}
PROBLEMS: dict[str, Problem] = {
    "classification": "classification",
    "multilabel": "multilabel",
    "regression": "regression",
}


def parse_task(task: str) -> tuple[Kind | None, Problem | None]:
    """Kind and problem that a task word names; None for what is left to be seen from the data.

    Raises:
        ConfigError: the word is not known.

    >>> parse_task("text-classification"), parse_task("regression"), parse_task("auto")
    (('text', 'classification'), (None, 'regression'), (None, None))
    """
    word = str(task).strip().lower().replace("_", "-").replace(" ", "-")
    if word == "auto":
        return None, None
    kind, _, problem = word.rpartition("-")
    if problem in PROBLEMS and (kind in KINDS or not kind):
        return KINDS.get(kind), PROBLEMS[problem]
    if word in KINDS:
        return KINDS[word], None
    words = ["auto", *PROBLEMS, *(f"{kind}-{problem}" for kind in ("text", "image", "tabular") for problem in PROBLEMS)]
    raise ConfigError(f"task={task!r}: expected one of {', '.join(words)}{nearest(word, words)}")

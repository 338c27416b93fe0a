"""What the folder of a run tells, read as plain data; a file that is not there is None or empty."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyft.errors import CheckpointError, ConfigError


@dataclass
class RunFacts:
    """A run in plain data.

    Attributes:
        name: of the folder.
        config, environment, metrics, held_out, parity, cost: content of the JSON files of these names, {} where there
            is none.
        timings: seconds per part of the story.
        plan: plan.txt.
        notes: lines of notes.txt.
        history: one dict per epoch, numbers as floats, None where the file has nothing.
        files: (name, bytes) of what the folder holds.
    """

    name: str
    config: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    held_out: dict[str, Any] = field(default_factory=dict)
    parity: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    plan: str = ""
    notes: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    files: list[tuple[str, int]] = field(default_factory=list)

    @property
    def problem(self) -> str:
        """ "classification", "multilabel" or "regression"."""
        return str(self.config.get("data", {}).get("problem", "classification"))

    @property
    def role(self) -> str | None:
        """The held-out set whose details are shown: "test" where there is one, else "val"; None without either."""
        return next((role for role in ("test", "val") if role in self.metrics), None)

    @property
    def detail(self) -> dict[str, Any]:
        """Metrics, classes and confusion matrix of that set."""
        return {} if self.role is None else self.metrics[self.role]

    @property
    def classes(self) -> list[str]:
        """Class names; [] for regression."""
        return [str(name) for name in self.config.get("classes") or []]

    @property
    def role_name(self) -> str:
        """The held-out set in words."""
        return {"test": "test", "val": "validation"}.get(self.role or "", "held-out")


def read_run(folder: Path) -> RunFacts:
    """The facts of the run in `folder`.

    Raises:
        ConfigError: there is no config.json, so it is not the folder of a run.
        CheckpointError: a file is damaged.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is not the folder of a run: there is no config.json, which every run has")
    parts = {
        name: _json(folder / f"{name}.json")
        for name in ("config", "environment", "metrics", "held_out", "parity", "cost", "timings")
    }
    return RunFacts(
        name=folder.resolve().name,
        plan=_text(folder / "plan.txt").rstrip(),
        notes=[line for line in _text(folder / "notes.txt").splitlines() if line.strip()],
        history=_rows(folder / "metrics.csv"),
        files=sorted((path.name, path.stat().st_size) for path in folder.iterdir() if _is_shown(path)),
        **parts,
    )


def _is_shown(path: Path) -> bool:
    # The page is of a finished run; these two are written after it.
    return path.is_file() and not path.name.startswith(".") and path.name not in ("report.html", "status.json")


def _json(path: Path) -> dict[str, Any]:
    text = _text(path)
    if not text:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}), so there can be no report of the run") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object, so there can be no report of the run")
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}), so there can be no report of the run") from None


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = csv.DictReader(_text(path).splitlines())
    return [{str(key): _value(str(key), value) for key, value in row.items()} for row in rows]


def _value(key: str, text: Any) -> Any:
    if key == "stage" or text in ("", None):
        return text or None
    try:
        value = float(text)
    except (TypeError, ValueError):
        return text
    return value if math.isfinite(value) else None

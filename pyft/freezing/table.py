"""A freeze plan as a short table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from pyft.freezing.parts import named_weights
from pyft.freezing.select_rows import Chosen

MAX_ROWS = 16
NAME_WIDTH = 36


@dataclass(frozen=True)
class Row:
    """A module, or a run of modules side by side, and how many of its parameters there are and train."""

    name: str
    trainable: int
    total: int

    @property
    def state(self) -> str:
        """ "trains", "frozen" or "part"."""
        if not self.trainable:
            return "frozen"
        return "trains" if self.trainable == self.total else "part"


def make_rows(model: nn.Module, trainable: Mapping[int, int]) -> list[Row]:
    """One row per top-level part; parts that train in part are opened while the table stays short.

    Args:
        trainable: `id` of each parameter that trains, and how many of its elements do. A parameter with several names
            is counted at its first.
    """
    weights = named_weights(model, remove_duplicate=False)
    names, whole = {name for name, _ in weights}, {id(parameter) for _, parameter in weights}
    owner: dict[int, nn.Module] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owner.setdefault(id(parameter), module)

    def count(name: str, module: nn.Module, below: bool = True) -> Row:
        inside = set(module.modules()) if below else {module}
        found = {id(p): p.numel() for p in module.parameters(below) if owner[id(p)] in inside and id(p) in whole}
        return Row(name, sum(trainable.get(key, 0) for key in found), sum(found.values()))

    def open_row(row: Row) -> Iterator[Row]:
        if row.name in names:
            yield row
            return
        module = model.get_submodule(row.name)
        prefix = f"{row.name}." if row.name else ""
        for key, p in module.named_parameters(recurse=False):
            if id(p) in whole:
                yield Row(f"{prefix}{key}", trainable.get(id(p), 0), p.numel())
        yield from (count(prefix + key, child) for key, child in module.named_children())

    rows = [row for row in open_row(count("", model)) if row.total]
    while True:
        opened = _open_first(rows, open_row)
        if opened is None or len(_merge(opened)) > MAX_ROWS:
            return _merge(rows)
        rows = opened


def _open_first(rows: list[Row], open_row: Callable[[Row], Iterable[Row]]) -> list[Row] | None:
    """The rows with the shallowest one of state "part" replaced by what it holds; None when there is none to open."""
    parts = [row for i, row in enumerate(rows) if row.state == "part" and not _has_twin(rows, i)]
    # A weight that trains in part has nothing inside.
    parts = [row for row in parts if [row] != list(open_row(row))]
    if not parts:
        return None
    chosen = min(parts, key=lambda row: row.name.count("."))
    at = rows.index(chosen)
    inner = [row for row in open_row(chosen) if row.total]
    return [*rows[:at], *inner, *rows[at + 1 :]]


def _has_twin(rows: list[Row], i: int) -> bool:
    """Whether the row is one of several blocks that train alike: they become one row and are not opened."""
    return any(0 <= j < len(rows) and _alike(rows[i], rows[j]) for j in (i - 1, i + 1))


def _alike(one: Row, other: Row) -> bool:
    """Numbered neighbours under one parent, in one state; of state "part" only with the same counts."""
    names = [row.name.partition("..")[0].rpartition(".") for row in (one, other)]
    if names[0][0] != names[1][0] or not all(key.isdigit() for _, _, key in names) or one.state != other.state:
        return False
    return one.state != "part" or one.trainable * other.total == other.trainable * one.total


def _merge(rows: list[Row]) -> list[Row]:
    """Numbered neighbours in one state become one row: `layer.0..3`."""
    merged: list[Row] = []
    for row in rows:
        before = merged[-1] if merged else None
        if before is not None and _alike(before, row):
            name = f"{before.name.partition('..')[0]}..{row.name.rpartition('.')[2]}"
            merged[-1] = Row(name, before.trainable + row.trainable, before.total + row.total)
        else:
            merged.append(row)
    return merged


def format_table(rows: list[Row], trainable: int, total: int, footer: list[str]) -> str:
    """The rows as text of at most 80 columns, with a total and lines below it."""
    lines = [f"{'module':<{NAME_WIDTH}} {'state':<6} {'trainable':>13} {'parameters':>13} {'share':>7}"]
    for row in [*rows, Row("total", trainable, total)]:
        share = row.total / total if total else 0.0
        state = "" if row.name == "total" else row.state
        lines.append(
            f"{_shorten(row.name):<{NAME_WIDTH}} {state:<6} {row.trainable:>13,} {row.total:>13,} {share:>7.1%}"
        )
    lines.insert(-1, "-" * len(lines[0]))
    return "\n".join([*lines, *footer])


def _shorten(name: str) -> str:
    keep = NAME_WIDTH - 3
    return name if len(name) <= NAME_WIDTH else f"{name[: keep // 3]}...{name[-(keep - keep // 3) :]}"


def part_lines(parts: Mapping[str, Chosen]) -> list[str]:
    """What trains in part, and why: one line for all weights of which alike is said."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, chosen in parts.items():
        groups.setdefault((str(chosen.entries), chosen.reason), []).append(name)
    lines = []
    for (entries, reason), names in groups.items():
        shares = [share for name in names if (share := parts[name].share) is not None]
        held = f" ({sum(shares) / len(shares):.0%} of it)" if shares else ""
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"{_shorten(names[0])}{more}: {entries}{f', {reason}' if reason else ''}{held}")
    return lines

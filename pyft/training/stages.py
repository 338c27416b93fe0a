"""The stages of a run: what is frozen in each, for how many epochs."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from pyft.errors import ConfigError

StageKind = Literal["head", "full"]


@dataclass(frozen=True)
class Stage:
    """A part of the run with its own freezing, optimizer and learning-rate schedule.

    Attributes:
        name: unique in the run; goes into messages and metrics.csv.
        freeze: what stays frozen, as `pyft.freeze(model, freeze)` takes it; None freezes nothing.
        epochs: passes over the training samples, at least 1.
        lr_scale: factor on the learning rate.
        kind: "head" when only the head trains, else "full"; picks the learning rate where lr is "auto".
    """

    name: str
    freeze: Any = None
    epochs: int = 1
    lr_scale: float = 1.0
    kind: StageKind = "full"


def outside_head(head_name: str, freeze: Any = None) -> Callable[[str, nn.Parameter], bool]:
    """A predicate for `pyft.freeze`: true for each parameter outside the module `head_name`, or named by `freeze`.

    Args:
        head_name: dotted name of the head; "" where the model is the head.
        freeze: None, glob or name, list of those, predicate(name, parameter), or a plan with `.frozen` names.
            A depth (int) counts blocks in front of the head, so it names nothing inside it.
    """
    prefix = f"{head_name}." if head_name else ""
    patterns = [freeze] if isinstance(freeze, str) else list(freeze) if isinstance(freeze, (list, tuple, set)) else []
    names = frozenset(getattr(freeze, "frozen", ()))

    def frozen(name: str, parameter: nn.Parameter) -> bool:
        if not name.startswith(prefix) or name in names:
            return True
        if patterns:
            parts = name.split(".")
            owners = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
            return any(fnmatch.fnmatchcase(owner, pattern) for owner in owners for pattern in patterns)
        return bool(freeze(name, parameter)) if callable(freeze) else False

    return frozen


def make_stages(strategy: str | Sequence[Stage], epochs: int, head_name: str | None, freeze: Any = None) -> list[Stage]:
    """The stages of a strategy.

    Args:
        strategy: "head" (only the head trains), "full" (everything that `freeze` does not name),
            "gradual" (the head for max(1, epochs // 3) epochs, then "full" for the rest), or a list of Stage.
        epochs: passes over the data of the whole run. A list of stages brings its own.
        head_name: dotted name of the head module; needed by "head" and "gradual".
        freeze: what stays frozen in every stage made here (see `Stage.freeze`).

    Raises:
        ConfigError: unknown strategy, no head, no stage, two stages of one name, epochs < 1, lr_scale not positive.

    >>> [(stage.name, stage.epochs) for stage in make_stages("gradual", 5, "classifier")]
    [('head', 1), ('full', 4)]
    """
    if not isinstance(strategy, str):
        return _check_stages(list(strategy))
    if strategy not in ("head", "full", "gradual"):
        raise ConfigError(f"strategy must be 'head', 'full', 'gradual' or a list of Stage, not {strategy!r}")
    if strategy == "full":
        return _check_stages([Stage("full", freeze, epochs)])
    if head_name is None:
        raise ConfigError(f"strategy={strategy!r} needs a head: name it with head='...', or use strategy='full'")
    head_epochs = epochs if strategy == "head" else max(1, epochs // 3)
    # In a dict the last key wins: outside the head nothing trains, inside it what the dict says.
    frozen: Any = outside_head(head_name, freeze)
    frozen = {**freeze, frozen: True} if isinstance(freeze, Mapping) else frozen
    stages = [Stage("head", frozen, head_epochs, kind="head")]
    if epochs > head_epochs:
        stages.append(Stage("full", freeze, epochs - head_epochs))
    return _check_stages(stages)


def _check_stages(stages: list[Stage]) -> list[Stage]:
    if not stages:
        raise ConfigError("strategy has no stages: give at least one Stage")
    seen: set[str] = set()
    for stage in stages:
        if not isinstance(stage, Stage):
            raise ConfigError(f"strategy must be a name or a list of Stage; it holds {type(stage).__name__}")
        if stage.name in seen:
            raise ConfigError(f"two stages are named {stage.name!r}: give each its own name")
        seen.add(stage.name)
        if not isinstance(stage.epochs, int) or isinstance(stage.epochs, bool) or stage.epochs < 1:
            raise ConfigError(f"epochs of stage {stage.name!r} must be an integer >= 1, not {stage.epochs!r}")
        if not stage.lr_scale > 0:
            raise ConfigError(f"lr_scale of stage {stage.name!r} must be > 0, not {stage.lr_scale!r}")
        if stage.kind not in ("head", "full"):
            raise ConfigError(f"kind of stage {stage.name!r} must be 'head' or 'full', not {stage.kind!r}")
    return stages

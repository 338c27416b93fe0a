"""BatchNorm layers whose pretrained statistics a run would replace by those of its own, small batches."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyft.errors import ConfigError
from pyft.freezing.selection import select

FEW_SAMPLES = 10_000
"""Training samples up to which keeping the pretrained statistics is worth a try."""
MOST_GLOBS = 4


def pretrained_batch_norms(model: nn.Module) -> list[str]:
    """Names of the BatchNorm layers that have seen data: their running mean is not 0 everywhere."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and bool(module.running_mean.any())
    ]


def batch_norm_note(model: nn.Module, eval_modules: Collection[str], samples: int, batch_size: int) -> str | None:
    """One line on pretrained BatchNorm layers that will train on few samples, with what keeps them; None if there are
    none.

    Args:
        eval_modules: names of the modules that stay in eval mode (`FreezePlan.eval_modules`).
        samples: how many there are to train on.
    """
    kept = set(eval_modules)
    names = [name for name in pretrained_batch_norms(model) if name not in kept]
    if not names or samples > FEW_SAMPLES:
        return None
    globs = globs_of(model, names)
    how = f"freeze={(globs[0] if len(globs) == 1 else globs)!r}" if globs else "name them in freeze="
    return (
        f"{len(names)} pretrained BatchNorm layers will follow the statistics of batches of {batch_size}; with few "
        f"samples their own are often better: {how}"
    )


def globs_of(model: nn.Module, names: Collection[str]) -> list[str]:
    """A few globs that name exactly these modules' parameters; empty where there is no such short list.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    >>> globs_of(nn.ModuleDict({"conv": net[0], "bn1": net[1]}), ["bn1"])
    ['*bn1']
    """
    ends = []
    for name in names:
        parts = name.split(".")
        # The place in a Sequential says little without the name of that.
        ends.append(".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:]))
    globs = [f"*{end}" for end in dict.fromkeys(ends)]
    wanted = {f"{name}.{key}" for name in names for key, _ in model.get_submodule(name).named_parameters()}
    try:
        exact = len(globs) <= MOST_GLOBS and select(model, globs).parameters == wanted
    except ConfigError:
        return []
    return globs if exact else []

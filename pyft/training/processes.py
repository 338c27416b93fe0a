"""Whether this is one of several processes that train together."""

from __future__ import annotations

import os

import torch

from pyft.errors import ConfigError


def refuse_several_processes() -> None:
    """Refuse a run that each of several processes would train and write alike.

    Raises:
        ConfigError: torch.distributed has more than one process, or torchrun started more than one.
    """
    count, by = os.environ.get("WORLD_SIZE", "1"), "torchrun, WORLD_SIZE"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        count, by = str(torch.distributed.get_world_size()), "torch.distributed"
    if count.isdigit() and int(count) > 1:
        raise ConfigError(
            f"finetune runs in one process, but this is one of {count} ({by}): each would train the same model and "
            "write the same run. Start it with python instead of torchrun; to train in several processes use "
            "pyft.freeze and pyft.optim with DistributedDataParallel or fully_shard, as in docs/distributed.md"
        )

"""Parameters that fully_shard has spread over processes are refused by name: the core would read memory not theirs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import pyft


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adafactor"])
def test_sharded_parameters_are_refused(one_process: None, name: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(4, 3)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(TypeError, match="is a DTensor, as fully_shard makes them"):
        getattr(pyft.optim, name)(model.parameters(), lr=0.1)
    pyft.optim.AdamW(nn.Linear(4, 3).parameters(), lr=0.1)

"""One of two processes that train a model of which a part trains; a module by itself, for a spawned process to find."""

from __future__ import annotations

import os

import torch
from torch import nn

import pyft


def train_one(rank: int, folder: str) -> None:
    """DistributedDataParallel over `folder`, which gets the state_dict of each rank."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(os.path.join(folder, "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(rank)  # DDP sends the weights of rank 0
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    plan = pyft.freeze(model, {"0": [1, 5], "2": slice(0, 1)})
    reduced: list[int] = []
    ddp = nn.parallel.DistributedDataParallel(model)

    def hook(state, bucket):  # torch looks at annotations as objects
        reduced.append(bucket.buffer().numel())
        future = torch.distributed.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    ddp.register_comm_hook(None, hook)
    optimizer = torch.optim.AdamW([p for p in ddp.parameters() if p.requires_grad], lr=0.01)
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(rank))
    for _ in range(3):
        optimizer.zero_grad()
        ddp(x).square().mean().backward()
        optimizer.step()
    assert sum(reduced) == 3 * plan.num_trainable, reduced
    torch.save(model.state_dict(), os.path.join(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()

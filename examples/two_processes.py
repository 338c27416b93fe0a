"""Several processes, by DistributedDataParallel or fully_shard: a frozen layer, and AdamW with the norm of all.

pip install pyft scikit-learn && torchrun --nproc-per-node 2 examples/two_processes.py
With "shard" behind it, parameters and optimizer state are spread over the processes instead of copied.
`python examples/two_processes.py` runs the same in one.
"""

import sys

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import pyft


def main() -> None:
    on_gpu = torch.cuda.is_available()
    if distributed.is_torchelastic_launched():
        distributed.init_process_group("nccl" if on_gpu else "gloo")
    processes = distributed.get_world_size() if distributed.is_initialized() else 1
    rank = distributed.get_rank() if processes > 1 else 0
    device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    torch.manual_seed(0)  # the same model in every process
    pixels, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.3, random_state=0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)

    pyft.freeze(model, ["0"])  # before the model is wrapped: what is frozen is neither averaged nor updated
    run = model
    if processes > 1:
        run = fully_shard(model) if "shard" in sys.argv else nn.parallel.DistributedDataParallel(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = pyft.optim.AdamW(trained, lr=3e-3, clip_norm=1.0, on_nonfinite="skip")
    data = TensorDataset(x_train, y_train)
    sampler = DistributedSampler(data, processes, rank, seed=0)
    loader = DataLoader(data, batch_size=64 // processes, sampler=sampler)
    for epoch in range(15):
        sampler.set_epoch(epoch)
        for x_part, y_part in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(run(x_part.to(device)), y_part.to(device)).backward()
            optimizer.step()

    model.eval()
    accuracy = (run(x_test.to(device)).argmax(1).cpu() == y_test).float().mean()
    if rank == 0:
        print(f"{processes} processes, norm {optimizer.last_step.total_norm:.4f}, test accuracy {accuracy:.4f}")
    if processes > 1:
        # One that outlives its group can wait for ever: it joins threads of gloo that wait for Python's lock.
        del run
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()

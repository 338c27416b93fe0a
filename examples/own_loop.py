"""Your own training loop with parts of pyft: a freezing plan, and AdamW that clips inside its step.

The norm of each gradient is taken in backward, while it is in the cache; each step is made of two micro-batches.

pip install pyft scikit-learn && python examples/own_loop.py
"""

import torch
from sklearn.datasets import load_wine
from sklearn.model_selection import train_test_split
from torch import nn

import pyft


def main() -> None:
    torch.manual_seed(0)
    features, labels = load_wine(return_X_y=True)
    x = torch.tensor((features - features.mean(0)) / features.std(0), dtype=torch.float32)
    x_train, x_test, y_train, y_test = train_test_split(x, torch.tensor(labels), test_size=0.3, random_state=0)
    model = nn.Sequential(nn.Linear(13, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))

    plan = pyft.freeze(model, ["0", "1"])  # the first layer and its norm stay as they are
    print(plan)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norms = pyft.optim.norm_in_backward(trained, accumulate=2)
    optimizer = pyft.optim.AdamW(trained, lr=1e-2, clip_norm=1.0, on_nonfinite="skip", norm_in_backward=norms)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=5)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=60)
    scheduler = torch.optim.lr_scheduler.ChainedScheduler([warmup, cosine])
    for _ in range(60):
        model.train()  # the frozen norm stays in eval all the same
        optimizer.zero_grad()
        for x_part, y_part in zip(x_train.chunk(2), y_train.chunk(2), strict=True):
            loss = nn.functional.cross_entropy(model(x_part), y_part)
            (loss / 2).backward()
        optimizer.step()
        scheduler.step()
    plan.verify(model)  # raises if anything frozen has moved by a single bit
    print(optimizer.last_step)

    model.eval()
    accuracy = (model(x_test).argmax(1) == y_test).float().mean()
    print(f"loss {loss.item():.4f}, test accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()

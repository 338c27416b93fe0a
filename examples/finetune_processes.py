"""One call in two processes: finetune trains one model, each process on its half of every batch.

pip install pyft scikit-learn && torchrun --nproc-per-node 2 examples/finetune_processes.py
`python examples/finetune_processes.py` runs the same in one, with the same result up to rounding.
"""

import os

from sklearn.datasets import load_digits
from torch import nn

import pyft


def main() -> None:
    pixels, digits = load_digits(return_X_y=True)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    result = pyft.finetune(
        model,
        (pixels.astype("float32") / 16, digits),
        strategy="full",
        epochs=15,
        batch_size=64,  # of both processes together
        lr=3e-3,
        export=None,
    )
    # Every process gets the same result; one says it.
    if os.environ.get("RANK", "0") == "0":
        print(result)


if __name__ == "__main__":
    main()

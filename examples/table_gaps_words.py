"""A table with words and gaps, prices to predict: what pyft does with the columns, and prediction by their names.

pip install 'pyft[onnx]' && python examples/table_gaps_words.py
"""

import csv

import numpy as np
from torch import nn

import pyft

WORTH = {"city": 300, "cargo": 1500, "race": 2200, "": 600}


def write_bikes(path: str, count: int, seed: int) -> None:
    """Used bicycles: age in years, weight in kg, kind, price in euros; one age in ten is not known."""
    rng = np.random.default_rng(seed)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["age", "kind", "weight", "price"])
        for _ in range(count):
            kind, age = str(rng.choice(list(WORTH))), float(rng.uniform(0, 15))
            weight = 30 * rng.uniform() + (30 if kind == "cargo" else 8)
            price = 500 + WORTH[kind] * 0.93**age - 4 * weight + rng.normal(0, 30)
            known = "" if rng.random() < 0.1 else f"{age:.1f}"
            writer.writerow([known, kind, f"{weight:.1f}", f"{price:.2f}"])


def main() -> None:
    write_bikes("train.csv", 1500, seed=0)
    write_bikes("test.csv", 300, seed=1)
    # The width of the first layer is found from the data: numbers, and one feature for each word.
    model = nn.Sequential(nn.LazyLinear(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    data = {"train": "train.csv", "test": "test.csv"}
    result = pyft.finetune(
        model, data, label_column="price", strategy="full", epochs=30, lr=3e-3, patience=8, progress=False
    )
    print(result)
    print("\n".join(result.notes))
    bikes = {"kind": ["race", "city"], "weight": [9.0, 18.5], "age": [3.0, None]}
    print("euros:", [round(row["value"]) for row in result.predict(bikes)])


if __name__ == "__main__":
    main()

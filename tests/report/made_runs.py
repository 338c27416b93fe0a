"""Facts of runs as a folder would give them, made by hand: many classes, hostile names, every section filled."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyft.evaluation.calibration import CalibrationCounter
from pyft.evaluation.metrics import classification_metrics, multilabel_metrics, regression_metrics
from pyft.report.facts import RunFacts

HOSTILE = "<script>alert('pwned')</script>"
PNG = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAFklEQVR4nGP8z8DAwMDAxMDAwMDAAAANHQEDasKb6QAA"
    "AABJRU5ErkJggg=="
)


def classes_run(count: int = 77) -> RunFacts:
    """Texts of `count` classes; one name is hostile, one is from right to left, one very long."""
    generator = np.random.default_rng(0)
    names = [f"card_payment_number_{place}_not_recognised" for place in range(count)]
    names[:3] = [HOSTILE, "\u05de\u05d9\u05dc\u05d4 \u202e evil", "W" * 90]
    targets = generator.integers(0, count, 1500)
    logits = generator.normal(size=(1500, count)) * 1.5
    logits[np.arange(1500), targets] += 5
    metrics = classification_metrics(targets, logits, names).to_dict()
    counter = CalibrationCounter()
    counter.update(generator.random(1500), generator.random(1500) < 0.5)
    worst = [
        {"index": place, "loss": 9.0 - place, "true": names[place % count], "predicted": names[place % 3],
         "score": 0.9, "true_score": 0.01, "wrong": place != 5, "text": f"{HOSTILE} sample {place} " * 3, "cut": False}
        for place in range(20)
    ]  # fmt: skip
    worst[7].pop("text")
    worst[7].update(picture=PNG, path=f"/data/{HOSTILE}.png", size=[2, 2])
    held_out = {"role": "test", "num_samples": 1500, "worst": worst, "calibration": counter.calibration().to_dict()}
    facts = whole_run("text", "classification", metrics, held_out, names)
    facts.metrics["val"] = metrics
    facts.notes = [f"{HOSTILE}: 3 texts occur twice", "lr 0.01: chosen"]
    facts.parity["precision"] = [
        {"name": "fp32", "bytes": 90_900_000, "p50_ms": 3.2, "p95_ms": 4.0, "metric": 0.91, "drop": 0.0, "kept": False},
        {
            "name": "int8",
            "bytes": 23_100_000,
            "p50_ms": 1.9,
            "p95_ms": 2.4,
            "metric": 0.905,
            "drop": 0.005,
            "kept": True,
        },
    ]
    return facts


def values_run() -> RunFacts:
    """A regression on a table with a hostile column."""
    generator = np.random.default_rng(1)
    true = generator.normal(size=300) * 1e5
    predicted = true + generator.normal(size=300) * 3e4
    columns = [HOSTILE, "age", *(f"a_rather_long_column_name_{place}" for place in range(28))]
    worst = [
        {"index": place, "loss": 1.0, "true": float(true[place]), "predicted": float(predicted[place]), "wrong": True,
         "values": [float(v) for v in generator.normal(size=30)], "shape": [30], "columns": columns, "picture": None}
        for place in range(12)
    ]  # fmt: skip
    points = [[float(a), float(b)] for a, b in zip(true, predicted, strict=True)]
    held_out = {"role": "test", "num_samples": 900, "worst": worst, "points": points}
    return whole_run("array", "regression", regression_metrics(true, predicted).to_dict(), held_out, None)


def labels_run() -> RunFacts:
    """Several labels per sample, of sequences."""
    generator = np.random.default_rng(2)
    names = ["comedy", HOSTILE, "drama"]
    targets, logits = generator.integers(0, 2, (80, 3)), generator.normal(size=(80, 3))
    counter = CalibrationCounter(groups=3)
    for group in range(3):
        counter.update(1 / (1 + np.exp(-logits[:, group])), targets[:, group], group)
    worst = [
        {"index": place, "loss": 1.0, "true": "comedy", "predicted": "none", "score": 0.8, "wrong": True,
         "values": [float(v) for v in generator.normal(size=80)], "shape": [20, 4], "columns": None, "picture": None}
        for place in range(5)
    ]  # fmt: skip
    held_out = {"role": "test", "num_samples": 80, "worst": worst, "calibration": counter.calibration().to_dict(),
                "label_ece": [counter.calibration(group).ece for group in range(3)]}  # fmt: skip
    return whole_run("array", "multilabel", multilabel_metrics(targets, logits, names).to_dict(), held_out, names)


def whole_run(kind: str, problem: str, metrics: dict[str, Any], held_out: dict[str, Any], names: Any) -> RunFacts:
    """Every file that a run has."""
    main = {"classification": "macro_f1", "multilabel": "micro_f1", "regression": "rmse"}[problem]
    history = [
        {"stage": "head" if epoch <= 2 else "full", "epoch": float(epoch), "step": 10.0 * epoch, "lr": 0.01 / epoch,
         "train_loss": 2.0 / epoch, "val_loss": None if epoch == 3 else 2.2 / epoch, f"val_{main}": epoch / 6,
         "seconds": 1.5}
        for epoch in range(1, 6)
    ]  # fmt: skip
    return RunFacts(
        name=f"20260101-{kind}",
        config={
            "pyft": "0.1.0", "classes": names, "settings": {"lr": "auto", "clip": 1.0},
            "arguments": {"data": f"/data/{HOSTILE}/train.tsv", "strategy": "gradual", "seed": 0},
            "model": {"class": "TextClassifier", "source": "hf:name", "fingerprint": "a" * 64,
                      "head": {"name": "head", "new_shape": [77, 384], "replaced": True}},
            "data": {"kind": kind, "problem": problem, "fingerprint": "b" * 64, "num_train": 9000, "num_val": 1000,
                     "num_test": 1500, "columns": None},
            "repeat": {"python": f"pyft.finetune('hf:name', '/data/{HOSTILE}/train.tsv', strategy='gradual')",
                       "shell": "pyft train hf:name /data/train.tsv --strategy gradual " + "--long option " * 20},
        },
        environment={"pyft": "0.1.0", "python": "3.11", "torch": "2.13.0", "packages": {"numpy": "2.0"},
                     "processor": "a processor", "platform": "Linux", "cpu_count": 8, "threads": 4,
                     "started": "2026-01-01T10:00:00+0000", "commit": "c" * 40, "device": "cpu"},
        metrics={"metric": main, "best_epoch": 4, "test": metrics},
        held_out=held_out,
        parity={"passed": True, "num_samples": 1000, "max_abs": 1e-5, "mean_abs": 1e-6, "max_rel": 1e-6,
                "tolerance": 1e-4, "agreement": 1.0, "num_ties": 1, "ties": [{"index": 3, "torch": 1, "onnx": 2}],
                "worst_sample": {"index": 4, "output": 0, "torch": 1.0, "onnx": 1.00001, "difference": 1e-5},
                "batch_sizes": [1, 2, 7], "provider": "CPUExecutionProvider"},
        cost={
            "stages": [
                {"name": "head", "epochs": 2, "lr": 0.01, "num_trainable": 29_645, "num_total": 22_595_021,
                 "seconds": {"prepare": 1.0, "train": 2.0, "evaluate": 0.5}},
                {"name": "full", "epochs": 3, "lr": 4e-4, "num_trainable": 22_595_021, "num_total": 22_595_021,
                 "seconds": {"prepare": 0.0, "train": 99.0, "evaluate": 3.0}},
            ],
            "memory": {"before": 300_000_000, "peak": 2_100_000_000, "device_peak": 1_000_000_000},
            "predicted": {"seconds": 100.0, "stages": [
                {"name": "head", "seconds": 3.0, "saved": 1_000_000, "kept": True, "nbytes": 5_000_000},
                {"name": "full", "seconds": 97.0, "saved": 900_000_000, "kept": False, "nbytes": 0},
            ]},
        },
        timings={"load": 2.0, "features": 1.0, "train": 101.0, "validate": 3.5, "evaluate": 2.0, "predicted": 100.0},
        plan="module   state\nencoder  frozen",
        history=history,
        files=[("config.json", 2000), ("model.onnx", 91_000_000)],
    )  # fmt: skip

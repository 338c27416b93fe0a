"""What cannot train, what must not be resumed, and values that are not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training_run import Batches, copies, nan_loss, net, run, same, samples, scores
from torch import nn

from pyft.errors import CheckpointError, ConfigError, NonFiniteError
from pyft.training.checkpoint import load_checkpoint, save_checkpoint
from pyft.training.stages import Stage


def infinite_gradient(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Finite outputs; from the third batch on, sqrt(0) has an infinite slope."""
    logits = model(x)
    return logits + torch.sqrt((model[3].bias - model[3].bias).abs() * 1.0) if len(x) < 8 else logits


@pytest.mark.parametrize("settings", [{"clip": 1.0}, {"clip": None}, {"optimizer": "sgd"}])
@pytest.mark.parametrize(
    ("call", "what"),
    [(nan_loss, "the loss is nan; all parameters and gradients are finite"), (infinite_gradient, "'3.bias'")],
)
def test_nothing_is_written_once_a_value_is_not_finite(
    settings: dict[str, Any], call: Any, what: str, run_dir: Path
) -> None:
    model, reference = net(), net()
    batches = Batches(*samples(), 8)
    with pytest.raises(NonFiniteError) as caught:
        run(model, run_dir, epochs=2, lr=0.01, schedule="constant", call=call, batches=batches, **settings)
    message = str(caught.value)
    assert message.startswith("stage 'full', epoch 1, step 3: the ")
    assert what in message
    assert "lower lr (now 0.01)" in message
    assert str(run_dir / "last.pt") in message
    assert load_checkpoint(run_dir / "last.pt")["position"]["step"] == 0
    # The model stands where the two good steps left it.
    batches.batches.pop()
    batches.num_batches = 2
    run(reference, run_dir / "two", epochs=1, lr=0.01, schedule="constant", batches=batches, warmup=1, **settings)
    assert same(model, copies(reference))


def test_a_bad_parameter_is_named(run_dir: Path) -> None:
    model = net()
    with torch.no_grad():
        model[3].weight[1, 2] = float("inf")
    with pytest.raises(NonFiniteError, match=r"parameter '3\.weight'"):
        run(model, run_dir, epochs=1, lr=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainable": lambda stage: []}, "stage 'full' trains nothing"),
        ({"batches": Batches(torch.zeros(0, 5), torch.zeros(0).long(), 8)}, "no batches"),
        ({"patience": 1}, "patience needs validation"),
        ({"call": lambda model, x: model(x).detach()}, "loss depends on no parameter"),
        ({"trainable": lambda stage: list(net().named_parameters())}, "'0.weight' is not that parameter"),
        ({"evaluate": lambda: {"accuracy": 1.0, "loss": 0.5}}, "metric='score' .* accuracy, loss"),
    ],
)
def test_what_cannot_train_is_refused(options: dict[str, Any], message: str, run_dir: Path) -> None:
    if "batches" in options:
        options["batches"].batches, options["batches"].num_batches = [], 0
    model = net()
    before = copies(model)
    with pytest.raises(ConfigError, match=message):
        run(model, run_dir, epochs=1, lr=0.1, **options)
    if "evaluate" not in options:
        assert same(model, before)


def test_what_needs_a_gradient_must_be_what_trains(run_dir: Path) -> None:
    model = net()
    with pytest.raises(ConfigError, match=r"'3\.bias' requires a gradient but is not among trainable"):
        run(model, run_dir, lr=0.1, trainable=lambda stage: list(model.named_parameters())[:-1])
    model[3].bias.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"'3\.bias' has requires_grad=False"):
        run(model, run_dir, lr=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.2}, r"^lr is 0\.2 but was 0\.1"),
        ({"epochs": 3}, "^epochs is 3 but was 2"),
        ({"stages": [Stage("body", epochs=2)]}, "^stage 1 name is 'body' but was 'full'"),
        ({"stages": [Stage("full", epochs=2), Stage("b")]}, "^stage 2 name is 'b' but was 'nothing'"),
    ],
)
def test_another_configuration_is_refused(options: dict[str, Any], message: str, run_dir: Path) -> None:
    run(net(), run_dir, epochs=2, lr=0.1)
    with pytest.raises(ConfigError, match=message):
        run(net(), run_dir, **{"epochs": 2, "lr": 0.1, **options}, resume_from=run_dir / "last.pt")


def interrupted(run_dir: Path, **options: Any) -> None:
    """A run whose last checkpoint is in the middle of its first epoch."""
    with pytest.raises(NonFiniteError):
        run(net(), run_dir, epochs=2, lr=0.1, call=nan_loss, checkpoint_seconds=0.0, **options)
    assert load_checkpoint(run_dir / "last.pt")["position"]["batch"] == 2


def test_other_data_or_another_model_is_refused(run_dir: Path) -> None:
    interrupted(run_dir)
    resume = {"epochs": 2, "lr": 0.1, "resume_from": run_dir / "last.pt"}
    with pytest.raises(ConfigError, match=r"num_batches of stage 'full' .*\(4 now, 3 then\)"):
        run(net(), run_dir, batches=Batches(*samples(30), 8), **resume)
    model = net()
    model[0].requires_grad_(False)
    with pytest.raises(ConfigError, match=r"trainable of stage 'full' .*\(2 names now, 4 names then\)"):
        run(model, run_dir, trainable=lambda stage: list(model.named_parameters())[2:], **resume)
    with pytest.raises(CheckpointError, match=r"'0\.weight' has shape"):
        run(nn.Sequential(nn.Linear(4, 3)), run_dir, **resume)


def test_batches_before_the_checkpoint_are_not_asked_for_again(run_dir: Path) -> None:
    interrupted(run_dir)
    batches = Batches(*samples(), 8)
    history = run(net(), run_dir, epochs=2, lr=0.1, batches=batches, resume_from=run_dir / "last.pt")
    assert batches.asked == [(0, 2), (1, 0)]
    assert history.resumed_from_step == 2


def test_other_threads_are_told(run_dir: Path) -> None:
    interrupted(run_dir)
    content = load_checkpoint(run_dir / "last.pt")
    save_checkpoint(run_dir / "last.pt", {**content, "threads": 99})
    history = run(net(), run_dir, epochs=2, lr=0.1, resume_from=run_dir / "last.pt")
    assert f"resumed with threads {torch.get_num_threads()}, begun with 99: the last bits may differ" in history.notes


def test_best_weights_that_are_gone_are_missed(run_dir: Path) -> None:
    history = run(net(), run_dir, epochs=1, lr=0.1, evaluate=scores(0.5))
    history.best_path.unlink()
    with pytest.raises(CheckpointError, match=r"best\.safetensors is missing"):
        run(net(), run_dir, epochs=1, lr=0.1, evaluate=scores(0.5), resume_from=run_dir / "last.pt")

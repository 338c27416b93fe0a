"""Single steps, against loops written out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training_run import Batches, copies, nan_loss, net, run, same, samples
from torch import nn
from torch.nn import functional as F

from pyft.errors import ConfigError, NonFiniteError
from pyft.training.checkpoint import load_weights
from pyft.training.objectives import class_weights, make_loss
from pyft.training.optimizers import parameter_groups
from pyft.training.stages import Stage
from pyft.training.steps import Stepper


@pytest.mark.parametrize("clip", [0.3, None])
def test_adamw_like_a_loop_written_out(clip: float | None, run_dir: Path) -> None:
    model, reference = net(), net()
    groups = [
        {"params": [p for p in reference.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in reference.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    x, y = samples()
    total, step = 4 * 3, 0
    losses = []
    for _ in range(4):
        summed = 0.0
        for part in torch.arange(len(x)).split(8):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * 0.5 * (1 + math.cos(math.pi * step / total))
            optimizer.zero_grad()
            loss = F.cross_entropy(reference(x[part]), y[part])
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(reference.parameters(), clip)
            optimizer.step()
            summed += float(loss.detach()) * len(part)
            step += 1
        losses.append(summed / len(x))
    history = run(model, run_dir, epochs=4, lr=0.01, clip=clip, warmup=0, weight_decay=0.1)
    for mine, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=2e-5, atol=1e-7)
    assert [row["train_loss"] for row in history.rows] == pytest.approx(losses, rel=1e-6)
    assert [row["step"] for row in history.rows] == [3, 6, 9, 12]
    assert not same(model, copies(net()))


@pytest.mark.parametrize("weighted", [False, True])
def test_accumulation_is_one_large_batch(weighted: bool, run_dir: Path) -> None:
    """The last batch of the group is smaller, and class weights make the divisors differ besides."""
    x, y = samples()
    weights = class_weights([0.1, 1.0, 5.0] if weighted else None, y, "classification", 3)
    settings = {"epochs": 1, "lr": 1.0, "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "clip": None}
    settings |= {"schedule": "constant", "warmup": 0}
    objective = make_loss("classification", "cross_entropy", weights)
    small, large = net(), net()
    one = run(small, run_dir / "a", accumulate=3, objective=objective, **settings)
    two = run(large, run_dir / "b", batches=Batches(x, y, 19), objective=objective, **settings)
    exact = net().double()
    double = None if weights is None else weights.double()
    F.cross_entropy(exact(x.double()), y, double).backward()
    for mine, wanted, parameter in zip(small.parameters(), large.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=2e-7)
        torch.testing.assert_close(mine.double(), parameter - parameter.grad, rtol=1e-6, atol=2e-7)
    assert one.rows[0]["step"] == two.rows[0]["step"] == 1
    assert one.rows[0]["train_loss"] == pytest.approx(two.rows[0]["train_loss"], rel=1e-6)
    # The plain mean of the three means is another gradient: the test above can fail.
    naive = net()
    torch.stack([objective(naive(part.inputs), part.targets) for part in Batches(x, y, 8).batches]).mean().backward()
    gaps = [(p - p.grad - q).abs().max() for p, q in zip(naive.parameters(), small.parameters(), strict=True)]
    assert max(gaps) > 1e-4


def test_a_group_does_not_cross_the_end_of_an_epoch(run_dir: Path) -> None:
    assert [row["step"] for row in run(net(), run_dir, epochs=3, lr=0.1, accumulate=2).rows] == [2, 4, 6]


def test_the_schedule_counts_optimizer_steps(run_dir: Path) -> None:
    history = run(net(), run_dir, epochs=4, lr=1.0, accumulate=2, warmup=0)
    assert history.rows[-1]["lr"] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))


def test_draws_outside_the_steps_depend_on_the_seed_only(run_dir: Path) -> None:
    seen: list[list[float]] = []
    for before in (1, 2):
        draws: list[float] = []
        model = net()

        def trainable(stage: Stage, draws: list[float] = draws, model: nn.Module = model) -> Any:
            draws.append(float(torch.rand(())))
            return list(model.named_parameters())

        def evaluate(draws: list[float] = draws) -> dict[str, float]:
            draws.append(float(torch.rand(())))
            return {"score": 0.0}

        torch.manual_seed(before)
        run(model, run_dir / str(before), epochs=2, lr=0.1, trainable=trainable, evaluate=evaluate)
        seen.append(draws)
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 3


def test_dropout_depends_on_the_seed_and_the_step_only(run_dir: Path) -> None:
    weights = []
    for number, (seed, before) in enumerate([(0, 1), (0, 2), (1, 1)]):
        model = net(dropout=0.5)
        torch.manual_seed(before)
        run(model, run_dir / str(number), epochs=2, lr=0.1, seed=seed)
        weights.append(copies(model))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["0.weight"], weights[2]["0.weight"])


def test_the_masks_of_two_steps_differ(run_dir: Path) -> None:
    seen = []

    def call(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.rand(4))
        return model(x)

    run(net(), run_dir, epochs=2, lr=0.1, call=call)
    assert len({tuple(draw.tolist()) for draw in seen}) == 6


@pytest.mark.parametrize("fails", [False, True])
def test_the_random_state_of_the_caller_is_left_alone(fails: bool, run_dir: Path) -> None:
    before = torch.get_rng_state()
    if fails:
        with pytest.raises(ConfigError):
            run(net(dropout=0.5), run_dir, epochs=1, lr=0.1, evaluate=lambda: {"other": 1.0})
    else:
        run(net(dropout=0.5), run_dir, epochs=1, lr=0.1, evaluate=lambda: {"score": float(torch.rand(()))})
    assert torch.equal(torch.get_rng_state(), before)


def test_bf16_computes_in_bf16_and_keeps_weights_and_loss_in_fp32(run_dir: Path) -> None:
    dtypes = set()

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        dtypes.add(logits.dtype)
        return F.cross_entropy(logits, targets)

    def call(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        logits = model(x)
        dtypes.add(("model", logits.dtype))
        return logits

    objective = make_loss("classification", loss)
    model, wide = net(), net()
    history = run(model, run_dir / "a", epochs=2, lr=0.01, precision="bf16", call=call, objective=objective)
    run(wide, run_dir / "b", epochs=2, lr=0.01)
    assert dtypes == {("model", torch.bfloat16), torch.float32}
    assert history.stages[0]["precision"] == "bf16"
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert not same(model, copies(wide))
    for mine, wanted in zip(model.parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0.1, atol=0.01)


def test_precision_auto_is_decided_once_told_and_traceless(run_dir: Path) -> None:
    model, plain = net(dropout=0.5), net(dropout=0.5)
    history = run(model, run_dir / "a", epochs=1, lr=0.01, precision="auto")
    chosen = history.stages[0]["precision"]
    assert chosen in ("fp32", "bf16")
    assert any(note.startswith(f"stage 'full': {chosen}") for note in history.notes)
    run(plain, run_dir / "b", epochs=1, lr=0.01, precision=chosen)
    assert same(model, copies(plain))


def test_weight_decay_is_for_matrices_only() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Conv1d(2, 2, 1))
    decayed, plain = parameter_groups(list(model.named_parameters()), 0.1)
    assert decayed == {"params": [model[0].weight, model[2].weight], "weight_decay": 0.1}
    assert plain["weight_decay"] == 0.0
    assert len(plain["params"]) == 4
    assert [group["weight_decay"] for group in parameter_groups([("b", model[0].bias)], 0.1)] == [0.0]


def test_a_batch_of_no_weight_is_passed_over(run_dir: Path) -> None:
    """Its mean would be 0 / 0."""
    x, y = samples(16)
    y[8:] = 0
    y[:8] = y[:8].clamp(min=1)
    objective = make_loss("classification", "cross_entropy", torch.tensor([0.0, 1.0, 2.0]))
    model, reference = net(), net()
    both = run(model, run_dir / "a", epochs=1, lr=0.1, accumulate=2, batches=Batches(x, y, 8), objective=objective)
    batches = Batches(x[:8], y[:8], 8)
    first = run(reference, run_dir / "b", epochs=1, lr=0.1, accumulate=2, batches=batches, objective=objective)
    assert same(model, copies(reference))
    assert both.rows[0]["train_loss"] == first.rows[0]["train_loss"]


@pytest.mark.parametrize("call", [None, nan_loss])
def test_losses_added_up_on_a_device_are_the_same(call: Any, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of devices that must not be waited for, taken on the CPU."""
    wanted = run(net(), run_dir / "a", epochs=2, lr=0.1)
    begin = Stepper.begin_epoch

    def begin_on_device(stepper: Stepper, key: int) -> None:
        stepper._on_cpu = False
        begin(stepper, key)

    monkeypatch.setattr(Stepper, "begin_epoch", begin_on_device)
    if call is not None:
        with pytest.raises(NonFiniteError, match="step 3"):
            run(net(), run_dir / "b", epochs=2, lr=0.1, call=call)
        return
    got = run(net(), run_dir / "b", epochs=2, lr=0.1, checkpoint_seconds=0.0)
    assert [row["train_loss"] for row in got.rows] == [row["train_loss"] for row in wanted.rows]


def test_an_epoch_must_have_the_batches_it_promised(run_dir: Path) -> None:
    batches = Batches(*samples(), 8)
    batches.num_batches = 2
    with pytest.raises(ConfigError, match="an epoch gave 3 batches, but num_batches is 2"):
        run(net(), run_dir, epochs=1, lr=0.1, batches=batches)


def test_tied_weights_are_kept_once(run_dir: Path) -> None:
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3))
        model[1].weight = model[0].weight
        return model

    model, other = tied(), tied()
    history = run(model, run_dir, epochs=1, lr=0.1)
    assert "1.weight" not in load_weights(history.best_path, other)
    assert same(other, copies(model))
    assert other[1].weight is other[0].weight

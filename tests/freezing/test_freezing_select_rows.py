"""Which rows are chosen, by what, and that measuring leaves no trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyft
from pyft.errors import ConfigError
from pyft.freezing.plan import make_plan


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def batches(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(6, 5), torch.randint(3, (6,))) for _ in range(count)]


def rows_of(model: nn.Module, rows: pyft.Rows, **keywords: Any) -> list[int]:
    plan = make_plan(model, {"0.weight": rows}, batches=batches(), loss=F.cross_entropy, **keywords)
    return plan.parts["0.weight"].entries.rows.tolist()


def dense_gradients(model: nn.Module) -> list[torch.Tensor]:
    model = copy.deepcopy(model).eval()
    found = []
    for x, y in batches():
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        found.append(model[0].weight.grad.double().clone())
    return found


def best(score: torch.Tensor, count: int) -> list[int]:
    """By sorting pairs, the earlier of two equal ones first."""
    return sorted(i for _, i in sorted((-value, i) for i, value in enumerate(score.tolist()))[:count])


def test_policies_against_their_definitions() -> None:
    model = net()
    gradients = dense_gradients(model)
    assert rows_of(model, pyft.Rows(count=3)) == best(torch.stack(gradients).sum(0).norm(dim=1), 3)
    fisher = torch.stack(gradients).square().mean(0).sum(1)
    assert rows_of(model, pyft.Rows(count=3, by="fisher")) == best(fisher, 3)
    assert rows_of(model, pyft.Rows(count=3, by="magnitude")) == best(model[0].weight.norm(dim=1), 3)
    drawn = [rows_of(model, pyft.Rows(count=3, by="random", seed=seed)) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1]
    assert len({tuple(rows) for rows in drawn}) > 1
    share = make_plan(model, {"0.weight": pyft.Rows(count=8)}, batches=batches(), loss=F.cross_entropy)
    assert share.parts["0.weight"].share == pytest.approx(1.0)


def test_equal_rows_go_by_their_number() -> None:
    model = net()
    nn.init.ones_(model[0].weight)
    assert rows_of(model, pyft.Rows(count=3, by="magnitude")) == [0, 1, 2]


@pytest.mark.parametrize(("wanted", "count"), [((0.1, None), 1), ((0.25, None), 2), ((1.0, None), 8), ((None, 99), 8)])
def test_how_many(wanted: tuple[Any, Any], count: int) -> None:
    assert len(rows_of(net(), pyft.Rows(*wanted, by="magnitude"))) == count


@pytest.mark.parametrize("partly", [False, True])
def test_measuring_leaves_no_trace(partly: bool) -> None:
    model = net()
    if partly:
        pyft.freeze(model, {"0.weight": [1, 2], "4": True})
        F.cross_entropy(model(batches()[0][0]), batches()[0][1]).backward()
    before = copy.deepcopy(model.state_dict())
    flags = [(type(m), m.training) for m in model.modules()]
    grads = [(p.requires_grad, p.grad) for p in model.parameters()]
    state = torch.get_rng_state()
    seen = [copy.deepcopy(model.state_dict()), batches()]
    assert seen
    torch.set_rng_state(state)
    data = batches()
    state = torch.get_rng_state()
    plan = make_plan(model, {"*": pyft.Rows(0.5)}, batches=data, loss=F.cross_entropy)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [(type(m), m.training) for m in model.modules()] == flags
    assert all(
        p.requires_grad == flag and p.grad is grad for p, (flag, grad) in zip(model.parameters(), grads, strict=True)
    )
    assert len(plan.parts) == 6
    if partly:
        model[4].train()
        assert make_plan(model, {"0.weight": pyft.Rows(count=3)}, batches=data, loss=F.cross_entropy).parts[
            "0.weight"
        ].entries.rows.tolist() == rows_of(net(), pyft.Rows(count=3))


def test_a_model_that_gives_its_loss() -> None:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
            return type("Output", (), {"loss": F.cross_entropy(self.net(x), labels)})

    given = [{"x": x, "labels": y} for x, y in batches()]
    plan = pyft.freeze(WithLoss(), {"net.0.weight": pyft.Rows(count=3)}, only=True, batches=given)
    assert plan.parts["net.0.weight"].entries.rows.tolist() == rows_of(net(), pyft.Rows(count=3))
    assert plan.num_trainable == 15


@pytest.mark.parametrize(
    ("what", "keywords", "message"),
    [
        ({"0.weight": pyft.Rows(0.5)}, {}, r"rows of '0.weight' are to be chosen by gradient: give batches= and loss="),
        ({"0.weight": pyft.Rows(0.5)}, {"batches": []}, "gave no batch"),
        ({"0.weight": pyft.Rows(0.5)}, {"batches": batches()}, "loss= is missing"),
        ({"0.weight": pyft.Rows(0.5)}, {"batches": batches(), "loss": lambda o, t: o}, r"a tensor \(6, 3\)"),
        ({"0.weight": pyft.Rows(0.5)}, {"batches": [3], "loss": F.cross_entropy}, "holds int"),
        ({"0.weight": 0.5}, {}, r"'0.weight' has the value 0.5: pyft.Rows"),
        ({"0.weight": 3}, {}, r"'0.weight' has the value 3"),
        ({"0.weight": None}, {}, "has the value None"),
        ({"0.weight": {"row": [1]}}, {}, "holds 'row'"),
        ({"0.wieght": [1]}, {}, "nearest names: '0.weight'"),
        ({7: [1]}, {}, "the key 7"),
        ({"0.weight": [9]}, {}, "rows= holds 9, but there are 8 rows"),
        ({"0.weight": [1, 1]}, {}, "holds 1 twice"),
        ({"0.weight": []}, {}, "names none of the 8 rows"),
        ({"0.weight": torch.zeros(7, dtype=torch.bool)}, {}, "a mask of 7, but there are 8"),
        ({"0.weight": [0.5]}, {}, "whole numbers, are expected"),
        ({"0.bias": {"columns": [1]}}, {}, "has one dimension"),
        ({"0.weight": {"blocks": [(0, 0)], "block_size": (3, 5)}}, {}, "does not divide"),
    ],
)
def test_what_cannot_be_done(what: Any, keywords: dict[str, Any], message: str) -> None:
    model = net()
    with pytest.raises(ConfigError, match=message):
        pyft.freeze(model, what, **keywords)
    assert all(p.requires_grad for p in model.parameters())
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    "wrong",
    [{}, {"fraction": 0.1, "count": 1}, {"fraction": 0.0}, {"fraction": 1.5}, {"fraction": float("nan")}, {"count": 0},
     {"count": 1.5}, {"fraction": 0.1, "by": "size"}, {"fraction": 0.1, "seed": "a"}],
)  # fmt: skip
def test_rows_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Rows: "):
        pyft.Rows(**wrong)


def test_layers_of_other_kinds_are_refused_by_name() -> None:
    class Mine(nn.Linear):
        pass

    cases: list[tuple[nn.Module, str, str]] = [
        (nn.Sequential(Mine(2, 2)), "0.weight", "belongs to a Mine"),
        (nn.Sequential(nn.MultiheadAttention(4, 2)), "0.in_proj_weight", "belongs to a MultiheadAttention"),
        (nn.Sequential(nn.Embedding(4, 2, sparse=True)), "0.weight", "sparse=True"),
        (nn.Sequential(nn.Embedding(4, 2, max_norm=1.0)), "0.weight", "max_norm"),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))), "0.bias", "ParametrizedLinear"),
    ]
    for model, name, message in cases:
        with pytest.raises(ConfigError, match=f"'{name}' cannot train in part: .*{message}"):
            pyft.freeze(model, {name: [1]})
    with pytest.raises(ConfigError, match="a weight alone does not know its layer"):
        pyft.train_only(nn.Linear(2, 2).weight, rows=[0])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'model' is a Sequential"):
        pyft.train_only(nn.Sequential(nn.Linear(2, 2)), rows=[0])
    with pytest.raises(ConfigError, match="say which part"):
        pyft.train_only(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="blocks need a convolution with groups=1"):
        pyft.train_only(nn.Conv2d(4, 4, 1, groups=2), blocks=[(0, 0)], block_size=(2, 2))


def test_train_only_adds_up_freeze_takes_over_and_release_undoes() -> None:
    model = net()
    model[4].bias.requires_grad_(False)
    pyft.train_only(model, "0.weight", rows=[1])
    plan = pyft.train_only(model, model[4].weight, columns=[0, 7])
    assert sorted(plan.parts) == ["0.weight", "4.weight"]
    part = model[0].weight_part
    plan = plan.extend(model, "1")
    assert model[0].weight_part is part
    assert not model.train()[1].training
    plan = plan.thaw(model, "0.weight")
    assert type(model[0]) is nn.Linear
    assert model[0].weight.requires_grad
    pyft.train_only(model[0], rows=[2])  # as a layer of its own
    plan = pyft.freeze(model, "1")
    assert plan.trainable == ["0.weight", "0.bias", "4.weight"]
    plan.release(model)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["4.bias"]
    assert all(type(m).__module__.startswith("torch.") for m in model)


def test_a_plan_says_what_and_why_and_fits_another_copy() -> None:
    plan = pyft.freeze(
        net(), {"0.weight": pyft.Rows(0.25), "4.weight": {"rows": [1], "columns": slice(4)}}, only=True,
        batches=batches(), loss=F.cross_entropy,
    )  # fmt: skip
    text = str(plan)
    assert "0.weight: 2 of 8 rows, largest gradient over 3 batches (" in text
    assert "4.weight: 1 of 3 rows x 4 of 8 columns" in text
    assert plan.num_trainable == 14
    assert "14" in text.splitlines()[-5] or "14" in text
    other = net()
    pyft.freeze(other, plan)
    assert [tuple(p.shape) for p in other.parameters() if p.requires_grad] == [(2, 5), (1, 4)]
    with pytest.raises(ConfigError, match="another model"):
        pyft.freeze(nn.Sequential(nn.Linear(2, 2)), plan)

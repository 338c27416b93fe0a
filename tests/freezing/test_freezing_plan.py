"""What a plan freezes, what it says, and that it can be changed and undone."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from pyft.errors import ConfigError
from pyft.freezing.plan import FreezePlan, freeze, make_plan, unwrap
from pyft.freezing.selection import blocks_of


class Net(nn.Module):
    """An encoder of three blocks with everything that freezing has to think of, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5)) for _ in range(3)
        )
        self.norm = nn.LayerNorm(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.drop(self.norm(x)))


BACKBONE = [name for name, _ in Net().named_parameters() if not name.startswith("head.")]
HEAD = ["head.weight", "head.bias"]
BLOCK = [".0.weight", ".0.bias", ".1.weight", ".1.bias"]


def trains(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    ("what", "frozen"),
    [
        ("blocks*", [f"blocks.{i}{end}" for i in range(3) for end in BLOCK]),
        ("blocks.1", [f"blocks.1{end}" for end in BLOCK]),
        ("*.bias", [name for name, _ in Net().named_parameters() if name.endswith(".bias")]),
        ("head.weight", ["head.weight"]),
        (["embed", "norm.*"], ["embed.weight", "embed.bias", "norm.weight", "norm.bias"]),
        (("head",), HEAD),
        (0, []),
        (1, ["embed.weight", "embed.bias"] + [f"blocks.0{end}" for end in BLOCK]),
        (3, ["embed.weight", "embed.bias"] + [f"blocks.{i}{end}" for i in range(3) for end in BLOCK]),
        (-1, ["embed.weight", "embed.bias"] + [f"blocks.{i}{end}" for i in range(2) for end in BLOCK]),
        (-3, ["embed.weight", "embed.bias"]),
        (lambda name, parameter: parameter.ndim == 2, [n for n, p in Net().named_parameters() if p.ndim == 2]),
        (None, []),
        ([], []),
        ("*", BACKBONE + HEAD),
    ],
)
def test_what_is_frozen(what: object, frozen: list[str]) -> None:
    model = Net()
    plan = freeze(model, what)  # type: ignore[arg-type]
    assert plan.frozen == frozen
    assert plan.trainable == [name for name, _ in model.named_parameters() if name not in frozen]
    assert trains(model) == plan.trainable
    assert plan.num_total == sum(p.numel() for p in model.parameters())
    assert plan.num_trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.share == pytest.approx(plan.num_trainable / plan.num_total)


def test_only_names_what_trains() -> None:
    model = Net()
    model.head.weight.requires_grad_(False)
    plan = freeze(model, "head", only=True)
    assert plan.trainable == HEAD == trains(model)
    assert plan.frozen == BACKBONE


def test_a_plan_is_what_another_model_may_be_frozen_by() -> None:
    plan = make_plan(Net(), ["embed", "blocks.0"])
    model = Net()
    assert freeze(model, plan).frozen == plan.frozen
    assert trains(model) == plan.trainable
    with pytest.raises(ConfigError, match="the plan was made for another model"):
        freeze(nn.Linear(2, 2), plan)
    with pytest.raises(ConfigError, match="the plan was made for another model"):
        plan.apply(nn.Sequential(nn.Linear(2, 2)))


def test_making_a_plan_changes_nothing() -> None:
    model = Net()
    make_plan(model, "*")
    assert trains(model) == BACKBONE + HEAD
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("block", r"matches no parameter or module; nearest names: 'blocks'"),
        (["embed", "hed*"], r"freeze='hed\*'.*'head'"),
        (4, r"the model has 3 blocks \(blocks.0 to blocks.2\)"),
        (-4, "the model has 3 blocks"),
        (True, "freeze=True"),
        ([3], "int came"),
        (2.5, "float came"),
        (nn.Linear(1, 1), "Linear came"),
    ],
)
def test_what_cannot_be_frozen(what: object, message: str) -> None:
    model = Net()
    with pytest.raises(ConfigError, match=message):
        freeze(model, what)  # type: ignore[arg-type]
    assert trains(model) == BACKBONE + HEAD


def test_a_depth_needs_blocks() -> None:
    with pytest.raises(ConfigError, match="ModuleList or Sequential"):
        freeze(nn.LSTM(3, 3), 1)


def test_blocks_of_several_kinds() -> None:
    class ResNetLike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3)
            self.layer1 = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)))
            self.layer2 = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
            self.fc = nn.Linear(4, 2)

    assert blocks_of(ResNetLike()) == ["layer1.0", "layer1.1", "layer2.0", "layer2.2"]
    assert freeze(ResNetLike(), 3).trainable == ["layer2.2.weight", "layer2.2.bias", "fc.weight", "fc.bias"]
    assert blocks_of(Net()) == ["blocks.0", "blocks.1", "blocks.2"]


def test_freezing_again_takes_the_place_of_the_first() -> None:
    model = Net()
    freeze(model, "blocks*")
    assert not model.train().blocks[0].training
    plan = freeze(model, "embed")
    assert plan.frozen == ["embed.weight", "embed.bias"]
    assert trains(model) == plan.trainable
    assert all(module.training for name, module in model.named_modules() if name != "embed")
    assert freeze(model, "embed").frozen == plan.frozen


def test_what_the_user_froze_stays_frozen_and_comes_back_so() -> None:
    model = Net()
    model.embed.weight.requires_grad_(False)
    for _ in range(2):
        assert freeze(model, "blocks.0").frozen[0] == "embed.weight"
    plan = freeze(model, None)
    assert plan.frozen == ["embed.weight"]
    freeze(model, "*").release(model)
    assert trains(model) == [name for name in BACKBONE + HEAD if name != "embed.weight"]


def test_release_undoes_everything() -> None:
    model = Net()
    keys = {name: set(vars(module)) for name, module in model.named_modules()}
    plan = freeze(model, "*")
    model.eval()
    model.train()
    assert not any(module.training for module in model.modules())
    plan.release(model)
    assert trains(model) == BACKBONE + HEAD
    assert all(module.training for module in model.modules())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == keys
    plan = freeze(model, "*")
    model.train()
    model.eval()
    plan.release(model)
    assert not any(module.training for module in model.modules())


def test_extend_and_thaw() -> None:
    model = Net()
    plan = freeze(model, ["embed", "blocks.0"])
    more = plan.extend(model, "blocks.1")
    assert trains(model) == more.trainable
    assert set(more.frozen) == set(plan.frozen) | {f"blocks.1{end}" for end in BLOCK}
    less = more.thaw(model, "blocks*")
    assert less.frozen == ["embed.weight", "embed.bias"]
    assert trains(model) == less.trainable
    assert all(module.training for module in model.train().blocks.modules())
    less.verify(model)


def test_gradients_of_frozen_parameters_are_dropped() -> None:
    model = Net()
    model(torch.rand(4, 6)).sum().backward()
    freeze(model, "blocks*")
    assert all((p.grad is None) == name.startswith("blocks") for name, p in model.named_parameters())


def test_parts_that_cannot_train_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].codes = nn.Parameter(torch.arange(4), requires_grad=False)
    plan = freeze(model, "0", only=True)
    assert plan.frozen == ["1.weight", "1.bias", "1.codes"]
    assert freeze(model, None).frozen == ["1.codes"]
    plan.thaw(model, "1")
    assert not model[1].codes.requires_grad


def test_lazy_parameters_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'0\.weight' has no values yet"):
        freeze(nn.Sequential(nn.LazyLinear(3)), "0")


def test_wrapped_models() -> None:
    model = Net()
    wrapped = nn.DataParallel(model)
    plan = freeze(wrapped, "blocks*")
    assert unwrap(wrapped) is model
    assert plan.frozen[0] == "blocks.0.0.weight"
    plan.verify(wrapped)
    compiled = torch.compile(Net(), backend="eager")
    assert freeze(compiled, "head").frozen == HEAD


def test_parametrized_weights_are_known_by_their_plain_name() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 2))
    assert freeze(model, "0.weight").frozen == [
        "0.parametrizations.weight.original0",
        "0.parametrizations.weight.original1",
    ]


def test_one_tensor_frozen_and_trained_is_refused_with_both_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 4)
            self.decoder = nn.Linear(4, 7, bias=False)
            self.decoder.weight = self.embedding.weight

    model = Tied()
    with pytest.raises(ConfigError, match=r"'embedding\.weight' \(to freeze\) and 'decoder\.weight' \(to train\)"):
        freeze(model, "embedding")
    assert trains(model) == ["embedding.weight"]
    plan = freeze(model, ["embedding", "decoder"])
    assert (plan.frozen, plan.num_total, plan.num_trainable) == (["embedding.weight"], 28, 0)
    plan.verify(model)

    shared = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    shared[1].weight = nn.Parameter(shared[0].weight.data)  # two parameters, one memory
    with pytest.raises(ConfigError, match=r"'0\.weight' \(to freeze\) and '1\.weight' \(to train\)"):
        freeze(shared, "0")


def test_the_table() -> None:
    model = Net()
    text = str(freeze(model, 2))
    lines = text.splitlines()
    assert max(len(line) for line in lines) <= 80
    assert [line.split()[:4] for line in lines[1:6]] == [
        ["embed", "frozen", "0", "56"],
        ["blocks.0..1", "frozen", "0", "176"],
        ["blocks.2", "trains", "88", "88"],
        ["norm", "trains", "16", "16"],
        ["head", "trains", "27", "27"],
    ]
    assert lines[7].split() == ["total", "131", "363", "100.0%"]
    assert lines[8] == "36.09% of the parameters train; 11 modules stay in eval mode"
    assert repr(freeze(model, "head")) == "FreezePlan(16 train, 2 frozen, share 0.9256)"


def test_the_table_of_a_deep_model_stays_short() -> None:
    model = nn.Sequential(*(nn.Sequential(*(nn.Sequential(nn.Linear(2, i + 1)) for i in range(9))) for _ in range(9)))
    for what in ("*.bias", "*.3.0.weight", ["1.2.*", "4.*"], lambda name, _: sum(map(ord, name)) % 2 == 0, None, "*"):
        plan = freeze(model, what)
        lines = str(plan).splitlines()
        assert len(lines) <= 20
        assert max(len(line) for line in lines) <= 80
        counts = [(row.trainable, row.total) for row in plan.rows]
        assert tuple(map(sum, zip(*counts, strict=True))) == (plan.num_trainable, plan.num_total)


def test_a_model_without_parameters() -> None:
    plan = freeze(nn.Sequential(nn.ReLU()), None)
    assert (plan.share, plan.frozen, plan.trainable) == (0.0, [], [])
    assert "total" in str(plan)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_is_frozen_like_its_original(way: str) -> None:
    model = Net()
    plan = freeze(model, "blocks*")
    if way == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert trains(other) == plan.trainable
    other.train()
    assert not any(module.training for module in other.blocks.modules())
    assert other.norm.training
    plan.verify(other)
    freeze(other, None)
    assert all(module.training for module in other.modules())
    assert not any(module.training for module in model.blocks.modules())
    assert trains(model) == plan.trainable
    assert isinstance(freeze(other, plan), FreezePlan)

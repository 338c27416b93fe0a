"""The head trained on cached features is the head trained in the model."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyft.errors import ConfigError
from pyft.freezing.plan import freeze
from pyft.freezing.prefix import cut_reason, head_inputs, head_tail


class Net(nn.Module):
    """A backbone, dropout and a head; `between` and `after` may stand around the head."""

    def __init__(
        self,
        between: Callable[[torch.Tensor], torch.Tensor] | None = None,
        after: Callable[[torch.Tensor], torch.Tensor] | None = None,
        p: float = 0.0,
        inplace: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
        self.dropout = nn.Dropout(p, inplace=inplace)
        self.head = nn.Linear(8, 3)
        self.between, self.after = between, after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.backbone(x))
        x = self.head(x if self.between is None else self.between(x))
        return x if self.after is None else self.after(x)


X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def frozen(model: nn.Module, head: str = "head") -> nn.Module:
    freeze(model, head, only=True)
    return model.train()


def test_features_and_head_give_the_model() -> None:
    model = frozen(Net())
    assert cut_reason(model, "head", X) is None
    features = head_inputs(model, "head", X)
    assert not features.is_inference()
    assert torch.equal(model.head(features), model(X))
    model.head(features).sum().backward()
    assert model.head.weight.grad is not None


def test_training_on_features_is_training_in_the_model() -> None:
    torch.manual_seed(0)
    whole = frozen(Net())
    cached = copy.deepcopy(whole)
    features = head_inputs(cached, "head", X)
    target = torch.arange(8) % 3
    for model, run in ((whole, lambda: whole(X)), (cached, lambda: cached.head(features))):
        optimizer = torch.optim.AdamW(model.head.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(run(), target).backward()
            optimizer.step()
    assert torch.equal(whole.head.weight, cached.head.weight)


@pytest.mark.parametrize("inplace", [False, True])
def test_dropout_just_before_the_head_belongs_to_the_tail(inplace: bool) -> None:
    model = frozen(Net(p=0.5, inplace=inplace))
    assert cut_reason(model, "head", X) is None
    tail = head_tail(model, "head", X)
    assert isinstance(tail, nn.Sequential)
    assert list(tail) == [model.dropout, model.head]
    assert tail.training
    features = head_inputs(model, "head", X)
    assert torch.equal(features, head_inputs(model.eval(), "head", X))
    assert torch.equal(tail.eval()(features.clone()), model(X))
    model.train()
    torch.manual_seed(5)
    expected = model(X)
    torch.manual_seed(5)
    assert torch.equal(tail.train()(features.clone()), expected)


def test_without_dropout_the_tail_is_the_head() -> None:
    model = frozen(Net())
    assert head_tail(model, "head", X) is model.head


def test_trying_leaves_no_trace() -> None:
    model = Net(p=0.5)
    model.register_module("loose", nn.BatchNorm1d(6, affine=False))
    freeze(model, "backbone")
    model.train()
    model.head.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert cut_reason(model, "head", X) is None
    head_tail(model, "head", X)
    head_inputs(model, "head", X)
    assert torch.equal(random, torch.get_rng_state())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    freeze(model, None)
    assert all(module.training for module in model.backbone.modules())


def test_random_state_is_left() -> None:
    model = frozen(Net(p=0.5))
    random = torch.get_rng_state()
    cut_reason(model, "head", X)
    assert torch.equal(random, torch.get_rng_state())


class CalledTwice(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.backbone(x)
        return self.head(x) + self.head(-x)


class NotCalled(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.backbone(x), self.head.weight)


class UsesHeadBefore(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x) + self.head.weight.sum(0))


class NormAtTheTop(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8, affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.backbone(x)))


class TwoInputs(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Bilinear(8, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.backbone(x)
        return self.head(x, x)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Net(after=lambda x: F.log_softmax(x, -1)), "something after the head changes its output"),
        (Net(after=lambda x: x + 0), "something after the head"),
        (Net(after=lambda x: x.mul_(2)), "something after the head"),
        (Net(after=lambda x: x[:, :2]), "something after the head"),
        (Net(between=lambda x: F.dropout(x, 0.5, training=True)), "gives something else|depend on the other"),
        (Net(p=0.5, between=lambda x: x * 2), "dropout 'dropout' before the head is on while training"),
        (Net(between=lambda x: x - x.mean(0)), "depend on the other samples"),
        (Net(between=lambda x: x.sum(0, keepdim=True)), "one row per sample"),
        (CalledTwice(), "called 2 times"),
        (NotCalled(), "called 0 times"),
        (UsesHeadBefore(), "depends on a parameter that trains"),
        (TwoInputs(), "something else than one tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_reasons_against(model: nn.Module, reason: str) -> None:
    came = cut_reason(frozen(model), "head", X)
    assert came is not None
    assert re.search(reason, came), came


def test_something_that_trains_before_the_head() -> None:
    model = Net()
    freeze(model, "backbone.0")
    assert cut_reason(model, "head", X) == "'backbone.1.weight' outside the head trains"


def test_batch_statistics_before_the_head() -> None:
    model = NormAtTheTop()
    freeze(model, "backbone")
    before = model.norm.running_mean.clone()
    assert (
        cut_reason(model.train(), "head", X)
        == "'norm' before the head takes the statistics of each batch while training"
    )
    assert torch.equal(before, model.norm.running_mean)
    freeze(model, "head", only=True)
    assert cut_reason(model.train(), "head", X) is None


def test_function_dropout_that_follows_the_mode() -> None:
    class Net2(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(F.dropout(self.backbone(x), 0.5, training=self.training))

    assert "gives something else in train mode" in str(cut_reason(frozen(Net2()), "head", X))


def test_a_head_tied_to_something_before_it() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, 4)
            self.head = nn.Linear(4, 9, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embedding(x).mean(1))

    assert (
        cut_reason(Tied(), "head", torch.zeros(2, 3, dtype=torch.int64))
        == "the head's weight is also 'embedding.weight'"
    )


def test_a_head_of_several_layers_that_writes_to_its_input() -> None:
    model = Net()
    model.head = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 3))
    frozen(model)
    assert cut_reason(model, "head", X) is None
    features = head_inputs(model, "head", X)
    assert torch.equal(model.eval().head(features.clone()), model(X))


def test_a_handler_inside_the_model_does_not_stop_the_cut() -> None:
    class Careful(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                return super().forward(x)
            except Exception as error:  # as some models do
                raise AssertionError("took it") from error

    model = frozen(Careful())
    assert head_inputs(model, "head", X).shape == (8, 8)


def test_names_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match="no such module"):
        cut_reason(Net(), "tail", X)
    with pytest.raises(ConfigError, match="does not call it"):
        head_inputs(NotCalled(), "head", X)


def test_outputs_in_an_object_and_inputs_in_a_mapping() -> None:
    class Wrapped(Net):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
            return {"logits": super().forward(x)}

    assert cut_reason(frozen(Wrapped()), "head", {"x": X}) is None
    assert head_inputs(frozen(Net()), "head", {"x": X}).shape == (8, 8)


def test_minilm(minilm_dir: Path) -> None:
    from pyft.models.text import build_text_classifier

    model = build_text_classifier(minilm_dir, 5)
    frozen(model)
    ids = torch.randint(1000, 2000, (5, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    assert cut_reason(model, "head", inputs) is None
    assert head_tail(model, "head", inputs) is model.head
    torch.testing.assert_close(model.head(head_inputs(model, "head", inputs)), model(**inputs), rtol=1e-6, atol=1e-6)


def test_efficientnet_lite_has_dropout_in_its_tail() -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="pip install efficientnet-lite-pytorch")
    model = frozen(package.EfficientNet.from_name("efficientnet-lite0", num_classes=5), "_fc")
    x = torch.rand(2, 3, 32, 32)
    assert cut_reason(model, "_fc", x) is None
    tail = head_tail(model, "_fc", x)
    assert list(tail) == [model._dropout, model._fc]
    torch.testing.assert_close(tail.eval()(head_inputs(model, "_fc", x)), model.eval()(x))

"""The head is found in every kind of model, and gets the size asked for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pyft.errors import ConfigError
from pyft.models.call import call_model
from pyft.models.head import find_head, fit_head


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 3))


def cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.decode = nn.Linear(10, 3)  # registered first, called last
        self.project = nn.Linear(5, 6)
        self.rnn = kind(6, 5, batch_first=True, bidirectional=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.rnn(self.project(x))[0][:, -1])


class ResNet20Like(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.relu(self.bn1(self.conv1(x))).mean((2, 3)))


class TimmLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 3
        self.body, self.top, self.last_norm = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 8)

    def get_classifier(self) -> nn.Module:
        return self.top

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.top(self.last_norm(self.body(x)))


class HuggingFaceLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_labels=3)
        self.num_labels = 3
        self.classifier = nn.Linear(8, 3)
        self.base = nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.classifier(self.base(x)).view(-1, self.num_labels))


class Squeezed(nn.Module):
    """SqueezeNet's ending: 1x1 convolution, ReLU, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 4, 1)
        self.classifier = nn.Sequential(nn.Dropout(), nn.Conv2d(4, 3, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x)).flatten(1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_logits = nn.Linear(6, 3)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_logits(self.attention(x, x, x)[0].mean(1))


flat, picture, series = torch.rand(4, 6), torch.rand(4, 3, 9, 9), torch.rand(4, 7, 5)
MODELS: dict[str, tuple[Any, torch.Tensor, str, str]] = {
    # build, inputs, the head, what is found without inputs
    "mlp": (mlp, flat, "3", "3"),
    "cnn": (cnn, picture, "4", "4"),
    "lstm": (lambda: Recurrent(nn.LSTM), series, "decode", "project"),
    "gru": (lambda: Recurrent(nn.GRU), series, "decode", "project"),
    "resnet20": (ResNet20Like, picture, "linear", "linear"),
    "timm": (TimmLike, flat, "top", "top"),
    "transformers": (HuggingFaceLike, flat, "classifier", "classifier"),
    "conv head": (Squeezed, picture, "classifier.1", "classifier.1"),
    "attention": (Attention, torch.rand(4, 5, 6), "to_logits", "to_logits"),
    "log-softmax": (lambda: nn.Sequential(nn.Linear(6, 3), nn.LogSoftmax(1)), flat, "0", "0"),
    "softmax": (lambda: nn.Sequential(nn.Linear(6, 3), nn.Softmax(1)), flat, "0", "0"),
    "flatten": (lambda: nn.Sequential(nn.Linear(6, 3), nn.Flatten()), flat, "0", "0"),
    "wrapped": (lambda: nn.Sequential(nn.ModuleDict({"a": nn.Linear(1, 1)})["a"], nn.Linear(1, 3)), torch.rand(4, 1),
                "1", "1"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_finds_the_head(name: str) -> None:
    build, inputs, expected, by_name = MODELS[name]
    model = build()
    found, layer = find_head(model, inputs)
    assert found == expected
    assert layer is model.get_submodule(expected)
    assert find_head(model)[0] == by_name


@pytest.mark.parametrize("name", MODELS)
def test_gives_the_head_the_size_asked_for(name: str) -> None:
    build, inputs, head, _ = MODELS[name]
    model = build().train()
    others = {key: value.clone() for key, value in model.state_dict().items() if not key.startswith(head + ".")}
    old = model.get_submodule(head)
    report = fit_head(model, 5, inputs)
    new = model.get_submodule(head)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in others.items())
    assert call_model(model, inputs).shape == (4, 5)
    assert report.replaced
    assert (report.name, report.old_shape, report.new_shape) == (head, tuple(old.weight.shape), tuple(new.weight.shape))
    assert f"head '{head}' replaced: 3 -> 5 outputs" in report.message
    assert "truncated normal with std 0.02, bias 0" in report.message
    assert new.training
    assert not new.bias.any()
    assert 0 < new.weight.abs().max() <= 0.04


@pytest.mark.parametrize("name", MODELS)
def test_keeps_a_head_of_the_right_size(name: str) -> None:
    build, inputs, head, _ = MODELS[name]
    model = build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = fit_head(model, 3, inputs)
    assert not report.replaced
    assert report.message.startswith(f"head '{head}' kept: 3 outputs")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_efficientnet_lite() -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="pip install efficientnet-lite-pytorch")
    model = package.EfficientNet.from_name("efficientnet-lite0")
    x = torch.rand(2, 3, 32, 32)
    report = fit_head(model, 5, x)
    assert (report.name, report.old_shape, report.new_shape) == ("_fc", (1000, 1280), (5, 1280))
    assert call_model(model, x).shape == (2, 5)


def test_mode_buffers_and_random_state_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    state, buffers = torch.get_rng_state(), [buffer.clone() for buffer in model.buffers()]
    fit_head(model, 5, flat)
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert all(torch.equal(now, before) for now, before in zip(model.buffers(), buffers, strict=True))
    assert not any(module._forward_hooks for module in model.modules())


def test_the_new_head_is_a_function_of_the_seed_and_has_the_old_dtype() -> None:
    weights = []
    for seed in (0, 0, 1):
        model = mlp().double()
        fit_head(model, 5, seed=seed)
        assert model[3].weight.dtype == torch.float64
        weights.append(model[3].weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_head_without_bias_stays_without() -> None:
    model = nn.Sequential(nn.Linear(6, 3, bias=False))
    fit_head(model, 5)
    assert model[0].bias is None


def test_names_are_given_by_the_user() -> None:
    model = Squeezed()
    assert fit_head(model, 5, head="classifier").name == "classifier.1"
    assert fit_head(model, 6, picture, head="classifier").name == "classifier.1"
    assert fit_head(model, 7, picture, head="classifier.1").new_shape == (7, 4, 1, 1)
    with pytest.raises(ConfigError, match=r"head='clasifier'.*nearest: classifier"):
        fit_head(model, 5, head="clasifier")
    with pytest.raises(ConfigError, match=r"head='classifier\.0': Dropout is neither Linear nor a 1x1 convolution"):
        fit_head(model, 5, head="classifier.0")


def test_a_name_that_is_not_the_head_changes_nothing() -> None:
    model = Recurrent(nn.LSTM)
    before = model.project
    with pytest.raises(ConfigError, match=r"head='project': with 9 outputs the model no longer runs"):
        fit_head(model, 9, series, head="project")
    assert model.project is before

    class Averaged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.num_classes = nn.Linear(6, 4), 4

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x).mean(1, keepdim=True).expand(-1, 2)

    averaged = Averaged()
    with pytest.raises(ConfigError, match="still gives shape"):
        fit_head(averaged, 9, flat, head="inner")
    assert averaged.inner.out_features == averaged.num_classes == 4
    with pytest.raises(ConfigError, match="it is not the layer"):
        fit_head(averaged, 4, flat, head="inner")


def test_no_head_but_the_right_size() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    report = fit_head(model, 5, picture)
    assert (report.name, report.replaced) == (None, False)
    assert "size asked for (5)" in report.message
    with pytest.raises(ConfigError, match=r"shape \(4, 5\), 6 per sample are needed.*head="):
        fit_head(model, 6, picture)
    with pytest.raises(ConfigError, match="head="):
        fit_head(model, 5)
    with pytest.raises(ConfigError, match="head="):
        find_head(model)
    with pytest.raises(ConfigError, match="num_outputs=0"):
        fit_head(mlp(), 0)


def test_regression_with_one_squeezed_target() -> None:
    class Price(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.out = nn.Linear(6, 8), nn.Linear(8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.body(x)).squeeze(-1)

    model = Price()
    assert fit_head(model, 1, flat).message == "head 'out' kept: 1 outputs"
    assert fit_head(model, 2, flat).name == "out"
    assert model(flat).shape == (4, 2)


def test_the_model_itself_is_one_layer() -> None:
    layer = nn.Linear(6, 3)
    assert fit_head(layer, 3, flat).message.startswith("head '' kept")
    with pytest.raises(ConfigError, match=r"torch\.nn\.Sequential"):
        fit_head(layer, 5, flat)


@pytest.mark.parametrize("inputs", [None, flat], ids=["by type", "by values"])
@pytest.mark.parametrize(
    ("last", "message"),
    [(nn.Softmax(1), "ends in softmax"), (nn.LogSoftmax(1), "ends in log-softmax"), (nn.Sigmoid(), "ends in sigmoid")],
)
def test_what_stands_behind_the_head_is_said(last: nn.Module, message: str, inputs: torch.Tensor | None) -> None:
    for num_outputs in (3, 5):
        assert message in fit_head(nn.Sequential(nn.Linear(6, 3), last), num_outputs, inputs).message
    assert "ends in" not in fit_head(mlp(), 3, inputs).message


def test_softmax_by_function_call_is_seen() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x).softmax(-1)

    assert "ends in softmax" in fit_head(Net(), 4, flat).message


def test_a_head_tied_to_an_embedding_is_untied_and_said() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 4)
            self.decoder = nn.Linear(4, 7, bias=False)
            self.decoder.weight = self.embedding.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.decoder(self.embedding(x).mean(1))

    x = torch.randint(0, 7, (4, 5))
    model = Language()
    before = model.embedding.weight.clone()
    assert "its weight is also 'embedding.weight', which trains along" in fit_head(model, 7, x).message
    assert "no longer tied to 'embedding.weight'" in fit_head(model, 3, x).message
    assert torch.equal(model.embedding.weight, before)
    assert model(x).shape == (4, 3)


def test_a_head_registered_twice_is_replaced_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 3)
            self.layers = nn.ModuleList([self.fc])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers[0](x)

    model = Twice()
    fit_head(model, 5, flat)
    assert model.fc is model.layers[0]
    assert model(flat).shape == (4, 5)


def test_lazy_layers_and_parametrized_heads() -> None:
    lazy = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3))
    assert fit_head(lazy, 5, flat).new_shape == (5, 8)
    model = nn.Sequential(nn.Linear(6, 8), nn.utils.parametrizations.spectral_norm(nn.Linear(8, 3)))
    report = fit_head(model, 5, flat)
    assert "the parametrization of the old weight is gone" in report.message
    assert type(model[1]) is nn.Linear

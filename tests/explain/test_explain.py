"""Attributions against what they must be: linear models, the completeness axiom, occlusion by hand."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pyft
from pyft.errors import ConfigError, DataError, MissingExtraError
from pyft.explain.attribute import METHODS, attribute, embedding_of

pytest.importorskip("captum", reason="pip install 'pyft[explain]'")
TABULAR: dict[str, Any] = {"task": "tabular-classification", "classes": ["a", "b", "c"]}


class Tokens(nn.Module):
    """Mean of embeddings, a tanh, a linear layer; positions are a second embedding."""

    def __init__(self, layer: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.places = nn.Embedding(32, 6)
        self.words = nn.Embedding(20, 6)
        self.head = nn.Linear(6, 3)
        self.layer = layer

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        words = self.words(tokens) if self.layer else self.words.weight[tokens]
        places = self.places(torch.arange(tokens.shape[1]).expand_as(tokens))
        return self.head(torch.tanh(words + places).mean(1))


class Wide(nn.Module):
    """BatchNorm, Dropout and an LSTM: all that is different in training."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.lstm = nn.LSTM(4, 8, batch_first=True)
        self.rest = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rest(self.lstm(x)[0][:, -1])


def linear() -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(5, 3), torch.randn(5)


# ---------------------------------------------------------------- against what is known exactly


@pytest.mark.parametrize("baseline", [None, 0.5, [1.0, 0.0, -1.0, 2.0, 0.25]])
@pytest.mark.parametrize("method", ["integrated_gradients", "occlusion"])
def test_a_linear_model_is_explained_by_its_weights(method: str, baseline: Any) -> None:
    model, x = linear()
    found = pyft.explain(model, x, method, "b", baseline=baseline, **TABULAR)
    away = x - torch.as_tensor(0.0 if baseline is None else baseline)
    np.testing.assert_allclose(found.attributions, (model.weight[1] * away).detach().numpy(), atol=1e-6)
    assert (found.target, found.target_index) == ("b", 1)
    with torch.no_grad():
        assert found.output == pytest.approx(float(model(x)[1]), abs=1e-6)
        assert found.score == pytest.approx(float(model(x).softmax(0)[1]), abs=1e-6)
        assert found.baseline_output == pytest.approx(float(model(x - away)[1]), abs=1e-6)


def test_input_gradients_of_a_linear_model_are_its_weights() -> None:
    model, x = linear()
    found = pyft.explain(model, x, "input_gradients", 2, **TABULAR)
    np.testing.assert_allclose(found.attributions, model.weight[2].detach().numpy(), atol=1e-7)
    assert found.baseline_output is None
    assert found.delta is None


def test_integrated_gradients_add_up() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))
    x = torch.randn(6)
    found = pyft.explain(model, x, steps=300, **TABULAR)
    with torch.no_grad():
        wanted = float((model(x) - model(torch.zeros(6)))[found.target_index])
    assert found.target_index == int(model(x).argmax())
    assert found.attributions.sum() == pytest.approx(wanted, abs=2e-3)
    assert found.delta == pytest.approx(found.attributions.sum() - wanted, abs=1e-5)
    assert found.steps == 300
    coarse = pyft.explain(model, x, steps=2, **TABULAR)
    assert coarse.delta is not None
    assert abs(coarse.delta) > abs(found.delta)


def test_occlusion_of_features_by_hand() -> None:
    model = Wide().eval()
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(2))
    found = pyft.explain(model, x, "occlusion", 1, task="tabular-classification", classes=["n", "y"], baseline=0.3)
    with torch.no_grad():
        whole = float(model(x[None])[0, 1])
        for t in range(7):
            for f in range(4):
                changed = x.clone()
                changed[t, f] = 0.3
                wanted = whole - float(model(changed[None])[0, 1])
                assert found.attributions[t, f] == pytest.approx(wanted, abs=1e-5)
    assert found.features[13] == "3, 1"
    assert found.values == pytest.approx(x.reshape(-1).tolist())


def test_of_a_long_sequence_whole_steps_are_occluded() -> None:
    model = Wide().eval()
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(2))
    found = attribute(model, model, x[None], 0, "occlusion")
    changed = x.clone()
    changed[299] = 0
    with torch.no_grad():
        wanted = float(model(x[None])[0, 0] - model(changed[None])[0, 0])
    assert found.values[299].sum() == pytest.approx(wanted, abs=1e-5)
    assert np.ptp(found.values[299]) < 1e-9


def test_occlusion_of_patches_by_hand() -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 8, 2)).eval()
    x = torch.randn(3, 8, 10)
    found = pyft.explain(model, x, "occlusion", 0, task="tabular-classification", classes=["n", "y"], patch=4)
    assert found.kind == "pixels"
    with torch.no_grad():
        whole = float(model(x[None])[0, 0])
        for top in (0, 4):
            for left in (0, 4):
                changed = x.clone()
                changed[:, top : top + 4, left : left + 4] = 0
                wanted = whole - float(model(changed[None])[0, 0])
                patch = found.pixel_map()[top : top + 4, left : left + 4]
                np.testing.assert_allclose(patch, wanted, atol=1e-5)


def test_tokens_by_hand() -> None:
    model = Tokens().eval()
    tokens = torch.tensor([4, 9, 1, 17])
    options: dict[str, Any] = {"task": "tabular-classification", "classes": ["a", "b", "c"], "baseline": 2}
    occluded = pyft.explain(model, tokens, "occlusion", "c", **options)
    with torch.no_grad():
        for place in range(4):
            changed = tokens.clone()
            changed[place] = 2
            wanted = float((model(tokens[None]) - model(changed[None]))[0, 2])
            assert occluded.attributions[place] == pytest.approx(wanted, abs=1e-6)
        difference = float((model(tokens[None]) - model(torch.full((1, 4), 2)))[0, 2])
    integrated = pyft.explain(model, tokens, "integrated_gradients", "c", **options)
    assert integrated.attributions.sum() == pytest.approx(difference, abs=1e-4)
    vectors = model.words(tokens).detach().requires_grad_()
    places = model.places(torch.arange(4))
    model.head(torch.tanh(vectors + places).mean(0))[2].backward()
    moved = pyft.explain(model, tokens, "input_gradients", "c", **options)
    assert vectors.grad is not None
    np.testing.assert_allclose(moved.attributions, (vectors.grad * vectors).sum(1).detach().numpy(), atol=1e-6)
    assert moved.features == ["4", "9", "1", "17"]
    assert moved.kind == "tokens"


def test_the_embedding_that_takes_the_tokens_is_found() -> None:
    model, tokens = Tokens(), torch.tensor([[0, 5, 2]])
    assert embedding_of(model, lambda: model(tokens), tokens) is model.words
    assert not any(layer._forward_pre_hooks for layer in model.modules())
    bare = Tokens(layer=False)
    with pytest.raises(ConfigError, match="method='occlusion'"):
        pyft.explain(bare, tokens[0], "input_gradients", **TABULAR)
    assert pyft.explain(bare, tokens[0], "occlusion", **TABULAR).attributions.shape == (3,)


# ---------------------------------------------------------------- nothing is left behind


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [Wide, Tokens])
def test_the_model_is_left_as_it_was(make: type[nn.Module], method: str) -> None:
    model = make()
    model.train()
    frozen, mode = next(iter(model.parameters())), model.get_submodule(next(iter(model._modules)))
    frozen.requires_grad_(False)
    mode.eval()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    states = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    x = torch.randn(7, 4) if make is Wide else torch.tensor([1, 2, 3])
    torch.set_rng_state(states[0])
    first = pyft.explain(model, x, method, 0, task="tabular-regression")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(bool((parameter.grad == 7.0).all()) for parameter in model.parameters())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())
    assert torch.is_grad_enabled()
    # Dropout is off, so that the same is found again.
    assert np.array_equal(first.attributions, pyft.explain(model, x, method, 0, task="tabular-regression").attributions)


def test_all_of_the_model_may_be_frozen() -> None:
    for model, x in ((Wide(), torch.randn(7, 4)), (Tokens(), torch.tensor([1, 2, 3]))):
        model.requires_grad_(False)
        for method in METHODS:
            with torch.no_grad():
                found = pyft.explain(model, x, method, 0, task="tabular-regression")
            assert np.abs(found.attributions).max() > 0


def test_a_model_that_fails_keeps_its_state() -> None:
    class Failing(Tokens):
        calls = 0

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls > 4:
                raise RuntimeError("out of luck")
            return super().forward(tokens)

    model = Failing().train()
    with pytest.raises(RuntimeError, match="out of luck"):
        pyft.explain(model, torch.tensor([1, 2]), **TABULAR)
    assert model.training
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())


# ---------------------------------------------------------------- words in, words out


def test_texts_are_explained_by_token(minilm_dir: Path) -> None:
    from pyft.data.text import TextPreprocess
    from pyft.models.load import load_model

    model = load_model(str(minilm_dir), num_outputs=2, seed=0).module
    text = "A caf\u00e9,  <b>unbelievably</b> good"
    found = pyft.explain(model, text, task="text-classification", classes=["bad", "good"],
                         preprocess=TextPreprocess.from_folder(minilm_dir))  # fmt: skip
    assert found.text == text
    assert found.spans is not None
    assert (found.features[0], found.features[-1]) == ("[CLS]", "[SEP]")
    assert len(found.features) == len(found.spans) == len(found.attributions)
    # What stands in both is no reason for the difference.
    assert found.attributions[0] == found.attributions[-1] == 0.0
    assert found.delta is not None
    assert abs(found.delta) < 0.05 * abs(found.output - (found.baseline_output or 0.0)) + 1e-4
    html = found.to_html()
    assert "<b>" not in html
    assert "&lt;" in html
    assert "good" in str(found)
    plain = "".join(part for part in html.replace(">", "<").split("<")[::2])
    assert "unbelievably" in plain.replace("&lt;", "<")


def test_what_a_model_of_pictures_sees(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    from pyft.data.images import ImagePreprocess

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    path = tmp_path / "a.png"
    image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(path)
    preprocess = ImagePreprocess(32)
    for x in (path, str(path), image.open(path)):
        found = pyft.explain(model, x, task="image-classification", classes=["n", "y"], preprocess=preprocess)
        assert found.attributions.shape == (3, 32, 32)
        assert found.picture is not None
        assert np.array_equal(found.picture.transpose(2, 0, 1), preprocess.pixels(path).numpy())
    assert found.to_html().count("data:image/png;base64,") == 2
    assert "32 x 32 pixels" in str(found)


def test_columns_of_a_table_go_by_name(run_dir: Path) -> None:
    pandas = pytest.importorskip("pandas")
    generator = np.random.default_rng(0)
    frame = pandas.DataFrame(generator.normal(size=(40, 3)), columns=["age", "<b>", "height"])
    frame["label"] = np.where(frame["age"] > 0, "old", "young")
    result = pyft.finetune(nn.Linear(3, 2), frame, epochs=2, export=None, progress=False, out=run_dir)
    row = {"height": 1.0, "age": 2.0, "<b>": -1.0}
    found = result.explain(row, target="old")
    weight = result.model.get_parameter("weight")[0].detach().numpy()
    np.testing.assert_allclose(found.attributions, weight * np.array([2.0, -1.0, 1.0]), atol=1e-5)
    assert found.features == ["age", "<b>", "height"]
    assert found.values == [2.0, -1.0, 1.0]
    assert "&lt;b&gt;" in found.to_html()
    assert "<b>" not in found.to_html()
    assert found.top(1)[0][0] == found.features[int(np.abs(found.attributions).argmax())]
    with pytest.raises(DataError, match="no 'height'"):
        result.explain({"age": 1.0, "<b>": 1.0})


def test_a_table_with_words_and_gaps(run_dir: Path) -> None:
    generator = np.random.default_rng(0)
    towns, ages = generator.choice(["Bonn", "Ulm"], 60), generator.normal(40, 10, 60)
    lines = [f"{age:.1f},{town},{'yes' if town == 'Ulm' else 'no'}" for town, age in zip(towns, ages, strict=True)]
    lines[3] = lines[3].replace(lines[3].partition(",")[0], "", 1)
    source = run_dir.parent / "people.csv"
    source.write_text("age,town,label\n" + "\n".join(lines) + "\n")
    result = pyft.finetune(
        nn.Linear(3, 2), source, task="tabular-classification", epochs=2, export=None, progress=False, out=run_dir
    )
    found = result.explain({"town": "Ulm", "age": 50.0}, target="yes")
    weight = result.model.get_parameter("weight")[1].detach().numpy()
    fed = result.preprocess({"town": "Ulm", "age": 50.0}).numpy()
    assert found.features == ["age", "town=Bonn", "town=Ulm"]
    np.testing.assert_allclose(found.attributions, weight * fed, atol=1e-5)
    page = result.report(explain=True).read_text()
    assert "town=Ulm" in page
    assert "Bonn" in page


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"method": "shap"}, "method='shap': expected one of integrated_gradients"),
        ({"target": "d"}, "target='d': expected one of a, b, c"),
        ({"target": 3}, "number from 0 to 2"),
        ({"target": True}, "target=True"),
        ({"baseline": [1.0, 2.0]}, r"baseline: expected a number, or the shape \(5,\)"),
        ({"baseline": "zero"}, "baseline"),
        ({"steps": 0}, "steps=0"),
        ({"patch": 1.5}, r"patch=1\.5"),
    ],
)
def test_what_cannot_be_asked(keywords: dict[str, Any], message: str) -> None:
    model, x = linear()
    with pytest.raises(ConfigError, match=message):
        pyft.explain(model, x, **TABULAR, **keywords)


@pytest.mark.parametrize("x", ["a text", None, [["a"], ["b"]], {"a": 1.0}, [[1.0], [1.0, 2.0]]])
def test_what_is_no_sample(x: Any) -> None:
    with pytest.raises((DataError, ConfigError)):
        pyft.explain(linear()[0], x, **TABULAR)


def test_an_onnx_file_has_no_gradients() -> None:
    with pytest.raises(ConfigError, match="onnx"):
        pyft.explain("model.onnx", "a text")


@pytest.fixture
def no_captum(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "captum"]:
        monkeypatch.delitem(sys.modules, name)

    class Finder:
        @staticmethod
        def find_spec(name: str, *_: Any) -> None:
            if name.partition(".")[0] == "captum":
                raise ModuleNotFoundError(f"No module named {name!r}", name="captum")

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])


@pytest.mark.usefixtures("no_captum")
def test_without_captum_the_extra_is_named() -> None:
    with pytest.raises(MissingExtraError, match=r"pyft\[explain\]"):
        pyft.explain(linear()[0], linear()[1], **TABULAR)

"""The text classifier against plain float64 arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from pyft.errors import ConfigError
from pyft.models.text import TextClassifier, build_text_classifier, read_pooling


class Output:
    def __init__(self, last_hidden_state: torch.Tensor) -> None:
        self.last_hidden_state = last_hidden_state


class Encoder(nn.Module):
    """Gives fixed vectors per token, whatever stands around it."""

    def __init__(self, hidden: int = 8, scale: float = 1.0) -> None:
        super().__init__()
        self.config = type("Config", (), {"hidden_size": hidden, "to_dict": dict})()
        self.table = nn.Embedding.from_pretrained(
            scale * torch.randn(100, hidden, generator=torch.Generator().manual_seed(1)), freeze=False
        )

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Output:
        return Output(self.table(input_ids))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 0, 0, 0], [8, 0, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    return ids, mask


def expected_mean(model: TextClassifier) -> torch.Tensor:
    ids, mask = batch()
    rows = []
    for row, keep in zip(ids, mask, strict=True):
        pooled = model.encoder.table.weight.detach().double()[row[keep.bool()]].mean(0)
        rows.append(pooled / pooled.square().mean().sqrt())
    return torch.stack(rows)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 100.0])
def test_mean_pooling_counts_real_tokens_only(scale: float) -> None:
    model = TextClassifier(Encoder(scale=scale), 3).eval()
    features = model.features(*batch())
    torch.testing.assert_close(features.double(), expected_mean(model), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(*batch()), model.head(features))


def test_cls_pooling_takes_the_first_token() -> None:
    model = TextClassifier(Encoder(), 3, pooling="cls").eval()
    first = model.encoder.table.weight.detach()[batch()[0][:, 0]]
    torch.testing.assert_close(model.features(*batch()), first / first.square().mean(1, keepdim=True).sqrt())
    with pytest.raises(ConfigError, match="pooling='max'"):
        TextClassifier(Encoder(), 3, pooling="max")  # type: ignore[arg-type]


def test_padding_changes_nothing() -> None:
    model = TextClassifier(Encoder(), 3).eval()
    ids, mask = batch()
    short = model(ids[1:2, :2], mask[1:2, :2])
    torch.testing.assert_close(model(ids, mask)[1:2], short, rtol=1e-6, atol=1e-6)


def test_pooling_sums_in_float32_when_the_encoder_gives_bfloat16() -> None:
    model = TextClassifier(Encoder(hidden=4), 2).eval()
    ids = torch.randint(0, 100, (2, 4000), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    exact = model.features(ids, mask)
    model.encoder.to(torch.bfloat16)
    rounded = model.encoder.table.weight.detach().double()[ids].mean(1)
    rounded /= rounded.square().mean(1, keepdim=True).sqrt()
    features = model.features(ids, mask)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.double(), rounded, rtol=1e-4, atol=1e-4)
    assert exact.shape == features.shape
    assert model.double().features(ids, mask).dtype == torch.float64


def test_autocast_keeps_features_in_float32(minilm_dir: Path) -> None:
    model = build_text_classifier(minilm_dir, 5)
    ids = torch.randint(1000, 2000, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    with torch.no_grad():
        exact = model.features(ids, mask)
        with torch.autocast("cpu", torch.bfloat16):
            features = model.features(ids, mask)
            assert model(ids, mask).dtype == torch.bfloat16
    assert features.dtype == torch.float32
    assert nn.functional.cosine_similarity(features, exact).min() > 0.999


def test_the_head_is_a_function_of_the_seed_alone() -> None:
    before = torch.get_rng_state()
    heads = [TextClassifier(Encoder(), 3, seed=seed).head for seed in (0, 0, 1)]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert not torch.equal(heads[0].weight, heads[2].weight)
    assert heads[0].weight.abs().max() <= 0.04
    assert heads[0].weight.std() > 0.01
    assert torch.equal(heads[0].bias, torch.zeros(3))


def test_features_agree_with_sentence_transformers_recipe(minilm_dir: Path) -> None:
    """Mean of token vectors under the mask, normalised, in float64 and on the model as transformers loads it."""
    transformers = pytest.importorskip("transformers")
    from pyft.models.hf import quiet_transformers

    model = build_text_classifier(minilm_dir, 2)
    with quiet_transformers():
        plain = transformers.BertModel.from_pretrained(minilm_dir, dtype=torch.float64, attn_implementation="eager")
    ids = torch.randint(1000, 2000, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    with torch.no_grad():
        hidden = plain.eval()(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = torch.stack([row[keep.bool()].mean(0) for row, keep in zip(hidden, mask, strict=True)])
        features = model.features(ids, mask).double()
    torch.testing.assert_close(nn.functional.normalize(features), nn.functional.normalize(mean), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.square().mean(1), torch.ones(3, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_spec_builds_the_same_architecture(minilm_dir: Path, tmp_path: Path) -> None:
    from pyft.models.saved import load_state, save_model

    model = build_text_classifier(minilm_dir, 4, seed=3)
    save_model(tmp_path / "m.safetensors", model)
    again = TextClassifier.from_spec(json.loads(json.dumps(model.spec())))
    load_state(tmp_path / "m.safetensors", again)
    ids = torch.randint(1000, 2000, (2, 7))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        assert torch.equal(model(ids, mask), again(ids, mask))


def test_dynamic_batch_and_sequence_in_torch_export() -> None:
    model = TextClassifier(Encoder(), 3).eval()
    B, T = torch.export.Dim("batch"), torch.export.Dim("sequence")
    ids, mask = batch()
    program = torch.export.export(model, (ids, mask), dynamic_shapes=({0: B, 1: T}, {0: B, 1: T})).module()
    for size, length in ((2, 3), (7, 11), (1, 1)):
        ids = torch.randint(0, 100, (size, length))
        mask = torch.ones_like(ids)
        torch.testing.assert_close(program(ids, mask), model(ids, mask))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "mean"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "cls"),
    ],
)
def test_pooling_of_the_folder(tmp_path: Path, content: dict[str, bool] | None, expected: str) -> None:
    if content is not None:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(content))
    assert read_pooling(tmp_path) == expected


def test_pooling_that_is_not_supported(tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(ConfigError, match="pooling_mode_max_tokens"):
        read_pooling(tmp_path)

"""Networks of transformers and timm, small and with random weights, whose frozen part is played back."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pyft
from pyft.errors import ConfigError
from pyft.freezing.lean import is_lean
from pyft.freezing.prefix_cache import PrefixCache

LENGTHS = [5, 9, 3, 7, 8, 8, 2, 4, 6, 11, 1]
BATCHES = [[0, 1, 2, 3], [6, 4, 5], [7, 8, 9, 10]]
SIZES = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 3,
}  # fmt: skip
TEXT = {"vocab_size": 60, "max_position_embeddings": 40, **SIZES}
# Class of the configuration, its arguments, token that pads, what comes before the layers, the layers.
TEXT_NETS: dict[str, tuple[dict[str, Any], int, list[str], str]] = {
    "DistilBert": (
        {"vocab_size": 60, "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32, "num_labels": 3},
        0, ["distilbert.embeddings"], "distilbert.transformer.layer",
    ),
    "Roberta": ({**TEXT, "pad_token_id": 1}, 1, ["roberta.embeddings"], "roberta.encoder.layer"),
    "MPNet": (
        {**TEXT, "pad_token_id": 1}, 1, ["mpnet.embeddings", "mpnet.encoder.relative_attention_bias"],
        "mpnet.encoder.layer",
    ),
    "Electra": (
        {**TEXT, "embedding_size": 8}, 0, ["electra.embeddings", "electra.embeddings_project"],
        "electra.encoder.layer",
    ),
    "DebertaV2": (
        {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8,
         "norm_rel_ebd": "layer_norm", "share_att_key": True},
        0, ["deberta.embeddings", "deberta.encoder.rel_embeddings", "deberta.encoder.LayerNorm"],
        "deberta.encoder.layer",
    ),
    "GPT2": (
        {"vocab_size": 60, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 40, "num_labels": 3,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        0, ["transformer.wte", "transformer.wpe", "transformer.drop"], "transformer.h",
    ),
}  # fmt: skip
IMAGE_NETS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "ViT": ({**SIZES, "image_size": 16, "patch_size": 4}, ["vit.embeddings", "vit.layers.0", "vit.layers.1"]),
    "Swin": (
        {"image_size": 16, "patch_size": 2, "window_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2],
         "drop_path_rate": 0.3, "num_labels": 3},
        ["swin.embeddings", "swin.encoder.layers.0"],
    ),
    "ConvNext": (
        {"patch_size": 2, "hidden_sizes": [8, 12, 16, 20], "depths": [1] * 4, "num_labels": 3},
        ["convnext.embeddings", "convnext.encoder.stages.0", "convnext.encoder.stages.1"],
    ),
    "ResNet": (
        {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic", "num_labels": 3},
        ["resnet.embedder", "resnet.encoder.stages.0"],
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Nets of this size are slower on more, above all beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(name: str, kind: str, arguments: dict[str, Any]) -> nn.Module:
    """A classifier of transformers with random weights, dropout as it comes."""
    transformers = pytest.importorskip("transformers", reason="pip install 'pyft[text]'")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**arguments)
    return getattr(transformers, f"{name}For{kind}Classification")(config)


def texts(pad: int) -> Callable[[list[int]], dict[str, torch.Tensor]]:
    """What makes the padded batch of some samples."""
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(5, 60, (length,), generator=draw) for length in LENGTHS]

    def batch(index: list[int]) -> dict[str, torch.Tensor]:
        chosen = [rows[number] for number in index]
        masks = [torch.ones_like(row) for row in chosen]
        pads = nn.utils.rnn.pad_sequence
        return {
            "input_ids": pads(chosen, batch_first=True, padding_value=pad),
            "attention_mask": pads(masks, batch_first=True),
        }

    return batch


def pictures(index: list[int]) -> dict[str, torch.Tensor]:
    values = torch.randn(len(LENGTHS), 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": values[index]}


def results(model: nn.Module, inputs: Any, seed: int) -> list[torch.Tensor]:
    """Output and all gradients; the trainable part has dropout."""
    torch.manual_seed(seed)
    model.zero_grad()
    out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    out = getattr(out, "logits", out)
    out.square().mean().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def bit_equal(model: nn.Module, cache: PrefixCache, batch: Callable[[list[int]], Any], rounds: int = 3) -> None:
    """Fill with the batches that training uses, and play them."""
    for turn in range(rounds):
        for index in BATCHES:
            expected = results(model, batch(index), turn)
            with cache.batch(index):
                found = results(model, batch(index), turn)
            assert len(found) == len(expected) > 2
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert cache.reason is None
    assert (cache.filled, cache.played) == (len(BATCHES), len(BATCHES) * (rounds - 1))


def agrees(model: nn.Module, cache: PrefixCache, batch: Callable[[list[int]], Any]) -> None:
    """Fill in batches sorted by length, which training does not use, and play others."""
    order = np.argsort(LENGTHS, kind="stable")
    cache.fill([(rows, batch(rows.tolist())) for rows in (order[:5], order[5:])])
    for turn, index in enumerate(BATCHES):
        expected = results(model, batch(index), turn)
        with cache.batch(index):
            found = results(model, batch(index), turn)
        for one, right in zip(found, expected, strict=True):
            assert (one - right).abs().max() <= 1e-5 * max(right.abs().max().item(), 1e-3)
    assert cache.reason is None
    assert cache.played == len(BATCHES)


class TestTexts:
    @pytest.fixture(params=TEXT_NETS)
    @staticmethod
    def net(request: pytest.FixtureRequest) -> tuple[nn.Module, list[str], str, Callable[..., Any]]:
        """The model, names of its first two layers and what is before them, of its last, and its batches."""
        arguments, pad, before, layers = TEXT_NETS[request.param]
        model = build(request.param, "Sequence", arguments)
        return model, [*before, f"{layers}.0", f"{layers}.1"], f"{layers}.2", texts(pad)

    def test_the_same_bits(self, net: Any) -> None:
        model, frozen, _, batch = net
        pyft.freeze(model, frozen)
        cache = PrefixCache(model.train(), batch(BATCHES[0]))
        # One vector a token, without padding; what is the same for all samples is not stored for each.
        assert cache.share > 0.5
        bit_equal(model, cache, batch)
        assert cache.nbytes == sum(LENGTHS) * 16 * 4

    def test_filled_sorted_by_length(self, net: Any) -> None:
        model, frozen, _, batch = net
        pyft.freeze(model, frozen)
        agrees(model, PrefixCache(model.train(), batch(BATCHES[0])), batch)

    def test_with_rows_and_lean_layers(self, net: Any) -> None:
        model, frozen, last, batch = net
        linears = [
            name for name, module in model.named_modules() if type(module) is nn.Linear and name.startswith(last)
        ]
        rows = {f"{name}.weight": pyft.Rows(0.25, by="random") for name in linears}
        other = next(iter(model.get_submodule(last).parameters()))
        plan = pyft.freeze(model, {**dict.fromkeys(frozen, True), f"{last}*": True, **rows})
        parts = [p for name, p in model.named_parameters() if name.endswith("weight_part")]
        assert len(parts) == len(linears)
        assert any(map(is_lean, model.modules()))
        before = other.detach().clone()
        bit_equal(model.train(), PrefixCache(model, batch(BATCHES[0])), batch)
        optimizer = pyft.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        results(model, batch(BATCHES[0]), 0)
        optimizer.step()
        plan.verify(model)
        assert linears or torch.equal(other, before)


class TestPictures:
    @pytest.fixture(params=IMAGE_NETS)
    @staticmethod
    def net(request: pytest.FixtureRequest) -> tuple[nn.Module, list[str]]:
        arguments, frozen = IMAGE_NETS[request.param]
        return build(request.param, "Image", arguments), frozen

    def test_the_same_bits(self, net: Any) -> None:
        model, frozen = net
        pyft.freeze(model, frozen)
        cache = PrefixCache(model.train(), pictures(BATCHES[0]))
        assert cache.share > 0.4
        bit_equal(model, cache, pictures)

    def test_filled_in_other_batches(self, net: Any) -> None:
        model, frozen = net
        pyft.freeze(model, frozen)
        agrees(model, PrefixCache(model.train(), pictures(BATCHES[0])), pictures)

    def test_with_rows_of_the_head(self, net: Any) -> None:
        model, frozen = net
        head = [name for name, module in model.named_modules() if type(module) is nn.Linear][-1]
        pyft.freeze(model, {**dict.fromkeys(frozen, True), f"{head}.weight": [0, 2]})
        bit_equal(model.train(), PrefixCache(model, pictures(BATCHES[0])), pictures)


@pytest.mark.parametrize(
    ("name", "frozen", "reason"),
    [
        # Between the embeddings and the first block, inside of what trains: naming it in the plan turns it off.
        ("GPT2", ["transformer.wte", "transformer.wpe", "transformer.h.0"], "dropout 'transformer.drop' is on"),
        ("DistilBert", ["distilbert.transformer.layer.0"], r"'distilbert\.embeddings\.word_embeddings\.weight' trains"),
        ("MPNet", ["mpnet.encoder.layer.0"], r"'mpnet\.embeddings\.word_embeddings\.weight' trains"),
    ],
)
def test_the_reason_is_named(name: str, frozen: list[str], reason: str) -> None:
    arguments, pad, *_ = TEXT_NETS[name]
    model = build(name, "Sequence", arguments)
    pyft.freeze(model, frozen)
    with pytest.raises(ConfigError, match=reason):
        PrefixCache(model.train(), texts(pad)(BATCHES[0]))


@pytest.mark.parametrize("name", ["Roberta", "DebertaV2"])
def test_what_is_frozen_without_a_plan_keeps_its_dropout(name: str) -> None:
    arguments, pad, *_ = TEXT_NETS[name]
    model = build(name, "Sequence", arguments)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name.startswith("classifier"))
    with pytest.raises(ConfigError, match=r"dropout '.*embeddings\.dropout' is on"):
        PrefixCache(model.train(), texts(pad)(BATCHES[0]))


def test_dropout_that_is_off_between_frozen_layers_is_no_copy() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Linear(8, 2))
    x = torch.randn(len(LENGTHS), 4)
    pyft.freeze(model, ["0", "1", "2"])
    cache = PrefixCache(model.train(), x[:4])
    bit_equal(model, cache, lambda index: x[index])
    assert set(cache.prefix.cut.script.sites) == {("0", 0), ("2", 0)}


TIMM_NETS = {
    "resnet18": ["conv1", "bn1", "layer1", "layer2"],
    "efficientnet_lite0": ["conv_stem", "bn1", "blocks.0", "blocks.1", "blocks.2"],
    "vit_tiny_patch16_224": ["cls_token", "pos_embed", "patch_embed", *(f"blocks.{block}" for block in range(6))],
}


@pytest.mark.parametrize("name", TIMM_NETS)
def test_timm(name: str) -> None:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        pytest.skip(f"timm does not import: {error}")
    torch.manual_seed(0)
    options = {"img_size": 32} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=3, drop_path_rate=0.2, **options)
    pyft.freeze(model, TIMM_NETS[name])
    pixels = torch.randn(len(LENGTHS), 3, 32, 32)
    cache = PrefixCache(model.train(), pixels[:4])
    bit_equal(model, cache, lambda index: pixels[index], rounds=2)
    assert cache.share > 0.25

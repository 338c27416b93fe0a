"""Whether a model makes anything of padding, and steps that leave it out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training_run import run
from torch import Tensor, nn

from pyft.freezing.lean import token_linear
from pyft.samples import Batch
from pyft.training.padding import ignores_padding, padding_mask

LENGTHS = torch.tensor([40, 11, 25, 8])
MASK = (torch.arange(40) < LENGTHS[:, None]).long()
IDS = torch.randint(1, 50, (4, 40), generator=torch.Generator().manual_seed(0)) * MASK


class Net(nn.Module):
    """Words, a layer, and what is made of its tokens."""

    def __init__(self, pool: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.pool = pool
        self.words, self.layer, self.norm, self.head = (
            nn.Embedding(50, 64), nn.Linear(64, 96), nn.BatchNorm1d(96), nn.Linear(96, 3),
        )  # fmt: skip
        self.drop = nn.Dropout(0.5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.drop(torch.tanh(self.layer(self.words(input_ids))))
        if self.pool == "tokens":
            return self.head(x)
        if self.pool == "first":
            return self.head(self.norm(x[:, 0]))
        if self.pool == "all":
            return self.head(self.norm(x.mean(1)))
        shares = attention_mask[..., None] / attention_mask.sum(1).view(-1, 1, 1)
        return self.head(self.norm((x * shares).sum(1)))


@pytest.fixture
def products(core: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each product by the core, which is taken on every CPU here."""
    seen: list[int] = []
    own = token_linear.token_linear
    monkeypatch.setattr(token_linear, "token_linear", lambda *args: seen.append(len(args[3])) or own(*args))
    monkeypatch.setattr(token_linear, "packing_pays", lambda: True)
    return seen


@pytest.mark.parametrize(("pool", "ignores"), [("masked", True), ("first", True), ("all", False), ("tokens", True)])
def test_what_a_model_makes_of_padding(products: list[int], pool: str, ignores: bool) -> None:
    net = Net(pool).train()
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    targets = torch.tensor([0, 1, 2, 0])

    def loss(logits: Tensor) -> Tensor:
        if logits.ndim == 2:
            return nn.functional.cross_entropy(logits, targets)
        labels = torch.where(MASK != 0, 1, -100)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    assert ignores_padding(net, MASK, lambda: net(IDS, MASK), loss) is ignores
    assert products == [int(LENGTHS.sum())]
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    assert all(torch.equal(value, kept[name]) for name, value in net.state_dict().items())


def test_labels_on_padding_count(products: list[int]) -> None:
    """A model of tokens that is to learn something of padding, too, must see it."""
    net = Net("tokens")

    def loss(logits: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), torch.ones(160, dtype=torch.int64))

    assert not ignores_padding(net, MASK, lambda: net(IDS, MASK), loss)


def test_masks(products: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert padding_mask({"attention_mask": MASK}) is MASK
    # Too little to be left out: a trial on such a batch would show nothing.
    little = torch.ones_like(MASK)
    little[0, -(token_linear.PACKING - 1) :] = 0
    assert padding_mask({"attention_mask": little}) is None
    little[0, -token_linear.PACKING :] = 0
    assert padding_mask({"attention_mask": little}) is little
    for inputs in ({"attention_mask": MASK != 2}, {"attention_mask": MASK[None]}, {"input_ids": MASK}, MASK):
        assert padding_mask(inputs) is None
    monkeypatch.setattr(token_linear, "packing_pays", lambda: False)
    assert padding_mask({"attention_mask": MASK}) is None


class TextBatches:
    """One batch twice, the first time with too little padding to be left out, which shows nothing of the model."""

    num_batches = 2

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        targets = torch.tensor([0, 1, 2, 0])
        little = torch.ones_like(MASK)
        little[0, -1] = 0
        for mask in (little, MASK)[start:]:
            yield Batch({"input_ids": IDS, "attention_mask": mask}, targets, torch.arange(4))


@pytest.mark.parametrize(("pool", "leaves_out"), [("masked", True), ("first", True), ("all", False)])
def test_steps_are_those_with_padding(
    products: list[int], run_dir: Path, monkeypatch: pytest.MonkeyPatch, pool: str, leaves_out: bool
) -> None:
    net, reference = Net(pool), Net(pool)
    run(net, run_dir / "tokens", batches=TextBatches(), epochs=3, lr=1e-3)
    # The check of the first batch is one product; each epoch then has one batch with padding.
    assert products == [int(LENGTHS.sum())] * (4 if leaves_out else 1)
    monkeypatch.setattr(token_linear, "packing_pays", lambda: False)
    run(reference, run_dir / "torch", batches=TextBatches(), epochs=3, lr=1e-3)
    for mine, wanted in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)
    for mine, wanted in zip(net.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-4)

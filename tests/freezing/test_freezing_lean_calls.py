"""Function calls in lean form: torch's numbers and draws, less kept, and nothing outside the context."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import pyft


def attention(seed: int = 0, **options) -> tuple[list[torch.Tensor], int]:
    """Output and gradients of attention over leaves, and the bytes it keeps."""
    generator = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(2, 3, n, 8, generator=generator) for n in (10, 12, 12))
    if options.pop("layout", False):
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    torch.manual_seed(seed)
    y = F.scaled_dot_product_attention(*leaves, **options)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    found = [y.detach(), *torch.autograd.grad(y, leaves, grad), torch.rand(2)]
    return found, pyft.saved_bytes(lambda: F.scaled_dot_product_attention(*leaves, **options), nn.ParameterList(leaves))


BOOLS = torch.rand(10, 12, generator=torch.Generator().manual_seed(5)) > 0.4
BOOLS[3] = False


@pytest.mark.parametrize(
    "options",
    [
        {}, {"attn_mask": torch.randn(10, 12)}, {"attn_mask": BOOLS}, {"is_causal": True}, {"scale": 0.3},
        {"layout": True},
    ],
    ids=["plain", "float mask", "bool mask", "causal", "scale", "layout"],
)  # fmt: skip
def test_attention_with_dropout(options) -> None:
    want, many = attention(dropout_p=0.3, **options)
    with pyft.lean_calls():
        got, few = attention(dropout_p=0.3, **options)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[-1], want[-1]), "another number of draws"
    for ours, theirs in zip(got[1:-1], want[1:-1], strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
    weights = 2 * 3 * 10 * 12
    assert few <= weights // 8 + 10 * 12 * 4
    assert many >= 3 * weights * 4


def test_attention_without_dropout_is_torchs() -> None:
    want = attention()
    with pyft.lean_calls():
        got = attention()
    assert got[1] == want[1]
    assert all(torch.equal(a, b) for a, b in zip(got[0], want[0], strict=True))


class Calls(nn.Module):
    """A net of function calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)

    def part(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv(x)), 3, stride=2, padding=1)
        return torch.relu(F.dropout(x, 0.25, self.training) - 0.1).mul(2.0).relu_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.part, x, use_reentrant=False) if self.training and x.shape[0] == 1 else self.part(x)


@pytest.mark.parametrize("batch", [2, 1], ids=["plain", "checkpointed"])
def test_calls_in_a_model_are_torchs_bit_for_bit(batch: int) -> None:
    model, x = Calls(), torch.randn(batch, 3, 12, 12)

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(1)
        y = model(x)
        y.square().sum().backward()
        return [y.detach(), model.conv.weight.grad.clone()]

    want = run()
    with pyft.lean_calls():
        got = run()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(run(), want, strict=True))
    if batch == 2:
        many = pyft.saved_bytes(lambda: model(x), model)
        with pyft.lean_calls():
            assert pyft.saved_bytes(lambda: model(x), model) < 0.25 * many


def test_indices_are_still_given_and_compile_is_plain() -> None:
    x = torch.randn(1, 1, 4, 4, requires_grad=True)
    with pyft.lean_calls():
        _, at = F.max_pool2d(x * 1.0, 2, return_indices=True)
        assert at.dtype == torch.int64
        compiled = torch.compile(lambda x: F.relu(x).sum(), backend="aot_eager", fullgraph=True)
        compiled(x).backward()
    assert torch.equal(x.grad, (x > 0).float())

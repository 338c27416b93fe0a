"""Lean dropout draws what torch draws, and keeps one bit an element."""

from __future__ import annotations

import math

import pytest
import torch
from lean_models import kept, results, same, with_lean
from torch import nn

from pyft.freezing.lean import bit_gradients


def last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.93, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout_draws_what_torch_draws(p: float, dtype: torch.dtype) -> None:
    layer = nn.Dropout(p).train()
    twin = with_lean(layer).train()
    x = torch.randn(33, 7, 5).to(dtype)
    for take in (lambda x: x, lambda x: x.transpose(0, 2), lambda x: x[:, ::2]):
        ours = results(lambda x, t=take: twin(t(x)), x)
        after = torch.rand(3)
        assert same(ours, results(lambda x, t=take: layer(t(x)), x))
        assert torch.equal(after, torch.rand(3))
    if 0.0 < p < 1.0:
        assert kept(twin, x, twin) == math.ceil(x.numel() / 8)
    assert same(results(twin.eval(), x), results(nn.Identity(), x))


@pytest.fixture
def fused_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout as on CUDA: torch's `native_dropout`, which the CPU has too, gives a bool mask."""
    monkeypatch.setattr(bit_gradients, "has_fused_dropout", lambda x: True)


class FusedDropout(nn.Module):
    """torch's dropout as it is on CUDA."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.native_dropout(x, self.p, True)[0] if x.numel() else x * 1.0


@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dropout_with_a_bool_mask_keeps_its_bits(fused_dropout: None, p: float, dtype: torch.dtype) -> None:
    layer, twin = FusedDropout(p), with_lean(nn.Dropout(p)).train()
    x = torch.randn(33, 8, 5, 7).to(dtype)
    x[0] = math.inf
    x[1] = -math.nan
    for take in (lambda x: x, last, lambda x: x.transpose(0, 2), lambda x: x[:, ::2], lambda x: x[:0]):
        ours = results(lambda x, t=take: twin(t(x)), x)
        after = torch.rand(3)
        assert same(ours, results(lambda x, t=take: layer(t(x)), x))
        assert torch.equal(after, torch.rand(3))
        # Where nothing is kept, the gradient is a zero with the sign that torch gives it.
        assert torch.equal(ours[1].signbit(), results(lambda x, t=take: layer(t(x)), x)[1].signbit())
    assert kept(layer, x, layer) == x.numel()
    assert kept(twin, x, twin) == math.ceil(x.numel() / 8)


def test_dropout_with_a_bool_mask_has_a_second_derivative(fused_dropout: None) -> None:
    x = torch.randn(4, 9, dtype=torch.float64)

    def penalty(module: nn.Module) -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        torch.manual_seed(0)
        (dx,) = torch.autograd.grad(module(leaf).pow(3).sum(), leaf, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), leaf)[0]

    torch.testing.assert_close(penalty(with_lean(nn.Dropout(0.4)).train()), penalty(FusedDropout(0.4)))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dropout_on_a_gpu_is_torchs_in_a_graph_too(core, dtype: torch.dtype) -> None:
    layer = nn.Dropout(0.3).train()
    twin, x = with_lean(layer).train(), torch.randn(33, 8, 5, 7, device="cuda").to(dtype)
    for take in (lambda x: x, last, lambda x: x[:, ::2], lambda x: x.flatten()[1:]):
        ours, theirs = (results(lambda x, m=m, t=take: m(t(x)), x) for m in (twin, layer))
        assert same(ours, theirs)
    assert kept(twin, x, twin) == math.ceil(x.numel() / 8)
    found = []
    for module in (twin, layer):
        leaf = x.clone().requires_grad_()
        graph = torch.cuda.CUDAGraph()
        module(leaf * 1.0).sum().backward()
        leaf.grad = None
        torch.cuda.manual_seed(5)
        with torch.cuda.graph(graph):
            y = module(leaf * 1.0)
            (dx,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
        replays = []
        for _ in range(2):
            graph.replay()
            replays += [y.detach().clone(), dx.clone()]
        found.append(replays)
    assert same(found[0], found[1])
    assert not torch.equal(found[0][0], found[0][2])

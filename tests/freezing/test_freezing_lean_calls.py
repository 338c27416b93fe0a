"""Function calls in lean form: torch's numbers and draws, less kept, and nothing outside the context."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import pyft
from pyft.freezing.lean import bit_gradients


def attention(
    seed: int = 0, *, attend=None, dtype=torch.float32, layout=False, flat=False, autocast=False, **options
) -> tuple[list[torch.Tensor], int]:
    """Output and gradients of attention over leaves, and the bytes it keeps."""
    attend = attend or F.scaled_dot_product_attention
    generator = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(2, 3, n, 8, generator=generator).to(dtype) for n in (10, 12, 12))
    if layout:
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    if flat:
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    leaves = [t.requires_grad_() for t in (q, k, v)]

    def run() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return attend(*leaves, **options)

    torch.manual_seed(seed)
    y = run()
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    found = [y.detach(), *torch.autograd.grad(y, leaves, grad), torch.rand(2)]
    return found, pyft.saved_bytes(run, nn.ParameterList(leaves))


def attention_on_cuda(q, k, v, dropout_p: float, scale: float | None = None) -> torch.Tensor:
    """torch's math as it is on CUDA, where dropout is `native_dropout`."""
    q, k, v, dtype = q.float(), k.float(), v.float(), q.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    weights = torch.softmax(q @ k.transpose(-2, -1) * scale, -1)
    return (torch.native_dropout(weights, dropout_p, True)[0] @ v).to(dtype)


BOOLS = torch.rand(10, 12, generator=torch.Generator().manual_seed(5)) > 0.4
BOOLS[3] = False


@pytest.mark.parametrize(
    "options",
    [
        {}, {"attn_mask": torch.randn(10, 12)}, {"attn_mask": BOOLS}, {"is_causal": True}, {"scale": 0.3},
        {"layout": True}, {"flat": True}, {"scale": -0.3}, {"dtype": torch.bfloat16}, {"dtype": torch.float64},
        {"dtype": torch.float16, "attn_mask": BOOLS}, {"autocast": True}, {"autocast": True, "is_causal": True},
        {"autocast": True, "attn_mask": torch.randn(10, 12)},
    ],
    ids=[
        "plain", "float mask", "bool mask", "causal", "scale", "layout", "three dimensions", "negative scale",
        "bfloat16", "float64", "float16 mask", "autocast", "autocast causal", "autocast mask",
    ],
)  # fmt: skip
def test_attention_with_dropout(options) -> None:
    want, many = attention(dropout_p=0.3, **options)
    with pyft.lean_calls():
        got, few = attention(dropout_p=0.3, **options)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[-1], want[-1]), "another number of draws"
    for ours, theirs in zip(got[1:-1], want[1:-1], strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
    weights = 2 * 3 * 10 * 12
    # Autocast keeps its copies of q, k and v beside the leaves, with or without us.
    assert few <= weights // 8 + 10 * 12 * 4 + (2 * 3 * (10 + 12 + 12) * 8 * 2 if options.get("autocast") else 0)
    assert many >= 3 * weights * 4


@pytest.mark.parametrize("options", [{}, {"flat": True}, {"scale": 0.3}, {"dtype": torch.bfloat16}])
def test_attention_as_on_cuda_draws_what_native_dropout_draws(monkeypatch: pytest.MonkeyPatch, options) -> None:
    monkeypatch.setattr(bit_gradients, "has_fused_dropout", lambda x: True)
    want, many = attention(dropout_p=0.3, attend=attention_on_cuda, **options)
    with pyft.lean_calls():
        got, few = attention(dropout_p=0.3, **options)
    assert torch.equal(got[-1], want[-1]), "another number of draws"
    rounding = 1e-2 if "dtype" in options else 1e-6
    for ours, theirs in zip(got[:-1], want[:-1], strict=True):
        assert (ours.float() - theirs.float()).norm() <= rounding * theirs.float().norm()
    weights = 2 * 3 * 10 * 12
    assert few <= weights // 8 + 4
    assert many >= weights * (4 + 1 + 4)


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION])
def test_attention_that_torch_gives_to_another_kernel_is_torchs(monkeypatch: pytest.MonkeyPatch, backend) -> None:
    """On CUDA those keep no weights, so there is nothing to take away; here torch's math stands for them."""
    asked = []
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *args, **rest: asked.append(args) or backend.value)
    want, many = attention(dropout_p=0.3)
    with pyft.lean_calls():
        got, few = attention(dropout_p=0.3)
    assert asked
    assert few == many
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_what_torch_refuses_of_attention_is_refused() -> None:
    q = torch.randn(2, 3, 10, 8, requires_grad=True)
    for options in (
        {"attn_mask": torch.ones(10, 10, dtype=torch.int64)}, {"attn_mask": torch.ones(7, 1, 1, 10, 10)},
        {"attn_mask": BOOLS[:, :10], "is_causal": True}, {"attn_mask": torch.ones(10, 10).double()},
    ):  # fmt: skip
        with pytest.raises(RuntimeError) as theirs:
            F.scaled_dot_product_attention(q, q, q, dropout_p=0.5, **options)
        with pyft.lean_calls(), pytest.raises(RuntimeError) as ours:
            F.scaled_dot_product_attention(q, q, q, dropout_p=0.5, **options)
        assert str(ours.value) == str(theirs.value)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION])
def test_attention_on_a_gpu(core, dtype: torch.dtype, backend: SDPBackend) -> None:
    leaves = [torch.randn(2, 3, 64, 16, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)]

    def run() -> tuple[list[torch.Tensor], int]:
        torch.manual_seed(0)
        y = F.scaled_dot_product_attention(*leaves, dropout_p=0.3)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)], pyft.saved_bytes(
            lambda: F.scaled_dot_product_attention(*leaves, dropout_p=0.3), nn.ParameterList(leaves)
        )

    with sdpa_kernel(backend):
        want, many = run()
        with pyft.lean_calls():
            got, few = run()
    assert torch.equal(got[0], want[0])
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert few == many if backend != SDPBackend.MATH else few <= 2 * 3 * 64 * 64 // 8 + 4096


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

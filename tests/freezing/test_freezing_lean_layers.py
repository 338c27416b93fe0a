"""Each lean form alone: torch's outputs and gradients, and what it keeps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lean_models import frozen, kept, results, same, with_lean
from torch import nn

import pyft
from pyft.freezing.lean import is_lean


def last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[type[nn.Module], dict[str, Any], tuple[int, ...]]:
    """A class, its arguments, and an input shape that fits."""
    cls = draw(st.sampled_from([nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d]))
    axes = 1 if "1d" in cls.__name__ else 2
    groups = draw(st.sampled_from([1, 2, 4]))
    many = st.tuples(*[st.integers(1, 3)] * axes)
    arguments = {
        "in_channels": groups * draw(st.integers(1, 3)),
        "out_channels": groups * draw(st.integers(1, 3)),
        "kernel_size": draw(many),
        "stride": draw(many),
        "dilation": draw(many),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    if "Transpose" in cls.__name__:
        arguments["padding"] = draw(st.tuples(*[st.integers(0, 1)] * axes))
        arguments["output_padding"] = tuple(
            min(1, max(s, d) - 1) for s, d in zip(arguments["stride"], arguments["dilation"], strict=True)
        )
    else:
        words = ["valid"] + ["same"] * all(s == 1 for s in arguments["stride"])
        arguments["padding"] = draw(st.sampled_from([0, 1, *words]))
        arguments["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    sizes = draw(st.tuples(*[st.integers(8, 13)] * axes))
    batch = draw(st.sampled_from([(), (1,), (3,)]))
    return cls, arguments, (*batch, arguments["in_channels"], *sizes)


@settings(max_examples=150, deadline=None)
@given(case=convolutions(), channels_last=st.booleans())
def test_any_frozen_convolution_is_torchs_bit_for_bit(case, channels_last: bool) -> None:
    cls, arguments, shape = case
    torch.manual_seed(0)
    layer, x = frozen(cls(**arguments)), torch.randn(shape)
    if channels_last and x.ndim == 4:
        x, layer = last(x), layer.to(memory_format=torch.channels_last)
    twin = with_lean(layer)
    assert is_lean(twin)
    assert same(results(twin, x), results(layer, x))


@pytest.mark.parametrize("cls", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d])
def test_a_frozen_convolution_keeps_nothing(cls: type[nn.Module]) -> None:
    layer = frozen(cls(4, 4, 3))
    x = torch.randn(2, 4, *[8] * (len(layer.kernel_size)))
    assert kept(layer, x, layer) == x.nbytes
    assert kept(with_lean(layer), x, layer) <= layer.weight.nbytes
    layer.bias.requires_grad_(True)
    twin = with_lean(layer)
    for module in (layer, twin):
        module(x.clone().requires_grad_()).square().sum().backward()
    assert torch.equal(twin.bias.grad, layer.bias.grad)
    assert kept(twin, x, twin) <= layer.weight.nbytes


def test_a_convolution_that_trains_and_wrong_inputs_are_torchs() -> None:
    layer = with_lean(frozen(nn.Conv2d(4, 4, 3)))
    x = torch.randn(2, 4, 8, 8)
    layer.weight.requires_grad_(True)
    results(layer, x)
    layer(x.requires_grad_()).sum().backward()
    assert layer.weight.grad is not None
    layer.weight.requires_grad_(False)
    for wrong in (torch.randn(2, 3, 8, 8), torch.randn(8, 8), x.double()):
        with pytest.raises(RuntimeError) as ours:
            layer(wrong.requires_grad_())
        with pytest.raises(RuntimeError) as theirs:
            nn.Conv2d(4, 4, 3)(wrong)
        assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("cls", [nn.Conv2d, nn.ConvTranspose2d])
def test_views_and_expanded_inputs(cls: type[nn.Module]) -> None:
    layer = frozen(cls(4, 6, 3))
    whole = torch.randn(3, 8, 9, 20)
    for take in (
        lambda x: x[:, ::2, :, 1::2],
        lambda x: x[:, :4].transpose(2, 3),
        lambda x: x[:1, :4].expand(3, -1, -1, -1),
        lambda x: x[:0, :4],
    ):
        assert same(
            results(lambda x, take=take: with_lean(layer)(take(x)), whole),
            results(lambda x, take=take: layer(take(x)), whole),
        )


# Norms


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("cls", "shape"),
    [
        (nn.BatchNorm1d, (5, 3)), (nn.BatchNorm1d, (5, 3, 7)), (nn.BatchNorm2d, (5, 3, 4, 4)),
        (nn.BatchNorm2d, (1, 3, 1, 1)), (nn.BatchNorm3d, (2, 3, 4, 4, 2)),
    ],
)  # fmt: skip
def test_frozen_batch_norm_keeps_a_scale(cls: type[nn.Module], shape: tuple[int, ...], affine: bool) -> None:
    torch.manual_seed(0)
    layer, x = frozen(cls(3, affine=affine)), torch.randn(shape)
    twin = with_lean(layer)
    (y, dx), (want, want_dx) = results(twin, x), results(layer, x)
    exact = results(layer.double(), x.double())
    assert torch.equal(y, want)
    # No further from the exact gradient than a few roundings.
    assert (dx - exact[1]).abs().max() <= 4e-7 * exact[1].abs().max()
    assert (dx - want_dx).abs().max() <= 4e-7 * exact[1].abs().max()
    assert kept(twin, x, twin) == 3 * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_frozen_batch_norm_in_16_bits_is_rounded_once(dtype: torch.dtype) -> None:
    layer, x = frozen(nn.BatchNorm2d(3)), torch.randn(5, 3, 4, 4).to(dtype)
    twin, scale = with_lean(layer), layer.weight / (layer.running_var + layer.eps).sqrt()
    for image in (x, last(x)):
        y, dx = results(twin, image)
        assert torch.equal(y, layer(image))
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(y.numel())).to(dtype)
        want = grad.double() * scale.double().view(1, 3, 1, 1)
        assert dx.dtype == dtype
        assert ((dx.double() - want).abs() <= want.abs() * torch.finfo(dtype).eps * 0.501 + 1e-7).all()


def test_batch_norm_in_training_mode_without_statistics_or_with_a_weight_that_trains_is_torchs() -> None:
    x = torch.randn(5, 3, 4, 4)
    layer = frozen(nn.BatchNorm2d(3))
    assert same(results(with_lean(layer).train(), x), results(layer.train(), x))
    bare = frozen(nn.BatchNorm2d(3, track_running_stats=False))
    assert same(results(with_lean(bare), x), results(bare, x))
    layer = with_lean(frozen(nn.BatchNorm2d(3)))
    layer.weight.requires_grad_(True)
    layer(x.requires_grad_()).sum().backward()
    assert layer.weight.grad is not None


def test_the_bias_of_a_frozen_batch_norm_may_train() -> None:
    layer, x = frozen(nn.BatchNorm2d(3)), torch.randn(50, 3, 4, 4)
    layer.bias.requires_grad_(True)
    twin = with_lean(layer)
    for module in (layer, twin):
        module(x.clone().requires_grad_()).square().sum().backward()
    torch.testing.assert_close(twin.bias.grad, layer.bias.grad, rtol=1e-6, atol=1e-4)
    assert kept(twin, x, twin) == 12


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 7), (5, 3, 4, 4), (2, 3, 33, 35)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_batch_norm_and_relu_in_a_sequential_are_one_pass(shape: tuple[int, ...], channels_last: bool) -> None:
    cls = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    pair, x = frozen(nn.Sequential(cls(3), nn.ReLU())), torch.randn(shape)
    if channels_last and len(shape) == 4:
        x = last(x)
    twin = with_lean(pair)
    assert type(twin).__name__ == "LeanSequential"
    exact = results(pair.double(), x.double())
    for got, want in zip(results(twin, x), exact, strict=True):
        assert (got - want).abs().max() <= 4e-7 * max(1.0, float(want.abs().max()))
    assert kept(twin, x, twin) == 12 + math.ceil(x.numel() / 8)


def test_a_hook_in_a_sequential_sees_what_it_would_see() -> None:
    pair, x = frozen(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())), torch.randn(5, 3, 4, 4)
    twin = with_lean(pair)
    seen = []
    twin[0].register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    assert same(results(twin, x)[:1], results(pair, x)[:1])
    assert torch.equal(seen[0], pair[0](x))
    assert float(seen[0].min()) < 0


@pytest.mark.parametrize("layer", [nn.LayerNorm(16), nn.GroupNorm(4, 8), nn.RMSNorm(16)])
def test_other_norms_with_frozen_weights_keep_their_input_once(layer: nn.Module) -> None:
    """torch's own: this fails when torch begins to keep more, and a lean form begins to pay."""
    frozen(layer)
    x = torch.randn(64, 8, 16)
    assert kept(with_lean(layer), x, layer) < 1.1 * x.nbytes + 4096
    assert same(results(with_lean(layer), x), results(layer, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_keeps_its_16_bits(dtype: torch.dtype) -> None:
    layer, x = frozen(nn.RMSNorm(64)).to(dtype), torch.randn(32, 64).to(dtype)
    twin = with_lean(layer)
    assert same(results(twin, x), results(layer, x))
    assert kept(twin, x, twin) == x.nbytes
    assert kept(layer, x, layer) > 1.9 * x.nbytes


# Activations


PIECEWISE = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.ReLU6(inplace=True), nn.Hardtanh(-0.5, 2.0), nn.LeakyReLU(0.1),
    nn.LeakyReLU(0.2, inplace=True), nn.LeakyReLU(-0.3), nn.LeakyReLU(0.0),
]  # fmt: skip


@pytest.mark.parametrize("layer", PIECEWISE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_piecewise_activations_are_torchs_bit_for_bit(layer: nn.Module, dtype: torch.dtype) -> None:
    twin = with_lean(layer)
    torch.manual_seed(1)
    x = torch.randn(7, 5, 6, 9).mul(4).to(dtype)
    x.view(-1)[::7] = 0.0
    x.view(-1)[1::9] = -0.0
    for take in (lambda x: x, last, lambda x: x.transpose(1, 3), lambda x: x[:, :, ::2], lambda x: x[:0]):
        ours, theirs = (results(lambda x, m=m, t=take: m(t(x)), x) for m in (twin, layer))
        assert same(ours, theirs)
    if "-0.3" not in str(layer):
        assert kept(twin, x, twin) == math.ceil(x.numel() / 8)


def test_relu_lets_the_gradient_through_at_nan_as_torch_does() -> None:
    x = torch.tensor([math.nan, -1.0, 2.0, -math.inf, math.inf, 0.0] * 7)
    assert same(results(with_lean(nn.ReLU()), x), results(nn.ReLU(), x))


def test_nested_and_sparse_tensors_are_torchs() -> None:
    parts = [torch.randn(2, 3), torch.randn(4, 3)]
    for layer in (nn.ReLU(), nn.Dropout(0.5).train()):
        twin = with_lean(layer).train()
        nested = torch.nested.nested_tensor(parts, requires_grad=True)
        torch.manual_seed(0)
        ours = twin(nested).unbind()
        torch.manual_seed(0)
        assert all(torch.equal(a, b) for a, b in zip(ours, layer(nested).unbind(), strict=True))


def test_gradients_of_any_layout() -> None:
    x = torch.randn(4, 6, 8, 8)
    for after in (
        lambda y: y.sum((2, 3)),
        lambda y: y.permute(0, 2, 3, 1) * 2,
        lambda y: last(y) * y.mean(),
        torch.sum,
    ):
        ours, theirs = (results(lambda x, m=m, a=after: a(m(x)), x) for m in (with_lean(nn.ReLU()), nn.ReLU()))
        assert same(ours, theirs)


def test_in_place_relu_on_a_view_changes_its_base_and_on_a_leaf_is_refused() -> None:
    def run(relu: nn.Module, x: torch.Tensor) -> torch.Tensor:
        base = x * 2.0
        relu(base[:, 1:3])
        return base * base

    x = torch.randn(4, 5)
    relu = nn.ReLU(inplace=True)
    twin = with_lean(relu)
    assert same(results(lambda x: run(twin, x), x), results(lambda x: run(relu, x), x))
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        twin(x.clone().requires_grad_())
    total = twin(x.clone().requires_grad_().exp()).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_out_plus_identity_in_place_then_relu() -> None:
    def block(layers: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
        out = layers[1](layers[0](x))
        out += x
        return layers[2](out)

    layers = frozen(nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]))
    twin, x = with_lean(layers), torch.randn(2, 4, 6, 6)
    (y, dx), (want, want_dx) = (results(lambda x, m=m: block(m, x), x) for m in (twin, layers))
    assert torch.equal(y, want)
    torch.testing.assert_close(dx, want_dx, rtol=1e-6, atol=1e-6)
    assert kept(lambda x: block(twin, x), x, twin) == 16 + 2 * 4 * 36 // 8


# Pooling


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "ceil_mode": True}])
@pytest.mark.parametrize("cls", [nn.MaxPool1d, nn.MaxPool2d])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_max_pool_keeps_one_byte(cls: type[nn.Module], options: dict[str, Any], batch: tuple[int, ...]) -> None:
    layer = cls(3, **options)
    twin = with_lean(layer)
    x = torch.randn(*batch, 4, *[19] * (1 if cls is nn.MaxPool1d else 2))
    assert same(results(twin, x), results(layer, x))
    assert kept(twin, x, twin) == layer(x).numel()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(twin(x), layer(x))
    assert torch.equal(twin(x), layer(x))
    if x.ndim == 4:
        assert same(results(twin, last(x)), results(layer, last(x)))


def test_max_pool_that_lean_cannot_do_is_torchs() -> None:
    x = torch.randn(2, 4, 40, 40)
    for layer in (nn.MaxPool2d(17), nn.MaxPool2d(3).double()):
        x = x.double() if layer is not None else x
        assert same(results(with_lean(layer), x), results(layer, x))
    _, at = with_lean(nn.MaxPool2d(2, return_indices=True))(x.requires_grad_())
    assert at.dtype == torch.int64
    for wrong, size in ((nn.MaxPool2d(2, padding=2), 8), (nn.MaxPool2d(9), 8), (nn.MaxPool2d(2, stride=0), 8)):
        with pytest.raises(RuntimeError):
            with_lean(wrong)(torch.randn(1, 1, size, size, requires_grad=True))


@pytest.mark.parametrize(
    "layer", [nn.AvgPool2d(3, 2, 1, True, False), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d((2, 3))], ids=str
)
def test_average_pools_keep_nothing(layer: nn.Module) -> None:
    x = torch.randn(2, 4, 9, 9)
    twin = with_lean(layer)
    for view in (x, last(x), x[0], x.transpose(2, 3)):
        assert same(results(twin, view), results(layer, view))
    assert kept(twin, x, twin) == 0


# All


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.LeakyReLU(), nn.AvgPool2d(2),
     nn.AdaptiveAvgPool2d(2), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), nn.Dropout(0.5)],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_second_derivatives(layer: nn.Module) -> None:
    frozen(layer).double()
    layer.training = isinstance(layer, nn.Dropout)
    twin = with_lean(layer)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)

    def penalty(module: nn.Module) -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        torch.manual_seed(0)
        (dx,) = torch.autograd.grad(module(leaf).pow(3).sum(), leaf, create_graph=True)
        return list(torch.autograd.grad(dx.square().sum(), leaf))

    torch.testing.assert_close(penalty(twin), penalty(layer), rtol=1e-12, atol=1e-12)


def test_second_derivative_of_max_pool_is_refused_by_name() -> None:
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match="lean form of max pooling has no second derivative"):
        torch.autograd.grad(with_lean(nn.MaxPool2d(2))(x).pow(2).sum(), x, create_graph=True)


def test_functional_relu_and_saved_bytes_count_a_storage_once() -> None:
    x = torch.randn(10, 10, requires_grad=True)
    assert pyft.saved_bytes(lambda: F.relu(x * 1.0)) == 400
    assert pyft.saved_bytes(lambda: [F.relu(y := x * 1.0), y[::2].exp(), y.sin()]) == 400 + 400 + 200
    assert pyft.saved_bytes(lambda: x.detach().exp()) == 0


def test_rms_norm_is_torchs_where_cuda_has_one_kernel_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from pyft.freezing.lean.norms import has_one_rms_norm

    def on_cuda(contiguous: bool = True) -> Any:
        return SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, is_contiguous=lambda: contiguous)

    same_dtype = torch.ones(4, dtype=torch.bfloat16)
    assert has_one_rms_norm(on_cuda(), same_dtype)
    assert has_one_rms_norm(on_cuda(), None)
    # Each of these makes torch take the way of several steps, which keep fp32.
    assert not has_one_rms_norm(on_cuda(), torch.ones(4))
    assert not has_one_rms_norm(on_cuda(contiguous=False), same_dtype)
    assert not has_one_rms_norm(torch.ones(4, dtype=torch.bfloat16), same_dtype)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    assert not has_one_rms_norm(on_cuda(), same_dtype)


def test_bits_are_kept_where_kernels_make_them_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from pyft.core import loader
    from pyft.freezing.lean.conditions import has_kernels

    on_gpu = SimpleNamespace(is_cpu=False, is_cuda=True)
    for found in (None, object()):
        monkeypatch.setattr(loader, "load_cuda_core", lambda found=found: found)
        assert has_kernels(on_gpu) == (found is not None)
    assert has_kernels(torch.zeros(1))
    assert not has_kernels(torch.zeros(1, device="meta"))

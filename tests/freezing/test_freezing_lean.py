"""Whole models in lean forms: swapped in and out again, and at home in whatever runs a model."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from lean_models import frozen, kept, results, same, with_lean
from torch import nn
from torch.utils.checkpoint import checkpoint

import pyft
from pyft.errors import ConfigError
from pyft.freezing.lean import is_lean, plain_class, release


class Block(nn.Module):
    """The basic block of a ResNet, with its in-place operations."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


def checkpointing(block: nn.Module, reentrant: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: checkpoint(block, x, use_reentrant=reentrant)


class Net(nn.Module):
    """A stem, three blocks and a head."""

    def __init__(self, checkpointed: bool | None = None) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.blocks = nn.Sequential(*[Block(8) for _ in range(3)])
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(8, 4)
        self.checkpointed = checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            run = block if self.checkpointed is None else checkpointing(block, self.checkpointed)
            x = run(x)
        return self.fc(self.drop(x.mean((2, 3))))


def net(checkpointed: bool | None = None) -> Net:
    torch.manual_seed(0)
    model = Net(checkpointed)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    frozen(model)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    return model.train()


IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
BUT_FIRST_BLOCK = ["stem", "blocks.1", "blocks.2", "fc"]


def gradients(model: nn.Module, images: torch.Tensor = IMAGES) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    model(images).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], rounding: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    assert one
    for name, grad in one.items():
        assert (grad - other[name]).norm() <= rounding * other[name].norm(), name


def lean_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if is_lean(module)]


def test_freeze_swaps_and_release_gives_the_classes_back() -> None:
    model = net()
    classes = [type(m) for m in model.modules()]
    plan = pyft.freeze(model, BUT_FIRST_BLOCK)
    assert {"stem", "stem.0", "stem.2", "stem.3", "blocks.1.conv1", "blocks.2.relu", "drop", "fc"} <= set(
        lean_names(model)
    )
    assert not [name for name in lean_names(model) if name.startswith("blocks.0")]
    assert all(isinstance(m, plain_class(type(m))) for m in model.modules())
    plan.release(model)
    assert [type(m) for m in model.modules()] == classes
    assert not pyft.freeze(model, BUT_FIRST_BLOCK, lean=False).release(model)
    plan = pyft.freeze(model, BUT_FIRST_BLOCK, lean=False)
    assert not lean_names(model)
    plan = plan.thaw(model, "fc")
    assert not lean_names(model)
    again = pyft.freeze(copy.deepcopy(model), plan)
    assert again.lean is False


def test_nothing_is_swapped_where_all_trains_and_classes_must_be_exact() -> None:
    class MyConv(nn.Conv2d):
        pass

    model = net()
    assert len(pyft.lean(model)) == 0
    assert pyft.freeze(model, None).lean
    assert not lean_names(model)
    own = nn.Sequential(MyConv(3, 3, 3), nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3)), nn.Conv2d(3, 3, 3))
    assert pyft.lean(own.requires_grad_(False)).names == {"2": "Conv2d"}
    with pytest.raises(ConfigError, match="activations='fast'"):
        pyft.lean(own, activations="fast")  # type: ignore[arg-type]


def test_a_second_call_copies_and_pickles() -> None:
    model = net()
    pyft.freeze(model, BUT_FIRST_BLOCK)
    names = lean_names(model)
    forms = pyft.lean(model)
    assert list(forms.names) == names
    assert len(pyft.lean(model)) == len(forms)
    want = gradients(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for twin in twins:
        assert lean_names(twin) == names
        assert all(torch.equal(grad, want[name]) for name, grad in gradients(twin).items())
    pyft.lean(twins[0]).release()
    assert not lean_names(twins[0])
    assert lean_names(model) == names
    forms.release()
    assert not lean_names(model)
    assert "Conv2d" in repr(pyft.lean(model))


@pytest.mark.parametrize("what", [BUT_FIRST_BLOCK, ["*conv*", "stem.0", "fc"], ["stem.0", "blocks.*.conv1"]], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_of_what_trains_are_torchs_and_less_is_kept(what: list[str], channels_last: bool) -> None:
    plain, lean = net(), net()
    images = IMAGES
    if channels_last:
        plain, lean = (m.to(memory_format=torch.channels_last) for m in (plain, lean))
        images = images.contiguous(memory_format=torch.channels_last)
    for model, wanted in ((plain, False), (lean, True)):
        pyft.freeze(model, what, lean=wanted)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    assert_close(gradients(lean, images), gradients(plain, images))
    few, many = (pyft.saved_bytes(lambda m=m: m(images), m) for m in (lean, plain))
    assert few < 0.75 * many


def test_float64_gradients_are_exact() -> None:
    plain, lean = net().double(), net().double()
    pyft.freeze(plain, BUT_FIRST_BLOCK, lean=False)
    pyft.freeze(lean, BUT_FIRST_BLOCK)
    assert_close(gradients(lean, IMAGES.double()), gradients(plain, IMAGES.double()), 1e-13)


def test_frozen_bits_stay_and_a_run_is_torchs() -> None:
    plain, lean = net(), net()
    runs = []
    for model, wanted in ((plain, False), (lean, True)):
        plan = pyft.freeze(model, ["stem", "blocks.0.conv1", "blocks.1", "fc"], lean=wanted)
        optimizer = pyft.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for i in range(15):
            torch.manual_seed(i)
            loss = F.cross_entropy(model(IMAGES), torch.tensor([0, 1, 2, 3]))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        plan.verify(model)
        runs.append(losses)
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)


def test_without_gradient_all_is_torchs() -> None:
    plain, lean = net().eval(), net().eval()
    pyft.freeze(lean, BUT_FIRST_BLOCK)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(lean(IMAGES), plain(IMAGES))
    pyft.freeze(plain, "*", lean=False)
    pyft.freeze(lean, "*")
    assert torch.equal(lean(IMAGES), plain(IMAGES))
    assert not lean(IMAGES).requires_grad


def test_state_dict_is_unaffected() -> None:
    plain, lean = net(), net()
    pyft.freeze(lean, BUT_FIRST_BLOCK)
    assert list(lean.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(lean.state_dict())
    lean.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_with_frozen_first_layers(reentrant: bool) -> None:
    """transformers #21381: all gradients vanish. Reentrant checkpoints need an input that requires a gradient."""
    plain, lean = net(), net(reentrant)
    what = ["stem.0", "blocks.1", "blocks.2.conv1"]
    pyft.freeze(plain, what, lean=False)
    pyft.freeze(lean, what)
    for model in (plain, lean):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    assert_close(gradients(lean), gradients(plain))


def test_autocast_bf16_is_torchs_and_keeps_no_cast_weights() -> None:
    layers = nn.Sequential(
        nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(2304, 30)
    )
    frozen(layers)
    for bias in (layers[0].bias, layers[4].bias):
        bias.requires_grad_(True)
    twin = with_lean(layers)
    x = torch.randn(2, 16, 8, 8)

    def run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(x)

    assert same(results(lambda x: run(twin, x), x), results(lambda x: run(layers, x), x))
    biases = []
    for module in (twin, layers):
        run(module, x).float().square().sum().backward()
        biases.append([module[0].bias.grad, module[4].bias.grad])
    assert same(*biases)
    weights = sum(p.numel() * 2 for p in layers.parameters() if p.ndim > 1)
    assert kept(lambda x: run(layers, x), x, layers) > weights
    assert kept(lambda x: run(twin, x), x, twin) < 0.05 * weights


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_ddp(tmp_path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain, lean = net(), net()
        pyft.freeze(plain, BUT_FIRST_BLOCK, lean=False)
        pyft.freeze(lean, BUT_FIRST_BLOCK)
        wrapped = nn.parallel.DistributedDataParallel(lean)
        gradients(wrapped)
        found = {name: p.grad for name, p in lean.named_parameters() if p.grad is not None}
        assert_close(found, gradients(plain))
    finally:
        torch.distributed.destroy_process_group()


def test_compile_sees_torchs_own_modules_and_no_break() -> None:
    plain, lean = net(), net()
    pyft.freeze(plain, BUT_FIRST_BLOCK, lean=False)
    pyft.freeze(lean, BUT_FIRST_BLOCK)
    compiled = torch.compile(lean, backend="aot_eager", fullgraph=True)
    lean.drop.p = plain.drop.p = 0.0
    gradients(compiled)
    found = {name: p.grad for name, p in lean.named_parameters() if p.grad is not None}
    assert_close(found, gradients(plain))


def test_export_and_trace_are_plain() -> None:
    lean = net().eval()
    pyft.freeze(lean, BUT_FIRST_BLOCK)
    program = torch.export.export(lean, (IMAGES,))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.conv2d.default" in names
    assert not [name for name in names if "pyft" in name]
    traced = torch.jit.trace(lean, IMAGES, check_trace=False)
    assert "PythonOp" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(IMAGES), lean(IMAGES))


def test_vmap_grad_and_forward_mode_see_torchs_own_modules() -> None:
    conv = with_lean(frozen(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2))))
    x = torch.randn(2, 3, 8, 8)
    ours = torch.func.grad(lambda x: conv(x).square().sum())(x)
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(conv(leaf).square().sum(), leaf)
    torch.testing.assert_close(ours, want)
    torch.func.vmap(torch.func.grad(lambda x: conv(x).square().sum()))(x)
    _, tangent = torch.func.jvp(lambda x: conv(x).sum(), (x,), (torch.ones_like(x),))
    assert tangent.shape == ()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.clone().requires_grad_(), torch.ones_like(x))
        conv(dual)


# Activations computed again


@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU("tanh"), nn.SiLU()], ids=str)
@pytest.mark.parametrize("bf16", [False, True])
def test_recompute_keeps_the_smaller_input_of_the_linear_layer(activation: nn.Module, bf16: bool) -> None:
    layers = frozen(nn.Sequential(nn.Linear(32, 128), activation, nn.Linear(128, 32)))
    layers[0].bias.requires_grad_(True)
    twin = with_lean(layers, activations="recompute")
    x = torch.randn(6, 5, 32)

    def run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            return module(x)

    assert same(results(lambda x: run(twin, x), x), results(lambda x: run(layers, x), x))
    grads = []
    for module in (twin, layers):
        run(module, x).float().square().sum().backward()
        grads.append([module[0].bias.grad])
    assert same(*grads)
    size = 2 if bf16 else 4
    assert kept(lambda x: run(twin, x), x, twin) == x.numel() * size
    assert kept(lambda x: run(layers, x), x, layers) >= 4 * x.numel() * size
    with pytest.raises(RuntimeError, match="after a linear layer has no second derivative"):
        torch.autograd.grad(twin(y := x.clone().requires_grad_()).sum(), y, create_graph=True)


def test_recompute_is_not_done_for_changed_values_or_larger_inputs() -> None:
    twin = with_lean(frozen(nn.ModuleList([nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)])), activations="recompute")
    plain = copy.deepcopy(twin)
    release(plain)

    def changed(layers: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
        return layers[1](layers[0](x).mul_(2.0))

    def narrow(layers: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
        return layers[1](layers[2](layers[1](layers[0](x))))

    x = torch.randn(4, 8)
    for run in (changed, narrow):
        assert same(results(lambda x, r=run: r(twin, x), x), results(lambda x, r=run: r(plain, x), x))


def test_the_input_of_a_linear_layer_is_not_kept_alive_by_it() -> None:
    layer = with_lean(frozen(nn.Linear(8, 32)), activations="recompute")
    x = torch.randn(4, 8, requires_grad=True) * 1.0
    watch = weakref.ref(x.untyped_storage())
    y = layer(x)
    del x
    del y
    gc.collect()
    from pyft.freezing.lean.linear import _latest

    assert _latest.producer is None
    del watch


def test_transformers_activations() -> None:
    activations = pytest.importorskip("transformers.activations")
    for name in ("gelu_new", "gelu_fast", "quick_gelu", "relu2", "mish", "laplace", "gelu_10", "gelu", "silu"):
        layer = activations.ACT2FN[name]
        block = frozen(nn.Sequential(nn.Linear(16, 64), layer))
        x = torch.randn(5, 16)
        keep, again = with_lean(block), with_lean(block, activations="recompute")
        for twin in (keep, again, pickle.loads(pickle.dumps(again))):
            assert same(results(twin, x), results(block, x)), name
        most = 5 * 64 * 4 if not isinstance(keep[1], nn.ReLU) else 40
        assert kept(keep, x, keep) <= most + (0 if is_lean(keep[1]) else most * 3), name
        assert kept(again, x, again) <= 5 * 64 * 4
    composed = frozen(nn.Sequential(nn.Linear(16, 64), activations.NewGELUActivation()))
    keep, again = with_lean(composed), with_lean(composed, activations="recompute")
    assert kept(composed, x, composed) > 2 * kept(keep, x, keep)
    assert kept(again, x, again) == x.nbytes


def test_attention_with_frozen_projections_keeps_what_its_gradient_needs() -> None:
    """torch keeps q, k, v, the output and one number a row: no input of a projection. There is nothing to take away."""
    attention = frozen(nn.MultiheadAttention(32, 4, batch_first=True))
    x = torch.randn(2, 50, 32)
    run = lambda m: lambda x: m(x, x, x, need_weights=False)[0]  # noqa: E731
    attention.train()
    twin = with_lean(attention)
    assert same(results(run(twin), x), results(run(attention), x))
    assert kept(run(attention), x, attention) <= 4.2 * x.nbytes

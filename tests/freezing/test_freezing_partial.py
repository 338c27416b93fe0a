"""Layers that train in part inside a training: optimizers, copies, state_dict, ties, compile, export, processes."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from two_processes import train_one

import pyft
from pyft.errors import ConfigError, FrozenError


class Net(nn.Module):
    """Every kind of layer that may train in part."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.lin = nn.Linear(8, 12)
        self.bn = nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(self.embed(x).transpose(1, 2)).transpose(1, 2)
        return self.head(self.bn(self.lin(self.norm(h)).mean(1)).relu())


PARTS: dict[str, Any] = {
    "embed": [1, 4, 7],
    "conv.weight": {"rows": [0, 5], "columns": [1, 2]},
    "conv.bias": slice(2, 4),
    "norm": [0, 3],
    "lin": slice(3, 6),
    "bn": [1, 11],
    "head.weight": {"blocks": [(0, 1), (1, 2)], "block_size": (2, 4)},
    "head.bias": True,
}


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, (6, 5), generator=generator), torch.randint(4, (6,), generator=generator)


def loss_of(model: nn.Module, seed: int = 0) -> torch.Tensor:
    x, y = data(seed)
    return F.cross_entropy(model(x), y)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        optimizer.zero_grad()
        loss_of(model, number).backward()
        optimizer.step()


def partly(seed: int = 0) -> tuple[nn.Module, pyft.FreezePlan]:
    torch.manual_seed(seed)
    model = Net()
    return model, pyft.freeze(model, PARTS)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "torch AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "torch AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "torch SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "pyft AdamW": lambda p: pyft.optim.AdamW(p, lr=0.01, weight_decay=0.1, clip_norm=1.0),
    "pyft SGD": lambda p: pyft.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "pyft Lion": lambda p: pyft.optim.Lion(p, lr=0.01, weight_decay=0.1),
    "pyft AdamW 8-bit": lambda p: pyft.optim.AdamW(p, lr=0.01, weight_decay=0.1, state_dtype="int8"),
    "pyft AdamW L2-SP": lambda p: pyft.optim.AdamW(p, lr=0.01, decay_to_init=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("everything", [True, False])
def test_frozen_entries_have_their_bits_after_200_steps(name: str, everything: bool) -> None:
    model, plan = partly()
    before = copy.deepcopy(model.state_dict())
    given = list(model.parameters()) if everything else [p for p in model.parameters() if p.requires_grad]
    steps(model, OPTIMIZERS[name](given), 200)
    plan.verify(model)
    after = model.state_dict()
    for key, chosen in plan.parts.items():
        assert torch.equal(chosen.entries.rest(after[key]), chosen.entries.rest(before[key])), key
        assert not torch.equal(chosen.entries.take(after[key]), chosen.entries.take(before[key])), key
    assert torch.equal(after["head.bias"], before["head.bias"])
    plan.release(model)
    assert all(torch.equal(value, after[key]) for key, value in model.state_dict().items())
    assert all(type(module).__module__.startswith("torch.") for module in model.children())


def test_ten_steps_are_those_of_a_dense_model_with_masked_gradients() -> None:
    """Masking dense gradients under plain SGD is the same arithmetic."""
    ours, plan = partly()
    torch.manual_seed(0)
    dense = Net()
    steps(ours, torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.05), 10)
    for number in range(10):
        dense.zero_grad()
        loss_of(dense, number).backward()
        with torch.no_grad():
            for key, weight in dense.named_parameters():
                grad = weight.grad
                if key in plan.frozen:
                    continue
                if key in plan.parts:
                    grad = grad - plan.parts[key].entries.rest(grad)
                weight -= 0.05 * grad
    for key, value in dense.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-5, atol=1e-6, msg=key)


def test_state_of_the_optimizer_and_the_norm_are_of_the_part() -> None:
    model, plan = partly()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == plan.num_trainable
    optimizer = pyft.optim.AdamW(trained, lr=0.01)
    steps(model, optimizer, 2)
    state = sum(s["exp_avg"].numel() for s in optimizer.state.values())
    assert state == plan.num_trainable
    ours = float(pyft.optim.clip_grad_norm_(list(model.parameters()), 1e-3))
    theirs = float(torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in trained])))
    assert theirs == pytest.approx(1e-3, rel=1e-3)
    assert ours > theirs


def test_accumulation_adds_up() -> None:
    model, _ = partly()
    for seed in (0, 1):
        (loss_of(model, seed) / 2).backward()
    twice = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    ((loss_of(model, 0) + loss_of(model, 1)) / 2).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, twice[name], rtol=1e-4, atol=1e-6)


def test_whole_weights_are_never_stale() -> None:
    layer = nn.Linear(4, 6)
    pyft.train_only(layer, rows=[0, 2, 5])
    optimizer = torch.optim.SGD([layer.weight_part, layer.bias_part], lr=1.0)
    for read in (lambda: layer.weight, lambda: layer.state_dict()["weight"], lambda: layer(torch.eye(4)).t()):
        layer(torch.ones(1, 4)).sum().backward()
        with torch.no_grad():
            layer.bias_part.zero_()
        optimizer.step()
        if read()[0].shape[0] == 4:
            seen = read() - layer.bias[:, None] if read is not None and read().grad_fn is not None else read()
            torch.testing.assert_close(seen[[0, 2, 5]], layer.weight_part, rtol=1e-5, atol=1e-6)
        optimizer.zero_grad()
    with torch.no_grad():
        layer.weight_part.fill_(7.0)
    assert bool((layer.weight[[0, 2, 5]] == 7.0).all())
    nn.init.zeros_(layer.weight)  # by hand: the part follows
    assert not layer(torch.ones(1, 4)).isnan().any()
    assert bool((layer.weight_part == 0).all())
    layer.weight = nn.Parameter(torch.full((6, 4), 3.0), requires_grad=False)
    layer(torch.ones(1, 4))
    assert bool((layer.weight_part == 3.0).all())


@pytest.mark.parametrize("rows", [slice(2, 4), [0, 3]])
def test_a_step_between_forward_and_backward_is_an_error(rows: Any) -> None:
    """As in torch: the weight that backward needs has changed."""
    layer = nn.Linear(4, 6)
    pyft.train_only(layer, rows=rows)
    optimizer = torch.optim.SGD([layer.weight_part], lr=1.0)
    x = torch.randn(2, 4, requires_grad=True)
    layer(x).sum().backward()
    late = layer(x)
    optimizer.step()
    layer(x)  # the weight takes the step
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.sum().backward()


def test_side_by_side_rows_are_a_view_and_stay_one_through_conversions() -> None:
    layer = nn.Linear(4, 6)
    pyft.train_only(layer, rows=slice(2, 5))
    place = layer.weight.data_ptr()
    assert layer.weight_part.data_ptr() == place + 2 * 4 * 4
    layer.double()
    assert layer.weight_part.dtype == torch.float64
    assert layer.weight_part.data_ptr() == layer.weight.data_ptr() + 2 * 4 * 8
    with torch.no_grad():
        layer.weight_part.fill_(9.0)
    assert bool((layer.weight[2:5] == 9.0).all())
    scattered = nn.Linear(4, 6)
    pyft.train_only(scattered, rows=[0, 2])
    scattered.to(torch.bfloat16)
    assert torch.equal(scattered.weight[[0, 2]], scattered.weight_part)


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save"])
def test_copies_train_on_their_own(copied: str) -> None:
    model, _ = partly()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    steps(model, optimizer, 1)
    if copied == "deepcopy":
        twin = copy.deepcopy(model)
    elif copied == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        twin = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    reference = copy.deepcopy(model.state_dict())
    assert all(torch.equal(value, reference[key]) for key, value in twin.state_dict().items())
    steps(twin, torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.1), 3, first=1)
    assert all(torch.equal(value, reference[key]) for key, value in model.state_dict().items())
    steps(model, optimizer, 3, first=1)
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[key], rtol=1e-6, atol=1e-7)


def test_the_average_of_weights_sees_the_part() -> None:
    model, plan = partly()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=False
    )
    dense = {key: value.clone().double() for key, value in model.state_dict().items() if value.is_floating_point()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for number in range(4):
        steps(model, optimizer, 1, first=number)
        average.update_parameters(model)
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                dense[key] = value.double() if number == 0 else 0.5 * dense[key] + 0.5 * value.double()
    found = average.module.state_dict()
    for key in plan.parts:
        torch.testing.assert_close(found[key].double(), dense[key], rtol=1e-5, atol=1e-6, msg=key)


def test_state_dict_is_that_of_the_plain_model_both_ways() -> None:
    model, plan = partly()
    steps(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), 3)
    plain = Net()
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain.eval()(data()[0]), copy.deepcopy(model).eval()(data()[0]), rtol=0, atol=0)
    other = Net()
    for assign in (False, True):
        model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
        for name, chosen in plan.parts.items():
            part = model.get_parameter(f"{name}_part")
            assert torch.equal(part, chosen.entries.take(other.state_dict()[name])), name
        steps(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), 2)
        for name, chosen in plan.parts.items():
            assert torch.equal(
                chosen.entries.rest(model.state_dict()[name]), chosen.entries.rest(other.state_dict()[name])
            )
            # BatchNorm takes the bias before it away again.
            assert name == "lin.bias" or not torch.equal(model.state_dict()[name], other.state_dict()[name]), name
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**other.state_dict(), "lin.weight": torch.zeros(1, 1)})


class Tied(nn.Module):
    """A language model in small: the decoder's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.decoder = nn.Linear(6, 10)
        self.decoder.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.embed(x).mean(1))


@pytest.mark.parametrize("rows", [[1, 4, 7], slice(2, 6)])
@pytest.mark.parametrize("named", ["decoder.weight", "embed.weight"])
def test_a_tied_weight_has_one_part(rows: Any, named: str) -> None:
    torch.manual_seed(0)
    model = Tied()
    dense = copy.deepcopy(model)
    plan = pyft.train_only(model, named, rows=rows)
    assert model.embed.weight_part is model.decoder.weight_part
    assert model.embed.weight is model.decoder.weight
    assert list(plan.parts) == ["embed.weight"]
    for net in (model, dense, copy.deepcopy(model)):
        F.cross_entropy(net(data()[0]), data()[1]).backward()
        if net is not dense and net is not model:
            assert net.embed.weight_part is net.decoder.weight_part
    torch.testing.assert_close(model.embed.weight_part.grad, dense.embed.weight.grad[rows])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    optimizer.step()
    assert torch.equal(model.embed.weight[rows], model.embed.weight_part)
    plan.verify(model)
    plan.release(model)
    assert model.embed.weight is model.decoder.weight
    assert type(model.embed) is nn.Embedding
    assert type(model.decoder) is nn.Linear


def test_two_names_of_one_tensor_get_one_value() -> None:
    with pytest.raises(ConfigError, match=r"'embed.weight' and 'decoder.weight' are one tensor"):
        pyft.freeze(Tied(), {"embed": [1], "decoder.weight": [2]})


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_has_no_graph_break(backend: str) -> None:
    torch._dynamo.reset()
    model, _ = partly()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (model, twin)]
    for number in range(3):
        for net, optimizer in zip((compiled, twin), optimizers, strict=True):
            steps(net, optimizer, 1, first=number)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[key], rtol=1e-5, atol=1e-6, msg=key)
    # Two passes before one backward: what is written in place must not break the first.
    (loss_of(compiled, 0) + loss_of(compiled, 1)).backward()


def test_checkpointing_computes_the_same() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8))
    pyft.freeze(model, {"0": [1, 5], "2": slice(1, 3)})
    x = torch.randn(3, 4)
    model(x).sum().backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum().backward()
    again = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("stale", [False, True])
def test_an_exported_model_has_plain_weights(tmp_path: Path, stale: bool) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    pyft.freeze(model, {"0": [1, 5], "1": [0, 7], "4.weight": {"columns": [0, 9]}, "4.bias": slice(1, 3)})
    x = torch.randn(4, 3, 6, 6)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    if not stale:
        model(x)
    path = pyft.export_onnx(model, tmp_path / "model.onnx", example=x)
    graph = onnx.load(path).graph
    assert not [node.op_type for node in graph.node if "Scatter" in node.op_type or node.domain not in ("", "ai.onnx")]
    assert sum(int(torch.tensor(t.dims).prod()) for t in graph.initializer) < 1.2 * sum(
        value.numel() for value in model.state_dict().values()
    )
    (found,) = runtime.InferenceSession(str(path)).run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model.eval()(x).detach(), rtol=1e-4, atol=1e-5)
    assert model[0].weight_part.requires_grad


def test_processes_reduce_the_part_only(tmp_path: Path) -> None:
    # A fork of a process whose threads have worked may hang.
    both = torch.multiprocessing.start_processes(
        train_one, (str(tmp_path),), nprocs=2, join=False, start_method="spawn"
    )
    until = time.monotonic() + 180
    while not both.join(timeout=5):
        if time.monotonic() > until:
            for process in both.processes:
                process.kill()
            pytest.fail("two processes did not end within 180 s")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_a_frozen_entry_that_moved_is_told() -> None:
    model, plan = partly()
    with torch.no_grad():
        model._modules["lin"]._parameters["weight"][0, 0] += 1
    with pytest.raises(FrozenError, match=r"'lin.weight' was to stay frozen, but of its frozen entries its values"):
        plan.verify(model)


@pytest.mark.parametrize("how", ["whole layers", "rows side by side"])
def test_optimizers_are_not_slowed_down_for_nothing(how: str) -> None:
    """Only a part that is a copy needs to be told of every step."""
    code = f"""
import torch, pyft
from torch.optim import optimizer
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
pyft.freeze(model, {"'0'" if how == "whole layers" else "{'0.weight': slice(0, 3)}"})
assert not optimizer._global_optimizer_post_hooks
pyft.freeze(model, {{"0.weight": [0, 5]}})
assert len(optimizer._global_optimizer_post_hooks) == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
